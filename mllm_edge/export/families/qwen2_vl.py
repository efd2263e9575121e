"""Qwen2-VL: images of any size as a grid of cells, positions on three axes, a Qwen2 decoder.

An image is stretched to whole cells of 2 × 2 patches, within bounds on its area; each cell becomes one feature, and in
the prompt the placeholder is repeated once per cell.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.errors import ConfigError, WeightsError
from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.config import ConfigReader, load_config, model_readers
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processing import (
    processor_class,
    read_image_processor,
    read_processor,
    read_tokenizer,
)
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.texts import read_texts
from mllm_edge.export.checkpoint.vocabulary import check_vocabulary
from mllm_edge.export.decoders.llama import llama_spec
from mllm_edge.export.plan import Plan, TracedComponent
from mllm_edge.spec import (
    EmbeddingSpec,
    GridRope,
    ImagePrompt,
    ImageSpec,
    ModelSpec,
    Patchify,
    ResizeToPixels,
    TensorSpec,
)

if TYPE_CHECKING:
    from mllm_edge.export.vision.qwen_vl import QwenVlConfig

__all__ = ["MODEL_TYPES", "SUMMARY", "image_features", "load_processor", "plan"]

MODEL_TYPES = ("qwen2_vl",)
SUMMARY = {"decoders": ["qwen2"], "examples": ["Qwen/Qwen2-VL-2B-Instruct"]}

_START, _END = "<|vision_start|>", "<|vision_end|>"
_MAX_RATIO = 200.0  # of an image's sides; fixed in the reference
_NORM_EPS = 1e-6  # fixed in the reference
# For checkpoints that come without a template: turns between <|im_start|> and <|im_end|>, a system message first.
_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


@dataclass(frozen=True)
class _Names:
    """Where the parts stand in a checkpoint; `text` without a final dot."""

    text: str
    vision: str


# The hub's checkpoints and what transformers saves look like the first, a state dictionary like the second.
_LAYOUTS = (_Names("model", "visual."), _Names("model.language_model", "model.visual."))


@dataclass(frozen=True)
class _Vision:
    """The tower and the patches that it takes."""

    tower: "QwenVlConfig"
    patches: Patchify
    channels: int
    rope: GridRope


def plan(source: Source, weights: Weights) -> Plan:
    """Understand the checkpoint; raises ConfigError, WeightsError or SourceError that names what does not fit."""
    config = load_config(source)
    top, text, vision_reader = model_readers(source, config)
    names = _names(source, weights)
    decoder = llama_spec(text, weights, names.text, bool(top.take("tie_word_embeddings")), "qwen2_vl_text")
    context = text.take("max_position_embeddings")
    vision = _vision(vision_reader, decoder.hidden_size)
    image_token_id = top.take("image_token_id")
    for unused in ("video_token_id", "vision_start_token_id", "vision_end_token_id"):  # the template names them
        top.take(unused)
    for reader in (top, text, vision_reader):
        reader.finish()
    processor = load_processor(source)
    image = _image_spec(source, processor, vision, image_token_id)
    check_vocabulary(source, {image.prompt.token: image_token_id}, (_START, _END), decoder.vocab_size)
    embedding = f"{names.text}.embed_tokens.weight"
    model = ModelSpec(
        family="qwen2_vl",
        model_type=source.model_type,
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        context_length=context,
        parameters=weights.parameters,
        embedding=EmbeddingSpec("embed_tokens.npy", rows=weights.shape(embedding)[0]),
        positions=replace(decoder.position_spec(), images="grid"),
        cache=decoder.cache_spec(),
        image=image,
    )
    return Plan(
        model=model,
        decoder=decoder,
        traced=_traced(vision, names, decoder.hidden_size, weights),
        embedding=embedding,
        texts=read_texts(source, processor, config.text_config.to_dict()),
        ignored=tuple(name for name in weights if name.endswith("rotary_emb.inv_freq")),
    )


def load_processor(source: Source) -> Any:
    """What transformers loads from the folder: Qwen2VLProcessor, for images and text."""
    from transformers import Qwen2VLProcessor

    processor_class(source, "Qwen2VLProcessor", ("Qwen2VLProcessor",))
    image_processor, tokenizer = read_image_processor(source, ("Qwen2VLImageProcessor",)), read_tokenizer(source)
    processor = read_processor(source, Qwen2VLProcessor, image_processor, tokenizer)
    processor.chat_template = chat_template(source, _TEMPLATE, tokenizer)
    return processor


def image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The reference's tensors behind `vision_hidden` [cells, merge², D] and `image_features` [cells, H]."""
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    cell = model.config.vision_config.spatial_merge_size**2
    return found.last_hidden_state.unflatten(0, (-1, cell)), torch.cat(list(found.pooler_output))


def _names(source: Source, weights: Weights) -> _Names:
    for names in _LAYOUTS:
        if f"{names.text}.embed_tokens.weight" in weights:
            return names
    raise WeightsError(
        f"{source.folder}: the checkpoint has no tensor {_LAYOUTS[0].text}.embed_tokens.weight",
        "the weights are not those of Qwen2VLForConditionalGeneration, or a shard is missing",
    )


# ---------------------------------------------------------------- vision
def _vision(vision: ConfigReader, text_hidden: int) -> _Vision:
    from mllm_edge.export.vision.modules import ACTIVATIONS
    from mllm_edge.export.vision.qwen_vl import QwenVlConfig

    patches = Patchify(
        _integer(vision, "patch_size"), _integer(vision, "spatial_merge_size"), _integer(vision, "temporal_patch_size")
    )
    hidden, heads, layers = (_integer(vision, key) for key in ("embed_dim", "num_heads", "depth"))
    channels = vision.require("in_channels", 3)
    if hidden % (4 * heads):
        raise ConfigError(
            f"vision_config: embed_dim {hidden} over num_heads {heads} gives no heads of a multiple of 4 elements",
            "use the config.json that belongs to these weights",
        )
    if vision.take("hidden_size") != text_hidden:
        raise ConfigError(
            f"vision_config: hidden_size {vision.take('hidden_size')}, but the text model's is {text_hidden}",
            "use the config.json that belongs to these weights",
        )
    rope = vision.take("rope_parameters")
    if rope.get("rope_type") != "axial" or set(rope) - {"rope_type", "rope_theta"}:
        raise ConfigError(f"vision_config: rope_parameters = {rope!r}", "supported: rope_type axial with a rope_theta")
    tower = QwenVlConfig(
        hidden_size=hidden,
        intermediate_size=int(hidden * vision.take("mlp_ratio")),
        layers=layers,
        heads=heads,
        patch_values=channels * patches.frames * patches.patch**2,
        merge=patches.merge,
        norm_eps=_NORM_EPS,
        activation=vision.require("hidden_act", *ACTIVATIONS),
    )
    return _Vision(tower, patches, channels, GridRope(float(rope["rope_theta"]), hidden // heads))


def _integer(vision: ConfigReader, key: str) -> int:
    value = vision.take(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"vision_config: {key} = {value!r}", "only a positive integer is supported")
    return value


def _traced(
    vision: _Vision, names: _Names, text_hidden: int, weights: Weights
) -> tuple[TracedComponent, TracedComponent]:
    from mllm_edge.export.vision.qwen_vl import PatchMerger, QwenVlTower

    tower, cell = vision.tower, vision.patches.merge**2
    hidden = TensorSpec("vision_hidden", "float32", ("cells", cell, tower.hidden_size))
    encoder = TracedComponent(
        "vision_encoder",
        lambda: QwenVlTower(tower),
        (
            TensorSpec("pixel_values", "float32", ("cells", cell, tower.patch_values)),
            TensorSpec("cos", "float32", ("cells", cell, vision.rope.dim // 2)),
            TensorSpec("sin", "float32", ("cells", cell, vision.rope.dim // 2)),
        ),
        (hidden,),
        names.vision,
        {"patch_embed.proj.weight": _patch_embedding(vision, names, weights)},
    )
    connector = TracedComponent(
        "connector",
        lambda: PatchMerger(tower, text_hidden),
        (hidden,),
        (TensorSpec("image_features", "float32", ("cells", text_hidden)),),
        f"{names.vision}merger.",
    )
    return encoder, connector


def _patch_embedding(vision: _Vision, names: _Names, weights: Weights) -> Callable[[], np.ndarray]:
    """A convolution over patches that do not overlap is a linear layer over flattened ones."""
    width, sides = vision.tower.hidden_size, (vision.patches.frames, vision.patches.patch, vision.patches.patch)
    read = weights.use(f"{names.vision}patch_embed.proj.weight", (width, vision.channels, *sides))
    return lambda: read().reshape(width, -1)


# ---------------------------------------------------------------- processor
def _image_spec(source: Source, loaded: Any, vision: _Vision, token_id: int) -> ImageSpec:
    processor, patches = loaded.image_processor, vision.patches
    for key, value in (
        ("patch_size", patches.patch),
        ("merge_size", patches.merge),
        ("temporal_patch_size", patches.frames),
    ):
        stated = getattr(processor, key)
        if stated != value:
            raise ConfigError(
                f"{source.folder}: the image processor's {key} is {stated!r}, the vision tower's {value}",
                "use the preprocessor_config.json that belongs to this model",
            )
    for key in ("do_convert_rgb", "do_resize"):
        if not getattr(processor, key):
            raise ConfigError(f"{source.folder}: the image processor's {key} is false", "only true is supported")
    side = patches.patch * patches.merge
    least, most = _bounds(source, processor)
    transforms = (
        ResizeToPixels(side, least, most, resample_name(processor.resample), _MAX_RATIO),
        *value_transforms(processor),
        patches,
    )
    prompt = ImagePrompt(
        loaded.image_token,
        token_id,
        1,
        single="{image}",
        tile="{image}",
        inline=f"{_START}{{image}}{_END}",
        reserved=(loaded.video_token,),
    )
    return ImageSpec(transforms, prompt, side, side, vision.channels, (vision.rope,))


def _bounds(source: Source, processor: Any) -> tuple[int, int]:
    """The least and the largest number of pixels of a resized image."""
    least, most = processor.size.shortest_edge, processor.size.longest_edge
    if not all(isinstance(bound, int) and bound > 0 for bound in (least, most)):
        raise ConfigError(
            f"{source.folder}: the image processor's size = {dict(processor.size)}",
            "expected min_pixels and max_pixels, or shortest_edge and longest_edge, as numbers of pixels of an image",
        )
    if least > most:
        raise ConfigError(
            f"{source.folder}: the image processor asks for at least {least} pixels of an image and at most {most}",
            "correct min_pixels and max_pixels (or shortest_edge and longest_edge) in preprocessor_config.json",
        )
    return least, most
