"""A checkpoint's video processor settings; transformers' own object needs torchvision."""

from types import SimpleNamespace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processing import read_video_settings
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR, require_switched_on
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.image_checks import sampling_problems
from mllm_edge.spec import FrameRule, FrameSampling, Resize, Transform

__all__ = ["frame_sampling", "frame_tiles", "video_settings"]

# Of the video processors of transformers 5.24, where they do not say otherwise.
_DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


def video_settings(source: Source, processor: str, **defaults: Any) -> SimpleNamespace | None:
    """The settings of a video `processor`, with `defaults` of its own beside those of all; None for a folder without
    any, which transformers does not open for videos either. Raises ConfigError for another class, or one that leaves
    the frames as large as they are."""
    stated = read_video_settings(source, processor)
    if stated is None:
        return None
    settings = SimpleNamespace(**{**_DEFAULTS, **defaults, **stated})
    require_switched_on(source, settings, "do_convert_rgb", "do_resize")
    return settings


def frame_sampling(source: Source, settings: Any, rule: FrameRule = "even", **further: Any) -> FrameSampling | None:
    """Which frames a video processor takes by its `settings` fps and num_frames, of which num_frames counts where both
    are stated; `further`: as of `FrameSampling`. None where neither is: then it takes none by itself. Raises
    ConfigError for what is no such number."""
    fps, frames = (getattr(settings, name, None) for name in ("fps", "num_frames"))
    made = FrameSampling(rule, fps=None if frames is not None else fps, frames=frames, **further)
    if problem := next(sampling_problems(made), None):
        raise ConfigError(f"{source.folder}: the video processor's settings: {problem}", OWN_PROCESSOR)
    return None if fps is None and frames is None else made


def frame_tiles(source: Source, settings: SimpleNamespace, tile: int) -> tuple[Transform, ...]:
    """Each frame is stretched to one tile; raises ConfigError for settings that do anything else."""
    if settings.size != {"height": tile, "width": tile} or settings.do_center_crop:
        raise ConfigError(
            f"{source.folder}: the video processor's size is {settings.size}, the vision tower takes {tile}×{tile} px",
            "use the video_preprocessor_config.json that belongs to this model",
        )
    return (Resize(tile, tile, resample_name(settings.resample)), *value_transforms(settings))
