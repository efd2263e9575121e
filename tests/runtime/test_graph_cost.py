"""Bytes and arithmetic of graphs, against figures known by hand and against what onnx reads."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mllm_edge.errors import BundleError
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.onnx_file.cost import GraphCost, graph_cost, read_graph

S, K, N = 10, 64, 32


def cost(folder: Path, nodes: list, weights: dict, rows: int = S, pairs: float = 55.0, **sizes: int) -> GraphCost:
    """Of a graph that takes x [s, K]; weights are arrays."""
    inits = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["s", K])
    y = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    path = folder / "graph.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], inits)), path)
    return graph_cost(read_graph(path), sizes, rows, pairs)


def node(kind: str, inputs: str, output: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


FLOAT = np.ones((K, N), np.float32)
PACKED = {"w": np.ones((N, 1, 32), np.uint8), "scale": np.ones((N, 1), np.float32)}
BYTE, SCALES = np.ones((K, N), np.int8), np.ones(N, np.float32)


@pytest.mark.parametrize(
    ("nodes", "weights", "nbytes", "kind"),
    [
        ([node("MatMul", "x w")], {"w": FLOAT}, 4 * K * N, "float32"),
        ([node("MatMul", "x w")], {"w": FLOAT.astype(np.float16)}, 2 * K * N, "float16"),
        (
            [node("Gemm", "x w b", transB=1)],
            {"w": FLOAT.T.copy(), "b": np.ones(N, np.float32)},
            4 * (K * N + N),
            "float32",
        ),
        ([node("Transpose", "w", "t"), node("MatMul", "x t")], {"w": FLOAT.T.copy()}, 4 * K * N, "float32"),
        (
            [node("MatMulNBits", "x w scale", K=K, N=N, bits=4, block_size=64, accuracy_level=4)],
            PACKED,
            N * 32 + 4 * N,
            "int8",
        ),
        ([node("MatMulNBits", "x w scale", K=K, N=N, bits=4, block_size=64)], PACKED, N * 32 + 4 * N, "float32"),
        ([node("DynamicQuantizeMatMul", "x w s")], {"w": BYTE, "s": SCALES}, K * N + 4 * N, "int8"),
        ([node("MatMulInteger", "x w")], {"w": BYTE}, K * N, "int8"),
        ([node("MatMulIntegerToFloat", "x w a s")], {"w": BYTE, "a": np.ones((), np.float32)}, K * N + 4, "int8"),
        (
            [node("QLinearMatMul", "x a z w s z a z")],
            {"a": np.ones((), np.float32), "z": np.zeros((), np.uint8), "w": BYTE, "s": SCALES},
            K * N + 4 * N + 4 + 1,
            "int8",
        ),
        (
            [node("DequantizeLinear", "w s", "d", axis=1), node("MatMul", "x d")],
            {"w": BYTE, "s": SCALES.astype(np.float16)},
            K * N + 2 * N,
            "float16",
        ),
    ],
)
def test_a_product_with_weights(tmp_path: Path, nodes: list, weights: dict, nbytes: int, kind: str) -> None:
    assert cost(tmp_path, nodes, weights, s=S) == GraphCost(nbytes, {kind: 2.0 * K * N * S})


def test_rows_that_the_graph_does_not_tell_are_those_given(tmp_path: Path) -> None:
    assert cost(tmp_path, [node("MatMul", "x w")], {"w": FLOAT}, rows=7).flops == {"float32": 2.0 * K * N * 7}


def test_a_convolution_counts_places(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((16, 3, 8, 8), np.float32), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tiles", 3, 32, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tiles", 16, 4, 4])
    graph = helper.make_graph([node("Conv", "x w", strides=[8, 8])], "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph), tmp_path / "conv.onnx")
    found = graph_cost(read_graph(tmp_path / "conv.onnx"), {"tiles": 5}, 0, 0)
    assert found == GraphCost(4 * 16 * 192, {"float32": 2.0 * 16 * 192 * 16 * 5})


FUSED = [node("GroupQueryAttention", "x k v", "a", num_heads=4, kv_num_heads=2), node("MatMul", "a w")]
SPELT = [
    node("MatMul", "x k", "scores"),
    node("Softmax", "scores", "weights"),
    node("MatMul", "weights v", "heads"),
    node("Reshape", "heads shape", "a"),
    node("MatMul", "a w"),
]
IN_PARTS = [  # the cache's keys and values, and the new ones
    node("MatMul", "x k", "scores.past"),
    node("MatMul", "x new_k", "scores.new"),
    node("Concat", "scores.past scores.new", "scores", axis=-1),
    node("Softmax", "scores", "weights"),
    helper.make_node("Split", ["weights", "lengths"], ["weights.past", "weights.new"], axis=-1),
    node("MatMul", "weights.past v", "sum.past"),
    node("MatMul", "weights.new new_v", "sum.new"),
    node("Add", "sum.past sum.new", "a"),
    node("MatMul", "a w"),
]


@pytest.mark.parametrize("nodes", [FUSED, SPELT, IN_PARTS])
def test_attention_counts_the_pairs_of_tokens(tmp_path: Path, nodes: list) -> None:
    # Scores and sums: each 2 · width a pair; the width is what the output's projection takes.
    expected = 2.0 * K * N * S + 4.0 * K * 55
    assert cost(tmp_path, nodes, {"w": FLOAT}, s=S).flops == {"float32": expected}


def test_behind_the_gathering_only_chosen_rows_are_projected(tmp_path: Path) -> None:
    square = np.ones((K, K), np.float32)
    nodes = [node("MatMul", "x a", "h"), node("GatherND", "h i", "r"), node("Tanh", "r", "n"), node("MatMul", "n w")]
    found = cost(tmp_path, nodes, {"a": square, "w": FLOAT}, s=S)
    assert found.flops == {"float32": 2.0 * S * (K * K + K * N)}  # how many rows: not told
    inits = [numpy_helper.from_array(square, "a"), numpy_helper.from_array(FLOAT, "w")]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in (("x", ["s", K]), ("y", None)))
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], inits)), tmp_path / "g.onnx")
    found = graph_cost(read_graph(tmp_path / "g.onnx"), {"s": S, "rows": 1}, S, 0)
    assert found.flops == {"float32": 2.0 * (S * K * K + K * N)}


def test_of_a_table_only_the_rows_looked_up_are_read(tmp_path: Path) -> None:
    weights = {"table": np.ones((1000, K), np.float32), "unused": FLOAT}
    assert cost(tmp_path, [node("Gather", "table x")], weights).weight_bytes == 4 * S * K


def test_a_damaged_graph(tmp_path: Path) -> None:
    for content in (b"", b"\x3a\xff", b"\x07"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(BundleError, match=r"bad\.onnx: the graph is damaged"):
            read_graph(tmp_path / "bad.onnx")


@pytest.mark.parametrize("recipe", ["int4", "fp32"])
def test_bytes_agree_with_the_files(tiny_checkpoint: Path, tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "bundle"
    export(str(tiny_checkpoint), out, recipe_name=recipe)
    for path in sorted(out.glob("*.onnx")):
        model = onnx.load(path, load_external_data=False).graph
        used = {name for n in model.node for name in n.input}
        gathered = {n.input[0] for n in model.node if n.op_type == "Gather"}
        known = [i for i in model.initializer if i.name in used - gathered]
        external = sum(int(e.value) for i in known for e in i.external_data if e.key == "length")
        inline = sum(len(numpy_helper.to_array(i).tobytes()) for i in known if not i.external_data)
        found = graph_cost(read_graph(path), {}, 0, 0).weight_bytes
        assert found == external + inline
        stored = (path.parent / f"{path.name}.data").stat().st_size
        # Weights start at multiples of a page; norms and biases may lie in the graph itself.
        assert stored - 4096 * len(known) <= found <= stored + path.stat().st_size


def test_the_dialects_cost_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export(str(tiny_checkpoint), out, recipe_name="fp32", targets=["cpu", "tensorrt", "tensorrt-10.3"])
    sizes = {"batch": 1, "sequence": 1, "rows": 1}
    graphs = [read_graph(out / f"decoder{suffix}.onnx") for suffix in ("", ".tensorrt", ".tensorrt-10.3")]
    fused, *others = (graph_cost(graph, sizes, 1, pairs=50).flops for graph in graphs)
    assert others == [fused, fused]


def test_each_row_meets_one_matrix_of_a_stack(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [3, S, d]) for n, d in (("x", K), ("y", N)))
    weight = numpy_helper.from_array(np.ones((3, K, N), np.float32), "w")
    graph = helper.make_graph([node("MatMul", "x w")], "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph), tmp_path / "graph.onnx")
    found = graph_cost(read_graph(tmp_path / "graph.onnx"), {}, S, 0.0)
    assert found == GraphCost(4 * 3 * K * N, {"float32": 2.0 * 3 * S * K * N})
