"""Targets of an export: which forms every component gets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from mllm_edge.errors import ExportError
from mllm_edge.graph.decoder_spec import DecoderSpec
from mllm_edge.graph.dialects.known import DIALECTS
from mllm_edge.graph.ranges import used_ranges
from mllm_edge.spec import SymbolRange, TensorSpec

__all__ = ["TARGETS", "Form", "forms"]

Dialect = Literal["contrib", "opset24", "opset17"]
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

TARGETS: Mapping[str, Dialect] = {
    "cpu": "contrib",
    "cuda": "contrib",
    "tensorrt": "opset24",
    "tensorrt-10.3": "opset17",
}
_FALLBACK = "cpu"


@dataclass(frozen=True)
class Form:
    """How the components are written for one target. `float_type` is that of inputs, hidden states and caches."""

    target: str
    float_type: ir.DataType

    @property
    def dialect(self) -> Dialect:
        return TARGETS[self.target]

    @property
    def kv_mode(self) -> Literal["in_place", "append"]:
        return DIALECTS[self.dialect].kv_mode

    def minimum(self, decoder: DecoderSpec | None = None) -> Mapping[str, str]:
        """Module name of a runtime → its lowest version that executes this form of a `decoder`, or of another graph."""
        return DIALECTS[self.dialect].minimum(decoder)

    def ranges(self, inputs: Iterable[TensorSpec], known: Mapping[str, SymbolRange]) -> Mapping[str, SymbolRange]:
        """Of the symbols of `inputs`, where engines are built of this form; else none."""
        return used_ranges(inputs, known) if self.dialect != "contrib" else {}

    def stem(self, component: str) -> str:
        """The component's file name without extensions; the fallback's files carry no target."""
        return component if self.target == _FALLBACK else f"{component}.{self.target}"


def forms(targets: Sequence[str], recipe: str, fallback: bool = True) -> tuple[Form, ...]:
    """The forms that `targets` ask for, the CPU's first: it is added unless `fallback` is False.

    Raises ExportError for an unknown target, or none, and for cuda in float32.
    """
    for target in targets:
        if target not in TARGETS:
            raise ExportError(f"unknown target {target!r}", f"known targets: {', '.join(TARGETS)}")
    wanted = [target for target in TARGETS if target in targets or (fallback and target == _FALLBACK)]
    if not wanted:
        raise ExportError("no target is named", f"known targets: {', '.join(TARGETS)}")
    if "cuda" in wanted and recipe == "fp32":
        raise ExportError(
            "target cuda has no float32 form: ONNX Runtime's CUDA kernel of GroupQueryAttention takes half precision",
            "--recipe fp16, int8 or int4",
        )
    half = _FLOAT if recipe == "fp32" else _HALF
    return tuple(Form(target, _FLOAT if target == _FALLBACK else half) for target in wanted)
