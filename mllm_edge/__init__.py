"""Multimodal language models on edge devices: export, calibrate, run.

The device side (`VLM`) needs neither torch nor transformers; it is imported on first use so that `import mllm_edge`
stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_edge.runtime.asynchronous import AsyncVLM
    from mllm_edge.runtime.prompt.frame_window import FrameWindow
    from mllm_edge.runtime.prompt.image import BGR, Pixels
    from mllm_edge.runtime.prompt.sources import EncodedImage, Video, VideoFile
    from mllm_edge.runtime.stopping import Cancel
    from mllm_edge.runtime.vlm import VLM, Chunk, Result

__all__ = [
    "BGR",
    "VLM",
    "AsyncVLM",
    "Cancel",
    "Chunk",
    "EncodedImage",
    "FrameWindow",
    "Pixels",
    "Result",
    "Video",
    "VideoFile",
    "__version__",
]

__version__ = "0.1.0"

_MODULES = {
    "asynchronous": ("AsyncVLM",),
    "prompt.frame_window": ("FrameWindow",),
    "prompt.image": ("BGR", "Pixels"),
    "prompt.sources": ("EncodedImage", "Video", "VideoFile"),
    "stopping": ("Cancel",),
    "vlm": ("VLM", "Chunk", "Result"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"mllm_edge.runtime.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
