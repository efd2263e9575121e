"""The exporter for the verbs that need it, loaded late."""

import importlib.util
import sys
import warnings
from typing import Any

from mllm_edge.errors import MllmEdgeError
from mllm_edge.install import install_hint

__all__ = ["NEEDED", "load_exporter", "require_exporter"]

NEEDED = (
    "huggingface_hub",
    "ml_dtypes",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "torch",
    "transformers",
)


def require_exporter() -> None:
    """Raise MllmEdgeError when the extra is not installed; nothing is imported yet."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MllmEdgeError(
            f"exporting needs packages that are not installed: {', '.join(missing)}",
            f"{install_hint('export')} (a CPU build of torch is enough; install it first to save space)",
        )


def load_exporter() -> Any:
    """The exporter, other libraries' chatter silenced; raises MllmEdgeError when the extra is not installed."""
    require_exporter()
    warnings.simplefilter("ignore")
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    from mllm_edge.export import pipeline

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if sys.stderr.isatty():  # a download shows its own bars; the line above switches them off, too
        enable_progress_bars()
    return pipeline
