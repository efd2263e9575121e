"""Multimodal language models on edge devices: export, calibrate, run.

The device side (`VLM`) needs neither torch nor transformers; it is imported on first use so that `import mllm_edge`
stays light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_edge.runtime.prompt.image import BGR
    from mllm_edge.runtime.prompt.sources import EncodedImage, Video
    from mllm_edge.runtime.stopping import Cancel
    from mllm_edge.runtime.vlm import VLM, Chunk, Result

__all__ = ["BGR", "VLM", "Cancel", "Chunk", "EncodedImage", "Result", "Video", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("VLM", "Chunk", "Result"):
        from mllm_edge.runtime import vlm

        return getattr(vlm, name)
    if name == "BGR":
        from mllm_edge.runtime.prompt.image import BGR

        return BGR
    if name == "Cancel":
        from mllm_edge.runtime.stopping import Cancel

        return Cancel
    if name in ("EncodedImage", "Video"):
        from mllm_edge.runtime.prompt import sources

        return getattr(sources, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
