"""Multimodal language models on edge devices: export, calibrate, run.

The device side (`VLM`) needs neither torch nor transformers; it is imported on first use so that `import mllm_edge`
stays light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_edge.runtime.prompt.frame_window import FrameWindow
    from mllm_edge.runtime.prompt.image import BGR, Pixels
    from mllm_edge.runtime.prompt.sources import EncodedImage, Video, VideoFile
    from mllm_edge.runtime.vlm import VLM, Chunk, Result

__all__ = [
    "BGR",
    "VLM",
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


def __getattr__(name: str) -> Any:
    if name in ("VLM", "Chunk", "Result"):
        from mllm_edge.runtime import vlm

        return getattr(vlm, name)
    if name in ("BGR", "Pixels"):
        from mllm_edge.runtime.prompt import image

        return getattr(image, name)
    if name == "FrameWindow":
        from mllm_edge.runtime.prompt.frame_window import FrameWindow

        return FrameWindow
    if name in ("EncodedImage", "Video", "VideoFile"):
        from mllm_edge.runtime.prompt import sources

        return getattr(sources, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
