"""What BLIP-2 and InstructBLIP share: the tower, the Q-Former's settings, and prompts that begin with their images.

Their processors put an image's tokens before the token that begins a text, and know one image; here a prompt may have
none, or several, each with its queries.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.image_settings import single_transforms
from mllm_edge.export.checkpoint.processor import require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.texts import Texts, read_texts
from mllm_edge.export.family import Checkpoint
from mllm_edge.spec import ImagePrompt, ImageSpec, Resize

if TYPE_CHECKING:
    import torch

    from mllm_edge.export.vision.qformer import QFormerConfig
    from mllm_edge.export.vision.siglip import SiglipConfig

__all__ = [
    "IMAGES",
    "TEXT",
    "TEXT_END",
    "VISION",
    "QFormerVision",
    "Word",
    "answering",
    "bare_texts",
    "no_template",
    "qformer_texts",
    "read",
]

VISION = "vision_model."
# Where the decoder stands, by its type.
TEXT = {"opt": "language_model.model.decoder", "t5": "language_model"}
# Images, and the token that begins a text; what follows is a template's own.
IMAGES = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' %}"
    "{{ '<image>' }}{% endfor %}{% endfor %}{{ bos_token }}"
)
# The token that ends a text, where none begins it: T5's.
TEXT_END = "{{ '' if bos_token else eos_token }}"


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

    def image_spec(self, checkpoint: Checkpoint) -> ImageSpec:
        """Each image is one tile, its placeholder repeated once per query."""
        source, processor, tile, queries = (
            checkpoint.source,
            checkpoint.processor,
            self.tower.tile,
            self.qformer.queries,
        )
        transforms = single_transforms(source, processor.image_processor)
        size = next((t for t in reversed(transforms) if isinstance(t, Resize)), None)
        require_tile(source, None if size is None else (size.height, size.width), tile)
        require_tokens(source, f"num_query_tokens = {processor.num_query_tokens}", processor.num_query_tokens, queries)
        prompt = ImagePrompt(processor.image_token, checkpoint.token_id, "{image}")
        return ImageSpec(transforms, prompt, tile, tile, queries)


def read(checkpoint: Checkpoint) -> QFormerVision:
    """The two's settings; raises ConfigError."""
    from mllm_edge.export.vision.qformer import QFormerConfig
    from mllm_edge.export.vision.siglip import SiglipConfig

    top, vision = checkpoint.top, checkpoint.vision
    if checkpoint.token_id is None:
        raise ConfigError(
            f"{checkpoint.source.folder / 'config.json'}: no image_token_index: the checkpoint is of a time before "
            "images had tokens of their own",
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
class Word(str):
    """A token's text, in the form that transformers' processors ask for."""

    @property
    def content(self) -> str:
        return str(self)


def no_template(source: Source) -> None:
    """Raise ConfigError for a folder with a chat template."""
    if chat_template(source, ""):
        raise ConfigError(
            f"{source.folder}: a chat template, and this model's processor puts images before a text's beginning",
            "delete the chat template",
        )


def bare_texts(text: Any, image: str, tokenizer: Any) -> tuple[list[str], int]:
    """Complete prompts without what a processor adds to them, and how many images each begins with."""
    first, last = (tokenizer.bos_token, "") if tokenizer.bos_token else ("", tokenizer.eos_token)
    texts = [text] if isinstance(text, str) else list(text)
    images = {one.count(image) for one in texts}
    if len(images) != 1:
        raise ValueError("prompts of unequal numbers of images do not fit into one tensor")
    return [one.replace(image, "").removeprefix(first).removesuffix(last) for one in texts], images.pop()


def qformer_texts(checkpoint: Checkpoint) -> Texts:
    """The template says where a text begins: nothing is added to it."""
    texts = read_texts(checkpoint.source, checkpoint.processor, checkpoint.config.text_config.to_dict())
    return replace(texts, generation=replace(texts.generation, add_special_tokens=False))


# ---------------------------------------------------------------- the reference
def answering(architecture: Any, *further: str) -> Any:
    """A transformers' class whose `forward` takes what its `generate` does: a prompt without images, too, and tokens
    behind one. `further`: inputs that go with the pixels."""

    class Answering(architecture):
        def forward(
            self, input_ids: Any = None, pixel_values: Any = None, attention_mask: Any = None, **options: Any
        ) -> Any:
            given = {name: options.pop(name, None) for name in further}
            if input_ids is None:  # the prompt was read before
                return self.language_model(attention_mask=attention_mask, **options)
            embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                features = self.get_image_features(pixel_values, **given, return_dict=True).pooler_output
                embeds = embeds.masked_scatter(self.get_placeholder_mask(input_ids, embeds), features)
            return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, **options)

    Answering.__name__ = architecture.__name__
    return Answering
