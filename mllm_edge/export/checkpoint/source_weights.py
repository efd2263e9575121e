"""The weights of a source as the export reads them: adapters merged."""

from typing import Any

from mllm_edge.export.checkpoint import own_lora
from mllm_edge.export.checkpoint.adapters import merge
from mllm_edge.export.checkpoint.config import load_config
from mllm_edge.export.checkpoint.quantized import check_float
from mllm_edge.export.checkpoint.safetensors import Weights, open_files, stored_types
from mllm_edge.export.checkpoint.skeleton import own_skeleton, skeleton
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.weights import weight_files

__all__ = ["empty_model", "source_weights"]


def source_weights(source: Source) -> Weights:
    """Open the weights, adapters merged; see `weight_files`, `check_float` and `adapters.merge` for the errors."""
    files = weight_files(source.folder, source.config, source.notices)
    check_float(source.folder, source.config, stored_types(files), source.notices)
    weights = own_lora.merged(open_files(files), source.config, source.folder)
    if source.adapters:
        names = skeleton(empty_model(source)) if source.in_transformers else own_skeleton(weights, source.config)
        merge(weights, source.adapters, names, source.name)
    return weights


def empty_model(source: Source) -> Any:
    """The reference model without storage: its modules and their names."""
    import torch
    from transformers import AutoModelForMultimodalLM

    with torch.device("meta"):
        return AutoModelForMultimodalLM.from_config(load_config(source))
