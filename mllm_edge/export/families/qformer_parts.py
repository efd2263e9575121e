"""What BLIP-2 and InstructBLIP share: the tower, the Q-Former's settings, and prompts that begin with their images.

Their processors put an image's tokens before the token that begins a text, and know one image; here a prompt may have
none, or several, each with its queries.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.config import ConfigReader, load_config
from mllm_edge.export.checkpoint.image_settings import made_size, single_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.texts import Texts, read_texts
from mllm_edge.export.family import Checkpoint
from mllm_edge.spec import ImagePrompt, ImageSpec

if TYPE_CHECKING:
    import torch

    from mllm_edge.export.vision.qformer import QFormerConfig
    from mllm_edge.export.vision.siglip import SiglipConfig

__all__ = [
    "TEXT",
    "VISION",
    "QFormerVision",
    "add_tokens",
    "answering",
    "begun",
    "load_complete",
    "qformer_texts",
    "read",
    "with_images_first",
]

VISION = "vision_model."
# Where the decoder stands, by its type.
TEXT = {"opt": "language_model.model.decoder", "t5": "language_model"}
# Images, and the token that begins a text; what follows is a template's own.
_IMAGES = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] in ('image', 'video') %}"
    "{{ '<' + part['type'] + '>' }}{% endfor %}{% endfor %}{{ bos_token }}"
)
# The token that ends a text, where none begins it: T5's.
_END = "{{ '' if bos_token else eos_token }}"


# ---------------------------------------------------------------- tower and Q-Former
@dataclass(frozen=True)
class QFormerVision:
    """The tower and the Q-Former behind it, each image one tile."""

    tower: "SiglipConfig"
    qkv_bias: bool
    qformer: "QFormerConfig"

    @property
    def patches(self) -> int:
        """States of an image: the class token and the patches."""
        return 1 + self.tower.patches**2

    @property
    def encoder(self) -> "Callable[[], torch.nn.Module]":
        """What makes the tower, to be traced."""
        from mllm_edge.export.vision.blip import BlipTower

        tower, qkv_bias = self.tower, self.qkv_bias
        return lambda: BlipTower(tower, qkv_bias)

    def derived(self, checkpoint: Checkpoint) -> Mapping[str, Callable[[], np.ndarray]]:
        """The tower's positions; the class token is the same for all images, so it joins its own position."""
        width, embeddings = self.tower.hidden_size, f"{VISION}embeddings."
        table = f"{embeddings}position_embedding", (1, self.patches, width)
        token = f"{embeddings}class_embedding", (1, 1, width)
        return {"embeddings.positions": checkpoint.weights.with_row(*table, *token)}

    def image_spec(self, checkpoint: Checkpoint, token: str, placeholder: str = "") -> ImageSpec:
        """Each image is one tile, its `token` repeated once per query; `placeholder`: see `ImagePrompt`."""
        source, processor, tile, queries = (
            checkpoint.source,
            checkpoint.processor,
            self.tower.tile,
            self.qformer.queries,
        )
        transforms = single_transforms(source, processor.image_processor)
        require_tile(source, made_size(transforms), tile)
        require_tokens(source, f"num_query_tokens = {processor.num_query_tokens}", processor.num_query_tokens, queries)
        # Vocabularies have both, for checkpoints that are opened as models of images and of videos.
        reserved = tuple(word for word in ("<image>", "<video>") if word != token)
        prompt = ImagePrompt(token, checkpoint.token_id, "{image}", reserved=reserved, placeholder=placeholder)
        return ImageSpec(transforms, prompt, tile, tile, queries)


def read(checkpoint: Checkpoint) -> QFormerVision:
    """The two's settings; raises ConfigError."""
    from mllm_edge.export.vision.qformer import QFormerConfig
    from mllm_edge.export.vision.siglip import SiglipConfig

    top, vision = checkpoint.top, checkpoint.vision
    if checkpoint.token_id is None:
        raise ConfigError(
            f"{checkpoint.source.folder / 'config.json'}: no image_token_index or video_token_index: the checkpoint is "
            "of a time before images had tokens of their own",
            "take the model's newer config.json and tokenizer from the hub",
        )
    for unused in ("image_text_hidden_size", "initializer_factor", "use_decoder_only_language_model"):
        top.take(unused)  # of image-text matching, of training, and what text_config.model_type says
    tower = SiglipConfig.read(vision)
    settings = checkpoint.config.qformer_config
    top.take("qformer_config")
    where = f"{checkpoint.source.folder / 'config.json'} qformer_config"
    reader = ConfigReader(where, settings.to_dict(), type(settings)().to_dict())
    qformer = QFormerConfig.read(reader, top.positive("num_query_tokens"), tower.hidden_size)
    reader.finish()
    return QFormerVision(tower, bool(vision.take("qkv_bias")), qformer)


# ---------------------------------------------------------------- prompts
def load_complete(source: Source, cls: Any, told: str, further: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """transformers' processor of class `cls`, with its `further` parts, for prompts that begin with their images;
    `told`, a template, writes the text. Raises ConfigError for a folder with a template of its own, too."""
    stated = {"num_query_tokens": load_config(source).num_query_tokens}
    processor = load_processor(
        source, cls.__name__, ("BlipImageProcessor",), told, lambda _: stated, _complete(cls), further
    )
    return with_images_first(source, processor, told, str(processor.image_token))


def with_images_first(source: Source, processor: Any, told: str, token: str) -> Any:
    """A processor whose images become so many times `token`; as of `load_complete`."""
    if chat_template(source, ""):
        raise ConfigError(
            f"{source.folder}: a chat template, and this model's processor puts images before a text's beginning",
            "delete the chat template",
        )
    processor.image_token = _Word("<image>")
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids(token)
    processor.text_start = start = _text_start(processor.tokenizer, token)
    processor.chat_template = (
        f"{_IMAGES}{{% set told %}}{told}{{% endset %}}{{{{ {start!r} if told else '' }}}}{{{{ told }}}}{_END}"
    )
    return processor


class _Word(str):
    """A token's text, in the form that transformers' processors ask for."""

    @property
    def content(self) -> str:
        return str(self)


def _complete(cls: Any) -> Any:
    """A processor of transformers' class `cls` that takes prompts in the form that it would give them: any number of
    images, and the token that begins a text."""

    class Complete(cls):
        def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
            texts, count = begun(self, text)
            made = super().__call__(images=images, text=texts, **{**options, "add_special_tokens": True})
            if count > 1:
                add_tokens(made, (count - 1) * self.num_query_tokens, self.image_token_id)
                for name in (name for name in made if name.startswith("qformer_")):
                    made[name] = made[name].repeat_interleave(count, dim=0)
            return made

    Complete.__name__ = cls.__name__
    return Complete


def begun(processor: Any, text: Any) -> tuple[list[str], int]:
    """Complete prompts without what a processor adds to them, and how many images each begins with."""
    texts, image = [text] if isinstance(text, str) else list(text), processor.image_token
    counts = {one.count(image) for one in texts}
    if len(counts) != 1:
        raise ValueError("prompts of unequal numbers of images do not fit into one tensor")
    bos = processor.tokenizer.bos_token or ""
    eos = "" if bos else processor.tokenizer.eos_token
    bare = [one.replace(image, "").removeprefix(bos).removesuffix(eos) for one in texts]
    return [one.removeprefix(processor.text_start) for one in bare], counts.pop()


def add_tokens(made: Any, tokens: int, token_id: int) -> None:
    """Put so many more of an image's tokens before the others."""
    import torch

    for name, value in (("input_ids", token_id), ("attention_mask", 1)):
        made[name] = torch.cat([torch.full((len(made[name]), tokens), value), made[name]], dim=1)


def _text_start(tokenizer: Any, image: str) -> str:
    """What has to stand before a text behind an image's tokens, so that its ids are those of a text alone; raises
    ConfigError where nothing helps."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    bos = tokenizer.bos_token or ""
    for start in ("", " "):
        if ids(f"{image}{bos}{start}What?") == [*ids(image), *ids(bos), *ids("What?")]:
            return start
    raise ConfigError(
        f"the tokenizer reads a text behind {image} otherwise than alone", "use the model's own tokenizer"
    )


def qformer_texts(checkpoint: Checkpoint) -> Texts:
    """The template says where a text begins: nothing is added to it."""
    texts = read_texts(checkpoint.source, checkpoint.processor, checkpoint.config.text_config.to_dict())
    return replace(texts, generation=replace(texts.generation, add_special_tokens=False))


# ---------------------------------------------------------------- the reference
def answering(architecture: Any, *further: str, features: str = "get_image_features") -> Any:
    """A transformers' class whose `forward` takes what its `generate` does: a prompt without images, too, and tokens
    behind one. `further`: inputs that go with the pixels; `features`: who takes them."""

    class Answering(architecture):
        def forward(
            self, input_ids: Any = None, pixel_values: Any = None, attention_mask: Any = None, **options: Any
        ) -> Any:
            given = {name: options.pop(name, None) for name in further}
            if input_ids is None:  # the prompt was read before
                return self.language_model(attention_mask=attention_mask, **options)
            embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                found = getattr(self, features)(pixel_values, **given, return_dict=True).pooler_output
                embeds = embeds.masked_scatter(self.get_placeholder_mask(input_ids, embeds), found)
            return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, **options)

    Answering.__name__ = architecture.__name__
    return Answering
