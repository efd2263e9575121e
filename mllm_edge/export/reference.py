"""The transformers side of a comparison."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mllm_edge.export.source import Source

__all__ = ["load_reference", "quiet_transformers"]


def load_reference(source: Source, decoder_layers: int | None = None) -> Any:
    """What transformers makes of the checkpoint itself, in float32; only the first `decoder_layers` (None: all)."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(source.folder)
    if decoder_layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = min(decoder_layers, text.num_hidden_layers)
    return AutoModelForImageTextToText.from_pretrained(
        source.folder, config=config, dtype=torch.float32, low_cpu_mem_usage=True
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within, transformers shows no progress bars and no advice; afterwards its settings are as before."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
