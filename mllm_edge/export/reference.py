"""The transformers side of a comparison."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mllm_edge.export.source import Source

__all__ = ["forget_prompts", "load_reference", "quiet_transformers", "without_video"]


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


def forget_prompts(model: Any) -> None:
    """Drop what a model keeps of its last prompt: Qwen-VL's offset of positions would shift one without images."""
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None


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


def without_video(processor: Any) -> Any:
    """A processor class of transformers that takes images and text only: the part for video needs torchvision."""

    class ForImages(processor):
        # transformers reads the names of the parts from this signature.
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    ForImages.__name__ = processor.__name__
    return ForImages
