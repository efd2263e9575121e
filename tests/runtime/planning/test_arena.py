"""The arena without memory, and what graphs take of it, against figures known by hand and ONNX Runtime's own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mllm_edge.runtime.onnx_file.cost import read_graph
from mllm_edge.runtime.onnx_file.expressions import dimension
from mllm_edge.runtime.planning.activations import arena_bytes
from mllm_edge.runtime.planning.arena import Arena
from mllm_edge.runtime.planning.weights import weights_of

MEGA = 1 << 20
ROWS, WIDTH = 1024, 1024  # 4 MiB in float32


def test_parts_are_cut_joined_and_used_again() -> None:
    arena = Arena()
    first, second = arena.allocate(300 << 10), arena.allocate(300 << 10)
    assert arena.touched == 600 << 10, "of one region"
    arena.free(first)
    assert arena.allocate(300 << 10) == first
    arena.free(first)
    arena.free(second)  # all of the region is free again
    assert arena.allocate(MEGA) == first
    assert arena.touched == MEGA


def test_regions_double_and_a_part_of_less_than_half_is_not_cut() -> None:
    arena = Arena()
    arena.allocate(12 * MEGA)  # a region of 16 MiB, all of it this one's
    arena.allocate(3 * MEGA)  # so a second region comes, of 32
    arena.allocate(20 * MEGA)  # of which 29 are left: given whole
    arena.allocate(6 * MEGA)  # a third one
    assert arena.touched == (12 + 3 + 20 + 6) * MEGA
    assert arena.allocate(0) == 0
    arena.free(0)


@pytest.mark.parametrize(
    ("told", "found"),
    [(7, 7), ("n", 5), ("4*n", 20), ("(n//2) + 1", 3), ("Max(1, n - 9)", 1), ("m", None), ("n**2", None), ("", None)],
)
def test_dimensions_told_as_formulas(told: int | str, found: int | None) -> None:
    assert dimension(told, {"n": 5}) == found
    assert dimension("__import__('os').getpid()", {"n": 5}) is None


def chain(path: Path, kinds: list[str], dtype: type = np.float32) -> Path:
    """x [n, WIDTH] through operators; a product's weight is square."""
    nodes, weights, before = [], [], "x"
    for i, kind in enumerate(kinds):
        names = [before]
        if kind == "MatMul":
            weights.append(numpy_helper.from_array(np.zeros((WIDTH, WIDTH), dtype), f"w{i}"))
            names.append(f"w{i}")
        if kind == "Cast":  # of the weight of the product behind it
            weights.append(numpy_helper.from_array(np.zeros((WIDTH, WIDTH), np.float16), f"h{i}"))
            nodes.append(helper.make_node("Cast", [f"h{i}"], [f"w{i}"], to=TensorProto.FLOAT))
            kind, names = "MatMul", [before, f"w{i}"]
        nodes.append(helper.make_node(kind, names, [f"y{i}"]))
        before = f"y{i}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])
    y = helper.make_tensor_value_info(before, TensorProto.FLOAT, ["n", WIDTH])
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def test_tensors_take_turns_in_buffers(tmp_path: Path) -> None:
    one = read_graph(chain(tmp_path / "one.onnx", ["MatMul"]))
    two = read_graph(chain(tmp_path / "two.onnx", ["MatMul"] * 2))
    six = read_graph(chain(tmp_path / "six.onnx", ["MatMul"] * 6))
    assert arena_bytes(one, [{"n": ROWS}]) == 4 * MEGA
    assert arena_bytes(two, [{"n": ROWS}]) == arena_bytes(six, [{"n": ROWS}]) == 8 * MEGA
    in_place = read_graph(chain(tmp_path / "place.onnx", ["MatMul", "Relu", "Sigmoid", "Tanh"]))
    assert arena_bytes(in_place, [{"n": ROWS}]) == 4 * MEGA
    assert arena_bytes(six, [{"n": ROWS}] * 50) == 8 * MEGA
    assert arena_bytes(six, [{"n": 1}, {"n": ROWS}]) < 9 * MEGA


def test_what_is_made_of_weights_is_no_activation(tmp_path: Path) -> None:
    half = read_graph(chain(tmp_path / "half.onnx", ["Cast", "Cast"]))
    assert arena_bytes(half, [{"n": 1}]) < 64 << 10
    single = read_graph(chain(tmp_path / "single.onnx", ["MatMul"] * 2))
    stored = 8 * MEGA
    assert stored < weights_of(single).resident < stored + 2 * MEGA
    assert stored < weights_of(half).resident < stored + 2 * MEGA, "single precision when it is opened"
    assert weights_of(single).opening == 4 * MEGA


# In a process of its own: where memory was freed before, the arena takes that, and the process grows by less.
RUN = """
import sys
import numpy as np
import onnxruntime
from mllm_edge.runtime.machine.cpu import resident

path, rows, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = onnxruntime.SessionOptions()
options.enable_mem_pattern, options.intra_op_num_threads = False, 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
session.run(None, {"x": np.zeros((1, width), np.float32)})
x = np.ones((rows, width), np.float32)
before = resident()
binding = session.io_binding()
binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
binding.bind_output("y9", "cpu")
session.run_with_iobinding(binding)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc")
def test_the_engine_touches_as_much(tmp_path: Path) -> None:
    """Ten products of 16 MiB each, with what is added in between."""
    path, rows = chain(tmp_path / "g.onnx", ["MatMul", "Softmax"] * 5), 4 * ROWS
    command = [sys.executable, "-c", RUN, str(path), str(rows), str(WIDTH)]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    planned = arena_bytes(read_graph(path), [{"n": 1}, {"n": rows}])
    assert planned == pytest.approx(taken, rel=0.15)
