"""Images of Qwen's vision-language models: any size, as a grid of cells of patches, one feature each."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR, require_switched_on
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.video_settings import frame_sampling, video_settings
from mllm_edge.export.family import Checkpoint
from mllm_edge.spec import (
    FrameRule,
    FrameSampling,
    GridRope,
    ImagePrompt,
    ImageSpec,
    Patchify,
    ResizeToPixels,
    Table,
    VideoSpec,
)

__all__ = [
    "END",
    "START",
    "TEMPLATE",
    "TURNS",
    "VIDEO_DEFAULTS",
    "VIDEO_PROCESSOR",
    "VISION",
    "grid_rope",
    "image_features",
    "image_spec",
    "patch_weights",
    "read_patches",
    "video_spec",
]

VISION = "model.visual."
START, END = "<|vision_start|>", "<|vision_end|>"
VIDEO_PROCESSOR = "Qwen2VLVideoProcessor"
# Of the video processor, where the files do not say otherwise.
VIDEO_DEFAULTS = {"patch_size": 14, "size": {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2}}
# Of which frames are taken; the rate of Qwen2-VL's is that of the model's own code (qwen_vl_utils).
_TAKEN = {"fps": 2.0, "min_frames": 4, "max_frames": 768, "max_duration": 300}
_MAX_RATIO = 200.0  # of an image's sides; fixed in the reference
_EDGES = ("shortest_edge", "longest_edge")
_OF = {"image": "an image", "video": "a video"}
# For checkpoints that come without a template: turns between <|im_start|> and <|im_end|>.
TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else "
    "'<|vision_start|>' + {'video': '<|video_pad|>'}.get(part['type'], '<|image_pad|>') + '<|vision_end|>' }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
# With a system message first.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + TURNS
)


def read_patches(vision: ConfigReader) -> Patchify:
    """How the tower's images are cut."""
    patch, merge, frames = map(vision.positive, ("patch_size", "spatial_merge_size", "temporal_patch_size"))
    return Patchify(patch, merge, frames)


def grid_rope(vision: ConfigReader, dim: int) -> GridRope:
    """The tower's rotary embedding of heads of `dim`; raises ConfigError for one that nobody handles."""
    rope = vision.take("rope_parameters")
    if rope.get("rope_type") != "axial" or set(rope) - {"rope_type", "rope_theta"}:
        raise ConfigError(f"vision_config: rope_parameters = {rope!r}", "supported: rope_type axial with a rope_theta")
    return GridRope(float(rope["rope_theta"]), dim)


def patch_weights(checkpoint: Checkpoint, patches: Patchify, hidden: int) -> Mapping[str, Callable[[], np.ndarray]]:
    """The tower's first layer: a convolution over patches that do not overlap is a linear layer over flattened ones."""
    name = "patch_embed.proj.weight"
    shape = (hidden, 3, patches.frames, patches.patch, patches.patch)
    convolution = checkpoint.weights.use(f"{VISION}{name}", shape)
    return {name: lambda: convolution().reshape(hidden, -1)}


def image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The reference's patches behind its tower, by cells, and their features."""
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    cell = model.config.vision_config.spatial_merge_size**2
    return found.last_hidden_state.unflatten(0, (-1, cell)), torch.cat(list(found.pooler_output))


def image_spec(
    checkpoint: Checkpoint,
    patches: Patchify,
    tables: tuple[Table, ...],
    ids: Sequence[str] = ("video_token_id", "vision_start_token_id", "vision_end_token_id"),
    around: tuple[str, str] = (START, END),
    whole: bool = False,
) -> ImageSpec:
    """Images as cells of patches between two words; raises ConfigError where the image processor makes others. `ids`:
    of words that the template names; `whole`: see `ResizeToPixels`, bounds are then those of all frames together."""
    for unused in ids:
        checkpoint.top.take(unused)
    source, loaded, processor = checkpoint.source, checkpoint.processor, checkpoint.processor.image_processor
    _check_patches(source, processor, patches, "image")
    require_switched_on(source, processor, "do_convert_rgb", "do_resize")
    side, (least, most) = patches.patch * patches.merge, _bounds(source, processor, "image")
    if whole:
        least, most = _of_one(source, patches.frames, least, most)
    transforms = (
        ResizeToPixels(side, least, most, resample_name(processor.resample), _MAX_RATIO, whole),
        *value_transforms(processor),
        patches,
    )
    prompt = ImagePrompt(
        loaded.image_token,
        checkpoint.token_id,
        single="{image}",
        tile="{image}",
        inline=f"{around[0]}{{image}}{around[1]}",
        reserved=(loaded.video_token,),
    )
    return ImageSpec(transforms, prompt, side, side, features=1, tables=tables)


def video_spec(
    checkpoint: Checkpoint,
    patches: Patchify,
    processor: str,
    defaults: Mapping[str, Any],
    rule: FrameRule,
    **written: Any,
) -> VideoSpec | None:
    """Videos as cells of patches of a few frames each, by the settings of a video `processor`, and its `defaults` where
    none are stated; `rule`: by which it takes frames of a recording; `written`: how they are told, as of `VideoSpec`,
    the placeholder of images unless `token` and `token_id` are others. None as of `video_settings`; errors as of
    `image_spec`."""
    source = checkpoint.source
    fixed = {"merge_size": 2, "temporal_patch_size": 2, "cap_pixels_per_frame": False, **_TAKEN}
    settings = video_settings(source, processor, **fixed, **defaults)
    if settings is None:
        return None
    if settings.cap_pixels_per_frame:
        raise ConfigError(f"{source.folder}: the video processor's cap_pixels_per_frame is true", "supported: false")
    _check_patches(source, settings, patches, "video")
    if not written.get("together"):  # older files' words; transformers reads them for Qwen2-VL's class alone
        older = (getattr(settings, "min_pixels", None), getattr(settings, "max_pixels", None))
        settings.size = {**settings.size, **{key: value for key, value in zip(_EDGES, older, strict=True) if value}}
    least, most = _bounds(source, settings, "video")
    side, together = patches.patch * patches.merge, bool(written.get("together"))
    transforms = (
        ResizeToPixels(side, least, most, resample_name(settings.resample), _MAX_RATIO, together),
        *value_transforms(settings),
        patches,
    )
    sampling = _sampling(source, settings, patches, rule)
    return VideoSpec(transforms, **{**_placeholder(checkpoint), **written}, features=1, sampling=sampling)


def _sampling(source: Source, settings: Any, patches: Patchify, rule: FrameRule) -> FrameSampling | None:
    if rule == "steps":  # reads no num_frames
        return frame_sampling(source, SimpleNamespace(fps=settings.fps), rule, seconds=settings.max_duration)
    multiple = patches.frames if rule == "stride" else 1
    bounds = {"least": settings.min_frames, "most": settings.max_frames, "multiple": multiple}
    return frame_sampling(source, settings, rule, **bounds)


def _placeholder(checkpoint: Checkpoint) -> dict[str, Any]:
    """The word that stands for videos; its id is the configuration's."""
    token, stated = checkpoint.processor.video_token, checkpoint.config.video_token_id
    found = checkpoint.processor.tokenizer.convert_tokens_to_ids(token)
    if found != stated:
        raise ConfigError(
            f"{checkpoint.source.folder / 'config.json'}: video_token_id = {stated}, the tokenizer has {found} for "
            f"{token}",
            "use the config.json and the tokenizer that belong to this model",
        )
    return {"token": token, "token_id": stated}


def _check_patches(source: Source, processor: Any, patches: Patchify, kind: str) -> None:
    sizes = {"patch_size": patches.patch, "merge_size": patches.merge, "temporal_patch_size": patches.frames}
    for key, value in sizes.items():
        stated = getattr(processor, key)
        if stated != value:
            raise ConfigError(
                f"{source.folder}: the {kind} processor's {key} is {stated!r}, the vision tower's {value}",
                OWN_PROCESSOR,
            )


def _of_one(source: Source, frames: int, *bounds: int) -> tuple[int, ...]:
    """Bounds of so many frames together as those of one."""
    if frames > 2 or any(bound % frames for bound in bounds):
        raise ConfigError(
            f"{source.folder}: temporal_patch_size {frames} and bounds of {list(bounds)} pixels",
            "supported: one frame, or two and even bounds",
        )
    return tuple(bound // frames for bound in bounds)


def _bounds(source: Source, processor: Any, kind: str) -> tuple[int, int]:
    """The least and the largest number of pixels of a resized image."""
    size: dict[str, Any] = dict(processor.size)
    least, most = (size.get(edge) or 0 for edge in _EDGES)
    if not all(isinstance(bound, int) and bound > 0 for bound in (least, most)):
        raise ConfigError(
            f"{source.folder}: the {kind} processor's size = {size}",
            "expected min_pixels and max_pixels, or shortest_edge and longest_edge, as numbers of pixels of an image",
        )
    if least > most:
        raise ConfigError(
            f"{source.folder}: the {kind} processor asks for at least {least} pixels of {_OF[kind]} and at most {most}",
            "correct min_pixels and max_pixels (or shortest_edge and longest_edge) in preprocessor_config.json",
        )
    return least, most
