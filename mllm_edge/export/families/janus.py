"""Janus, of what it can do the understanding of images: its own SigLIP tower, an aligner of several layers, a Llama.

The parts that paint images (a codebook of image tokens, with an encoder, a decoder and a head of its own) are left out.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.processor import load_processor, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.deepseek_images import fitted
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.spec import ImagePrompt, ImageSpec

if TYPE_CHECKING:
    from mllm_edge.export.vision.siglip import SiglipConfig

__all__ = ["FAMILY"]

_VISION = "model.vision_model."
_PAINTS = ("model.vqmodel.", "model.generation_embeddings.", "model.generation_aligner.", "model.generation_head.")
# What the processor puts before every prompt, where its files say `use_default_system_prompt`.
_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.\n\n"
)
# For checkpoints that come without a template: the form that Janus-Pro was trained on.
_TEMPLATE = (
    "{% for message in messages %}{{ {'user': '<|User|>: ', 'assistant': '<|Assistant|>: '}[message['role']] or '' }}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image_placeholder>\n' }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else '\n\n' }}"
    "{% endfor %}{{ '<|Assistant|>:' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.deepseek import DeepAligner
    from mllm_edge.export.vision.siglip import SiglipTower

    vision, text_hidden = checkpoint.vision, checkpoint.decoder.hidden_size
    checkpoint.top.take("vq_config")  # of what paints, as the next is
    vision.take("num_image_tokens")
    tower = _tower(vision)
    width, depth = vision.require("projection_dim", text_hidden), vision.positive("depth")
    tokens = tower.patches**2
    positions = f"{_VISION}embeddings.position_embedding.weight", (tower.grid**2, tower.hidden_size)
    traced = tile_components(
        lambda: SiglipTower(tower),
        lambda: DeepAligner(tower.hidden_size, width, depth, tower.activation),
        (tower.channels, tower.tile, tower.tile),
        (tokens, tower.hidden_size),
        (tokens, text_hidden),
        (_VISION, "model.aligner."),
        {"embeddings.positions": checkpoint.weights.use(*positions)},
    )
    return Parts(traced, _image_spec(checkpoint, tower.tile, tokens), _PAINTS)


def _tower(vision: ConfigReader) -> "SiglipConfig":
    """A SigLIP that counts its inner width in those of its outer one, and has another name for a layer."""
    from mllm_edge.export.vision.siglip import SiglipConfig

    for inert in ("projection_dropout", "hidden_dropout_rate"):
        vision.take(inert)
    vision.require("attention_bias", True)
    vision.require("use_qk_norm", False)
    inner = int(vision.positive("hidden_size") * vision.take("mlp_ratio"))
    return SiglipConfig.read(vision, inner=inner, projection="projection_layer")


def _load_processor(source: Source) -> Any:
    processor = load_processor(source, "JanusProcessor", ("JanusImageProcessor",), _TEMPLATE)
    if processor.use_default_system_prompt:  # a part of the template, so that the device has it
        processor.use_default_system_prompt = False
        processor.chat_template = f"{{{{ {_SYSTEM!r} }}}}{processor.chat_template}"
    return processor


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    return found.last_hidden_state, found.pooler_output.flatten(0, 1)


def _image_spec(checkpoint: Checkpoint, tile: int, tokens: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    settings = processor.image_processor
    require_tile(source, (settings.size.height, settings.size.width), tile)
    require_tokens(source, f"num_image_tokens = {processor.num_image_tokens}", processor.num_image_tokens, tokens)
    begin, end = processor.image_start_token, processor.image_end_token
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, f"{begin}{{image}}{end}")
    return ImageSpec(fitted(source, settings), prompt, tile, tile, tokens)


FAMILY = Family(
    name="janus",
    model_types=("janus",),
    decoders=("llama",),
    examples=("deepseek-community/Janus-Pro-1B",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
)
