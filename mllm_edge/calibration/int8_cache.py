"""The decoder's cache in 8 bits: keys and values are held as int8, each channel of a head with a scale of its own."""

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from mllm_edge.calibration.findings import Findings
from mllm_edge.errors import RecipeError
from mllm_edge.graph.scales import smallest
from mllm_edge.spec import Variant, is_state, state_input, state_names, state_output

__all__ = ["MINIMUM", "check_cache", "largest", "quantize_cache", "rotated"]

# Lowest version of ONNX Runtime whose GroupQueryAttention was seen to keep int8 on the CPU.
MINIMUM = {"onnxruntime": "1.31"}
# Ranges over what calibration saw: what goes beyond is clipped, which costs more than the steps getting wider by this.
_HEADROOM = 1.5
_K_SCALE, _INPUTS = 12, 14  # of GroupQueryAttention
_INT8, _HALF, _FLOAT = ir.DataType.INT8, ir.DataType.FLOAT16, ir.DataType.FLOAT


def check_cache(recipe: str, dialects: Mapping[str, str]) -> None:
    """Raise RecipeError when one of the decoder's targets, with its dialect, cannot keep its cache in 8 bits."""
    for target, dialect in dialects.items():
        if dialect == "opset24":
            raise RecipeError(
                f"recipe {recipe}: kv is int8, and target {target} updates its cache in place (TensorScatter), which "
                "TensorRT does in float only",
                "use a bundle for targets cpu and tensorrt-10.3, whose caches can be int8, or leave kv out",
            )


def rotated(variant: Variant) -> tuple[int, ...]:
    """How many elements of a head each rotary embedding of a decoder turns."""
    widths = {t.name: 2 * int(t.shape[-1]) for t in variant.inputs if t.name.partition(".")[0] == "cos"}
    return tuple(sorted(set(widths.values())))


def largest(rows: np.ndarray, widths: Collection[int] = ()) -> np.ndarray:
    """The largest magnitudes [heads, D] that keys or values [batch, heads, tokens, D] have.

    `widths`: for keys, how many elements are turned (`rotated`). Two that are turned together reach the length of both
    at some position, if not at those of `rows`: slow pairs hardly move in a short text.
    """
    found = np.abs(rows).max(axis=(0, 2)).astype(np.float32)
    for width in widths:
        half = width // 2
        lengths = np.hypot(rows[..., :half], rows[..., half:width]).max(axis=(0, 2))
        found[:, :width] = np.maximum(found[:, :width], np.tile(lengths, 2))
    return found


def quantize_cache(graph: ir.Graph, dialect: str, findings: Findings) -> None:
    """Let a decoder graph, changed in place, keep its cache as int8 over the ranges in `findings`; without any it stays
    as it is."""
    past = next((v for v in graph.inputs if is_state(v.name or "", "growing")), None)
    kind = _HALF if past is not None and past.dtype == _HALF else _FLOAT
    scales = {name: _scale(peaks, kind.numpy()) for name, peaks in findings.cache().items()}
    write = _group_query_attention if dialect == "contrib" else _appended
    if not scales:
        return
    for layer in sorted({int(name.split(".")[1]) for name in scales}):
        write(graph, {name: scales[state_output("growing", name)] for name in state_names("growing", layer)})
    for value in (*graph.inputs, *graph.outputs):
        if is_state(value.name or "", "growing"):
            value.type = ir.TensorType(_INT8)


def _scale(peaks: np.ndarray, kind: np.dtype) -> np.ndarray:
    """What code 1 stands for, [heads, D] float32; codes reach from −127 to 127, somewhat beyond the `peaks`. Both the
    scale and its inverse can be stored in `kind`."""
    return np.where(peaks > 0, np.maximum(_HEADROOM * peaks / 127, smallest(kind)), 1.0).astype(np.float32)


def _group_query_attention(graph: ir.Graph, scales: Mapping[str, np.ndarray]) -> None:
    """The operator keeps int8 itself; `scales`: of a layer's keys, then of its values."""
    present = next(v for v in graph.outputs if v.name == state_output("growing", next(iter(scales))))
    node = present.producer()
    assert node is not None
    node.resize_inputs(_INPUTS)
    for i, (name, found) in enumerate(scales.items()):
        scale = _constant(graph, f"{state_output('growing', name)}.scale", found[None, :, None, :])
        node.replace_input_with(_K_SCALE + i, scale)
        node.attributes[f"{'kv'[i]}_quant_type"] = ir.AttrString(f"{'kv'[i]}_quant_type", "PER_CHANNEL")
    node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)


def _appended(graph: ir.Graph, scales: Mapping[str, np.ndarray]) -> None:
    """The past is dequantized where it is read; new rows are used as they are, and quantized for the cache.

    Channels are scaled by factors around one quantization of scale 1: TensorRT takes activations with one scale.
    """
    for name, found in scales.items():
        past = next(v for v in graph.inputs if v.name == state_input("growing", name))
        present = next(v for v in graph.outputs if v.name == state_output("growing", name))
        kind = _HALF if past.dtype == _HALF else _FLOAT
        numpy_type = kind.numpy()
        one = _constant(graph, f"cache.one.{kind.name.lower()}", np.array(1, numpy_type))
        zero = _constant(graph, "cache.zero", np.array(0, np.int8))
        scale = _constant(graph, f"{present.name}.scale", found.astype(numpy_type))
        inverse = _constant(graph, f"{present.name}.inverse", (1 / found).astype(numpy_type))
        _read(graph, past, [one, zero, scale])
        _write(graph, present, [one, zero, inverse])


def _read(graph: ir.Graph, past: ir.Value, constants: list[ir.Value]) -> None:
    one, zero, scale = constants
    readers = list(past.uses())
    codes = _node("DequantizeLinear", [past, one, zero], f"{past.name}.codes")
    values = _node("Mul", [codes.outputs[0], scale], f"{past.name}.float")
    graph.insert_before(next(iter(graph)), [codes, values])
    for reader, index in readers:
        if reader.op_type != "Shape":
            reader.replace_input_with(index, values.outputs[0])


def _write(graph: ir.Graph, present: ir.Value, constants: list[ir.Value]) -> None:
    one, zero, inverse = constants
    name, maker = present.name or "", present.producer()
    assert maker is not None
    present.name = f"{name}.float"
    present.type = ir.TensorType(one.dtype) if one.dtype else None
    codes = _node("Mul", [present, inverse], f"{name}.codes")
    stored = _node("QuantizeLinear", [codes.outputs[0], one, zero], name)
    stored.outputs[0].shape = present.shape
    graph.insert_after(maker, [codes, stored])
    graph.outputs[list(graph.outputs).index(present)] = stored.outputs[0]


def _node(kind: str, inputs: list[ir.Value], name: str) -> ir.Node:
    node = ir.node(kind, inputs, name=name)
    node.outputs[0].name = name
    return node


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]
