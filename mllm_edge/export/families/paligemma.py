"""PaliGemma 1 and 2: SigLIP tower, linear projector, a Gemma or Gemma 2 decoder in whose prompts tokens see each other.

An image is stretched to one tile. A prompt has no turns: images, the token that begins a text, the text, a line's end.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.image_settings import made_size, single_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.spec import ImagePrompt, ImageSpec

__all__ = ["FAMILY"]

_VISION, _SIGLIP, _IMAGE = "model.vision_tower.", "siglip_vision_model", "<image>"
_ENCODER = "use_bidirectional_attention"
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' %}"
    "{{ '<image>' }}{% endfor %}{% endfor %}{{ bos_token }}"
    "{% for message in messages %}{{ '' if loop.first else '\n' }}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endfor %}"
    "{{ '\n' if add_generation_prompt else '' }}"
)


def _translated(source: Source) -> Source:
    """With a text model that is no encoder by itself: what sees what is told of the prompt (`ImageSpec.both_ways`)."""
    text = source.config.get("text_config")
    if not isinstance(text, Mapping):
        return source
    return replace(source, config={**source.config, "text_config": {**text, _ENCODER: False}})


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.paligemma import Projector
    from mllm_edge.export.vision.siglip import SiglipConfig, SiglipTower

    top, vision, text_hidden = checkpoint.top, checkpoint.vision, checkpoint.decoder.hidden_size
    kind, where = checkpoint.config.vision_config.model_type, checkpoint.source.folder / "config.json"
    if kind != _SIGLIP:
        raise ConfigError(f"{where}: vision_config.model_type = {kind!r}", f"supported: {_SIGLIP}")
    for unused in ("hidden_size", "vocab_size"):  # of what the parts state themselves
        top.take(unused)
    width = top.take("projection_dim")
    if width != text_hidden:
        raise ConfigError(
            f"{where}: projection_dim {width}, but the text model's hidden_size {text_hidden}", OWN_CONFIG
        )
    tower = SiglipConfig.read(vision)
    for unused in ("projection_dim", "vision_use_head"):  # the first is the one above; nothing here takes the other's
        vision.take(unused)
    tokens = tower.patches**2
    positions = f"{_VISION}embeddings.position_embedding.weight", (tower.grid**2, tower.hidden_size)
    traced = tile_components(
        lambda: SiglipTower(tower),
        lambda: Projector(tower.hidden_size, text_hidden),
        (tower.channels, tower.tile, tower.tile),
        (tokens, tower.hidden_size),
        (tokens, text_hidden),
        (_VISION, "model.multi_modal_projector."),
        {"embeddings.positions": checkpoint.weights.use(*positions)},
    )
    return Parts(traced, _image_spec(checkpoint, tower.tile, tokens), (f"{_VISION}head.",))


def _load_processor(source: Source) -> Any:
    from transformers import PaliGemmaProcessor

    class Complete(PaliGemmaProcessor):
        """Takes prompts in the form that it would give them, and text alone."""

        def validate_inputs(self, images: Any = None, text: Any = None, *others: Any, **options: Any) -> None:
            if images is not None:
                super().validate_inputs(images, text, *others, **options)

        def prepare_inputs_layout(self, images: Any = None, text: Any = None, *others: Any, **options: Any) -> Any:
            if images is not None:
                bos = self.tokenizer.bos_token
                text = [_bare(one, bos) for one in ([text] if isinstance(text, str) else text)]
            return super().prepare_inputs_layout(images, text, *others, **options)

        def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
            made = super().__call__(images=images, text=text, **options)
            made.pop("labels", None)  # for training
            return made

    if chat_template(source, ""):
        raise ConfigError(
            f"{source.folder}: a chat template, and PaliGemma's processor gives a prompt its form",
            "delete the chat template",
        )
    return load_processor(source, "PaliGemmaProcessor", ("SiglipImageProcessor",), _TEMPLATE, cls=Complete)


def _bare(text: str, bos: str) -> str:
    """A complete prompt without what the processor adds to it."""
    head, image, rest = text.rpartition(_IMAGE)
    return head + image + rest.removeprefix(bos).removesuffix("\n")


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    return found.last_hidden_state, torch.cat(list(found.pooler_output))


def _image_spec(checkpoint: Checkpoint, tile: int, tokens: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    transforms = single_transforms(source, processor.image_processor)
    require_tile(source, made_size(transforms), tile)
    require_tokens(source, f"image_seq_length = {processor.image_seq_length}", processor.image_seq_length, tokens)
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, "{image}")
    return ImageSpec(transforms, prompt, tile, tile, tokens, both_ways="prompt")


FAMILY = Family(
    name="paligemma",
    model_types=("paligemma",),
    decoders=("gemma", "gemma2"),
    examples=("google/paligemma-3b-mix-224", "google/paligemma2-3b-mix-224"),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
    translated=_translated,
)
