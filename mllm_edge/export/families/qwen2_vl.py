"""Qwen2-VL: images of any size as a grid of cells, positions on three axes, a Qwen2 decoder.

An image is stretched to whole cells of 2 × 2 patches, within bounds on its area; each cell becomes one feature, and in
the prompt the placeholder is repeated once per cell.
"""

from collections.abc import Mapping
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR, load_processor, require_switched_on
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import TracedComponent
from mllm_edge.spec import GridRope, ImagePrompt, ImageSpec, Patchify, ResizeToPixels, SymbolRange, TensorSpec

__all__ = ["FAMILY"]

_VISION = "model.visual."
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


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.modules import ACTIVATIONS
    from mllm_edge.export.vision.qwen_vl import PatchMerger, QwenVlConfig, QwenVlTower

    vision, text_hidden = checkpoint.vision, checkpoint.decoder.hidden_size
    patch, merge, frames = map(vision.positive, ("patch_size", "spatial_merge_size", "temporal_patch_size"))
    patches = Patchify(patch, merge, frames)
    hidden, heads = vision.heads("embed_dim", "num_heads", multiple=4)
    channels, layers, stated = vision.require("in_channels", 3), vision.positive("depth"), vision.take("hidden_size")
    if stated != text_hidden:
        raise ConfigError(f"vision_config: hidden_size {stated}, but the text model's is {text_hidden}", OWN_CONFIG)
    rope = vision.take("rope_parameters")
    if rope.get("rope_type") != "axial" or set(rope) - {"rope_type", "rope_theta"}:
        raise ConfigError(f"vision_config: rope_parameters = {rope!r}", "supported: rope_type axial with a rope_theta")
    for unused in ("video_token_id", "vision_start_token_id", "vision_end_token_id"):  # the template names them
        checkpoint.top.take(unused)
    values, cell = channels * patches.frames * patches.patch**2, patches.merge**2
    tower = QwenVlConfig(
        hidden_size=hidden,
        intermediate_size=int(hidden * vision.take("mlp_ratio")),
        layers=layers,
        heads=heads,
        patch_values=values,
        merge=patches.merge,
        norm_eps=_NORM_EPS,
        activation=vision.require("hidden_act", *ACTIVATIONS),
    )
    turned = GridRope(float(rope["rope_theta"]), hidden // heads)
    image = _image_spec(checkpoint, patches, turned, channels)
    # A convolution over patches that do not overlap is a linear layer over flattened ones.
    sides = (channels, patches.frames, patches.patch, patches.patch)
    convolution = checkpoint.weights.use(f"{_VISION}patch_embed.proj.weight", (hidden, *sides))
    seen = TensorSpec("vision_hidden", "float32", ("cells", cell, hidden))
    side = patches.patch * patches.merge
    largest = _bounds(checkpoint.source, checkpoint.processor.image_processor)[1] // side**2
    ranges = {"cells": SymbolRange(usual=min(256, largest), most=largest, limit="max_seq")}
    encoder = TracedComponent(
        "vision_encoder",
        lambda: QwenVlTower(tower),
        (
            TensorSpec("pixel_values", "float32", ("cells", cell, values)),
            TensorSpec("cos", "float32", ("cells", cell, turned.dim // 2)),
            TensorSpec("sin", "float32", ("cells", cell, turned.dim // 2)),
        ),
        (seen,),
        _VISION,
        {"patch_embed.proj.weight": lambda: convolution().reshape(hidden, -1)},
        ranges,
    )
    connector = TracedComponent(
        "connector",
        lambda: PatchMerger(tower, text_hidden),
        (seen,),
        (TensorSpec("image_features", "float32", ("cells", text_hidden)),),
        f"{_VISION}merger.",
        ranges=ranges,
    )
    return Parts((encoder, connector), image, markers=(_START, _END), images="grid")


def _load_processor(source: Source) -> Any:
    return load_processor(source, "Qwen2VLProcessor", ("Qwen2VLImageProcessor",), _TEMPLATE)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    cell = model.config.vision_config.spatial_merge_size**2
    return found.last_hidden_state.unflatten(0, (-1, cell)), torch.cat(list(found.pooler_output))


def _image_spec(checkpoint: Checkpoint, patches: Patchify, rope: GridRope, channels: int) -> ImageSpec:
    source, loaded, processor = checkpoint.source, checkpoint.processor, checkpoint.processor.image_processor
    sizes = {"patch_size": patches.patch, "merge_size": patches.merge, "temporal_patch_size": patches.frames}
    for key, value in sizes.items():
        stated = getattr(processor, key)
        if stated != value:
            raise ConfigError(
                f"{source.folder}: the image processor's {key} is {stated!r}, the vision tower's {value}", OWN_PROCESSOR
            )
    require_switched_on(source, processor, "do_convert_rgb", "do_resize")
    side, (least, most) = patches.patch * patches.merge, _bounds(source, processor)
    transforms = (
        ResizeToPixels(side, least, most, resample_name(processor.resample), _MAX_RATIO),
        *value_transforms(processor),
        patches,
    )
    prompt = ImagePrompt(
        loaded.image_token,
        checkpoint.token_id,
        tokens_per_tile=1,
        single="{image}",
        tile="{image}",
        inline=f"{_START}{{image}}{_END}",
        reserved=(loaded.video_token,),
    )
    return ImageSpec(transforms, prompt, side, side, channels, (rope,))


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


FAMILY = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    decoders=("qwen2",),
    examples=("Qwen/Qwen2-VL-2B-Instruct",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    decoder_type=lambda config, weights: "qwen2_vl_text",
)
