"""What a family hands to the pipeline: everything the export needs to know about one checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mllm_edge.export.checkpoint.texts import Texts
from mllm_edge.graph.decoder_spec import DecoderSpec
from mllm_edge.spec import ModelSpec, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Plan", "TracedComponent"]


@dataclass(frozen=True)
class TracedComponent:
    """A component made from a thin torch module, traced without weights.

    A parameter `p` of the module is read from the checkpoint tensor `prefix + p`, unless `derived` computes it.
    Dimensions that are words may have any size, the same word the same one. Inputs of dtype float32 take the graph's
    float type, others (int64) their own.
    """

    name: str
    module: "Callable[[], torch.nn.Module]"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    prefix: str
    derived: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A checkpoint, understood. `embedding` names the token embedding; `ignored` the tensors rightly left out."""

    model: ModelSpec
    decoder: DecoderSpec
    traced: tuple[TracedComponent, ...]
    embedding: str
    texts: Texts
    ignored: tuple[str, ...] = ()
