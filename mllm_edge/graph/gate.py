"""What a graph for a GPU may hold, checked before it ships.

TensorRT's ONNX parser accepts two things that it then gets wrong without an error (seen in TensorRT for RTX 1.7): it
drops `nonpad_kv_seqlen`, and it reads `is_causal` as aligned to the upper left, which is not what a cache needs. Such a
graph builds, runs and is wrong. Others it refuses on the device, after minutes. Both are found here, by reading. ONNX
Runtime moves a node without a CUDA kernel to the CPU without a word, with copies of its inputs and outputs at
each run: that is found here, too.
"""

import json
from functools import cache
from importlib.resources import files

import onnx_ir as ir

from mllm_edge.errors import ExportError
from mllm_edge.spec import is_state

__all__ = ["check_cuda_graph", "check_graph", "tensorrt_10_3_operators"]

# Standard operators newer than the table of TensorRT 10.3, which TensorRT ≥ 10.15 has as layers of its own.
_OPSET24 = {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
# Past the scale there are inputs and attributes of Attention that TensorRT drops, misreads or refuses.
_ATTENTION_ATTRIBUTES = {"scale"}
_ATTENTION_INPUTS = 4


@cache
def tensorrt_10_3_operators() -> frozenset[str]:
    """Operators of the default domain that TensorRT 10.3 documents as supported; the file names its source."""
    text = files("mllm_edge.graph").joinpath("tensorrt_10_3.json").read_text(encoding="utf-8")
    return frozenset(json.loads(text)["operators"])


# ONNX Runtime makes an initializer of the one and a Cast of the other when it loads a graph.
_RESOLVED = {"Constant", "CastLike"}


@cache
def _cuda_kernels() -> tuple[frozenset[str], dict[str, dict[str, str]]]:
    """Operators that ONNX Runtime has half-precision CUDA kernels of, and operator → index → the input's name for
    inputs that these kernels refuse; the file names its source."""
    known = json.loads(files("mllm_edge.graph").joinpath("onnxruntime_cuda.json").read_text(encoding="utf-8"))
    return frozenset(known["operators"]), known["refused_inputs"]


def check_cuda_graph(model: ir.Model) -> None:
    """Raise ExportError when a half-precision graph of the contrib dialect holds what ONNX Runtime has no CUDA kernel
    for."""
    operators, refused = _cuda_kernels()
    for node in model.graph:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        if name in _RESOLVED:
            continue
        if name not in operators:
            raise _no_kernel(node, name)
        for index, part in refused.get(node.op_type, {}).items():
            if len(node.inputs) > int(index) and node.inputs[int(index)] is not None:
                raise _no_kernel(node, f"{name} with {part}")
        if node.op_type == "GroupQueryAttention" and "causal" in node.attributes:
            raise _no_kernel(node, f"{name} with causal = 0")


def _no_kernel(node: ir.Node, what: str) -> ExportError:
    return ExportError(
        f"target cuda: node {node.name} is {what}, which ONNX Runtime has no half-precision CUDA kernel for",
        "export for --target tensorrt, or tensorrt-10.3 for an older TensorRT",
    )


def check_graph(model: ir.Model, dialect: str) -> None:
    """Raise ExportError when a graph of a standard dialect holds what its TensorRT would refuse or misread."""
    cached = any(is_state(value.name or "") for value in model.graph.inputs)
    known = tensorrt_10_3_operators() | (_OPSET24 if dialect == "opset24" else frozenset())
    for node in model.graph:
        if node.domain or node.op_type not in known:
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise ExportError(
                f"dialect {dialect}: node {node.name} is {name}, which its oldest TensorRT does not have",
                "write it with older operators, or use another dialect",
            )
        if node.op_type == "Attention":
            _check_attention(node, dialect, cached)
        if node.op_type == "TensorScatter":
            _check_scatter(node, dialect)


def _check_attention(node: ir.Node, dialect: str, cached: bool) -> None:
    extra = sorted(set(node.attributes) - _ATTENTION_ATTRIBUTES)
    if extra:
        raise _misread(node, dialect, f"attribute {extra[0]}")
    if "scale" not in node.attributes:
        raise _misread(node, dialect, "no scale")
    if len(node.inputs) > _ATTENTION_INPUTS:
        raise _misread(node, dialect, f"{len(node.inputs)} inputs: a past, or nonpad_kv_seqlen")
    # Without a cache, everything may see everything.
    if cached and (len(node.inputs) < _ATTENTION_INPUTS or node.inputs[3] is None):
        raise _misread(node, dialect, "no attention_bias")
    if len([output for output in node.outputs if output.name]) != 1:
        raise _misread(node, dialect, "more than one output")


def _check_scatter(node: ir.Node, dialect: str) -> None:
    past, present = node.inputs[0], node.outputs[0]
    if past is None or not past.is_graph_input() or not present.is_graph_output():
        raise _misread(node, dialect, "a cache that is not directly an input and an output of the graph")


def _misread(node: ir.Node, dialect: str, what: str) -> ExportError:
    return ExportError(
        f"dialect {dialect}: node {node.name} ({node.op_type}) has {what}, which TensorRT drops, misreads or refuses",
        "express masks as an additive attention_bias over the slice of the cache that is in use",
    )
