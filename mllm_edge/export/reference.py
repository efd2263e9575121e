"""The transformers side of a comparison."""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mllm_edge.export.checkpoint.quantized import without_quantization
from mllm_edge.export.source import Source

__all__ = ["adapted", "forget_prompts", "load_reference", "quiet_transformers", "without_video"]

_OWN_MERGE = "the reference's adapters were merged by mllm-edge, too: pip install peft lets PEFT do it"


def load_reference(source: Source, decoder_layers: int | None = None) -> Any:
    """What transformers makes of the checkpoint itself, in float32; only the first `decoder_layers` (None: all)."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = without_quantization(AutoConfig.from_pretrained(source.folder))  # the weights were found to be float
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


def adapted(model: Any, source: Source) -> tuple[Any, tuple[str, ...]]:
    """The reference model in float32 with the source's adapters, merged by PEFT where it is installed, and notes."""
    if not source.adapters:
        return model, ()
    if importlib.util.find_spec("peft") is None:
        return _with_our_weights(model, source), (_OWN_MERGE,)
    from peft import PeftModel

    with warnings.catch_warnings():
        # A model of fewer layers leaves tensors of an adapter over.
        warnings.simplefilter("ignore")
        for adapter in source.adapters:
            model = PeftModel.from_pretrained(model, adapter.folder).merge_and_unload()
    return model.eval(), ()


def _with_our_weights(model: Any, source: Source) -> Any:
    import torch

    from mllm_edge.export.adapters import skeleton

    weights, rename, parameters = source.weights(), skeleton(model).rename, dict(model.named_parameters())
    with torch.no_grad():
        for name in weights.altered:
            parameter = parameters.get(rename(name))
            if parameter is not None:  # else of a layer that this shorter model lacks
                parameter.copy_(torch.from_numpy(weights.read(name)))
    return model
