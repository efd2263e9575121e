"""Rewriting symbolic dimensions byte by byte, compared with the onnx package."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.onnx_file.dimensions import fix_dimensions


def _fixed(model: onnx.ModelProto, sizes: dict[str, int]) -> onnx.ModelProto:
    """The same with the package's own means."""
    expected = onnx.ModelProto.FromString(model.SerializeToString())
    graph = expected.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    return expected


def _model() -> onnx.ModelProto:
    shapes = {"a": ["batch", 3, "capacity"], "b": [], "c": ["capacity", "capacity", None], "d": ["x" * 200, 2]}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()]
    values[0].type.tensor_type.shape.dim[2].denotation = "DATA_CHANNEL"
    values[0].doc_string = "capacity " * 40
    nodes = [helper.make_node("Concat", ["a", "a"], ["e"], axis=0, name="capacity")]
    outputs = [helper.make_tensor_value_info("e", TensorProto.FLOAT16, ["batch", 3, "capacity"])]
    weights = [helper.make_tensor("capacity", TensorProto.FLOAT, [2], [1.5, 2.5])]
    graph = helper.make_graph(nodes, "capacity", values, outputs, weights, value_info=[outputs[0]])
    return helper.make_model(graph)


@pytest.mark.parametrize("size", [1, 127, 128, 300, 131072])
def test_symbols_become_numbers(size: int) -> None:
    sizes = {"capacity": size, "x" * 200: 7}
    found = onnx.load_from_string(fix_dimensions(_model().SerializeToString(), sizes))
    assert found == _fixed(_model(), sizes)
    assert [d.dim_value for d in found.graph.input[0].type.tensor_type.shape.dim] == [0, 3, size]


def test_what_is_not_named_stays() -> None:
    data = _model().SerializeToString()
    assert fix_dimensions(data, {}) == data
    assert fix_dimensions(data, {"other": 5}) == data


def test_a_real_decoder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(str(tiny_checkpoint), out, targets=["tensorrt"], recipe_name="fp16", verify_mode="off")
    bundle = Bundle.load(out)
    data = bundle.listed(bundle.variant("decoder", "tensorrt").file).read_bytes()
    fixed = fix_dimensions(data, {"capacity": 640})
    assert onnx.load_from_string(fixed) == _fixed(onnx.load_from_string(data), {"capacity": 640})
    assert b"capacity" not in fixed


@pytest.mark.parametrize("data", [b"\x3a\x7f", b"\x3b\x00", b"\x3a\x02\x5a\x05", b"\x3a\x80", b"no graph"])
def test_damaged_graphs(data: bytes) -> None:
    with pytest.raises(BackendError, match="damaged"):
        fix_dimensions(data, {"capacity": 8})
