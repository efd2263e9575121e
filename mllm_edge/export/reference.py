"""The transformers side of a comparison."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mllm_edge.export.adapters import Skeleton, skeleton
from mllm_edge.export.checkpoint.quantized import without_quantization
from mllm_edge.export.source import Source

__all__ = ["adapted", "forget_prompts", "load_reference", "quiet_transformers"]

_OWN_MERGE = "the reference's adapters were merged by mllm-edge, too: pip install peft lets PEFT do it"
_OWN_NAMES = (
    "the reference's adapters were merged by mllm-edge, too: transformers does not know this checkpoint's names"
)
# A place where no adapter lies: from_pretrained would merge one that is in the checkpoint's folder by itself.
_NO_ADAPTER = {"subfolder": "no-adapter"}


def load_reference(source: Source, decoder_layers: int | None = None) -> Any:
    """What transformers makes of the checkpoint itself, in float32; only the first `decoder_layers` (None: all)."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = without_quantization(AutoConfig.from_pretrained(source.folder))  # the weights were found to be float
    if decoder_layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = min(decoder_layers, text.num_hidden_layers)
    return AutoModelForImageTextToText.from_pretrained(
        source.folder, config=config, dtype=torch.float32, low_cpu_mem_usage=True, adapter_kwargs=_NO_ADAPTER
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


def adapted(model: Any, source: Source) -> tuple[Any, tuple[str, ...]]:
    """The reference model in float32 with the source's adapters, merged by PEFT where it can, and notes."""
    if not source.adapters:
        return model, ()
    if not source.in_transformers:  # its weights were read through the adapters
        return model, (_OWN_NAMES,)
    names = skeleton(model)
    if importlib.util.find_spec("peft") is None:
        return _with_our_weights(model, source, names), (_OWN_MERGE,)
    from mllm_edge.export.checkpoint.peft_merge import merged_by_peft

    notes = []
    for adapter in source.adapters:
        model, left = merged_by_peft(model, adapter, names)
        if left:
            notes.append(f"PEFT has no place for all of {adapter.name} ({left}): the reference was merged by mllm-edge")
            source.notices.add(notes[-1])
    return (_with_our_weights(model, source, names) if notes else model).eval(), tuple(notes)


def _with_our_weights(model: Any, source: Source, names: Skeleton) -> Any:
    """Every changed weight as the export reads it; `names` are those of the model before anything was merged."""
    import torch

    weights, parameters = source.weights(), dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in weights.altered:
            live = names.rename(name)
            for parameter in (parameters.get(live), parameters.get(names.tied.get(live, ""))):
                if parameter is not None:  # else of a layer that this shorter model lacks
                    parameter.copy_(torch.from_numpy(weights.read(name)))
    return model
