"""Decoders cut into pieces: run one after the other they are the whole, bit for bit, in every form of the weights."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.errors import BundleError
from mllm_edge.export.checkpoint.safetensors import Weights, open_weights
from mllm_edge.export.decoders.build import build_decoder
from mllm_edge.graph.builder import save_model, tensor_specs
from mllm_edge.graph.datafile import DataFile
from mllm_edge.graph.decoder_spec import DecoderSpec
from mllm_edge.runtime.onnx_file.split import Piece, partitions
from tests.decoders import test_cross_attention as cross
from tests.decoders.models import CAPACITY, CONFIGS, decoder_spec, random_model, save_checkpoint, widen_sums
from tests.decoders.test_engines import HALF, NAMES, STANDARD, WIDE

Arrays = Mapping[str, np.ndarray]


def _decoder(name: str, folder: Path) -> tuple[DecoderSpec, Weights]:
    if name == "mllama":
        model, folder = cross.tiny_mllama(folder)
        weights = open_weights(folder)
        return cross.spec_of_mllama(model, weights), weights
    if name in cross.PAIRS:
        architecture, config, specs = cross.PAIRS[name]
        cross.random_weights(architecture(config)).save_pretrained(folder)
        weights = open_weights(folder)
        return specs(cross.ConfigReader("config.json", config.to_dict(), {}), weights)[1], weights
    model = random_model(CONFIGS[name])
    save_checkpoint(model, folder)
    weights = open_weights(folder)
    spec = decoder_spec(model.config, weights)
    return replace(spec, deepstack=(0, 1)) if name == "qwen3_vl" else spec, weights


@pytest.fixture(scope="module", params=[*NAMES, *cross.PAIRS, "mllama"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DecoderSpec, Weights]:
    return _decoder(request.param, tmp_path_factory.mktemp(request.param))


def _write(
    source: tuple[DecoderSpec, Weights], folder: Path, dialect: str, recipe: str = "fp32", wide: bool = False
) -> tuple[Path, dict[str, np.ndarray]]:
    """The graph's file, and an array for each input. `wide`: in half precision, with float32 sums between layers."""
    with DataFile(folder / "decoder.onnx.data") as data:
        graph = build_decoder(*source, RECIPES[recipe], data, dialect, HALF if wide else WIDE)
    if wide:
        widen_sums(graph)
    save_model(graph, folder / "decoder.onnx")
    batch = 2 if dialect == "opset24" else 1
    sizes = {"batch": batch, "sequence": 5, "rows": 2, "past": 3, "length": 8, "capacity": CAPACITY, "features": 6}
    rng, feeds = np.random.default_rng(0), {}
    for tensor in tensor_specs(graph.graph.inputs):
        shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        values = rng.normal(size=shape) if tensor.dtype.startswith("float") else np.full(shape, 3)
        feeds[tensor.name] = values.astype(tensor.dtype)
    return folder / "decoder.onnx", feeds


def _run(model: bytes, folder: Path, feeds: Arrays) -> dict[str, np.ndarray]:
    """Operator by operator: ONNX Runtime would fuse the last of one piece with the first of the next."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {i.name: feeds[i.name] for i in session.get_inputs()}), strict=True))


def _chain(pieces: tuple[Piece, ...], folder: Path, feeds: Arrays) -> dict[str, np.ndarray]:
    """All outputs; a piece is given no more than it says."""
    found: dict[str, np.ndarray] = {}
    for piece in pieces:
        given = {name: feeds[name] for name in piece.inputs}
        if piece.enters is not None:
            given[piece.enters.name] = found.pop(piece.enters.name)
            assert given[piece.enters.name].dtype == piece.enters.dtype
            assert given[piece.enters.name].shape == feeds["inputs_embeds"].shape
        results = _run(piece.model, folder, given)
        assert set(results) == piece.outputs | ({piece.leaves.name} if piece.leaves else set())
        found |= results
    return found


def _check_weights(whole: onnx.GraphProto, pieces: tuple[Piece, ...]) -> None:
    """Every piece holds the weights that its nodes read, as they were, and no others."""
    expected = {tensor.name: tensor.SerializeToString() for tensor in whole.initializer}
    seen = set()
    for piece in pieces:
        graph = onnx.load_from_string(piece.model).graph
        read = {name for node in graph.node for name in node.input}
        found = {tensor.name: tensor.SerializeToString() for tensor in graph.initializer}
        assert found.items() <= expected.items()
        assert set(found) == read & set(expected)
        seen |= set(found)
    assert seen == set(expected)


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("dialect", STANDARD)
def test_pieces_are_the_whole(source: tuple[DecoderSpec, Weights], dialect: str, recipe: str, tmp_path: Path) -> None:
    path, feeds = _write(source, tmp_path, dialect, recipe)
    whole = onnx.load(path, load_external_data=False)
    expected = _run(path.read_bytes(), tmp_path, feeds)
    for count, pieces in enumerate(itertools.islice(partitions(path), 3), 1):
        assert len(pieces) == count
        found = _chain(pieces, tmp_path, feeds)
        assert set(found) == set(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        _check_weights(whole.graph, pieces)
        assert set().union(*(piece.inputs for piece in pieces)) == {i.name for i in whole.graph.input}
        # The last of them has all that follows the choice of rows.
        assert not any("logits_indices" in piece.inputs or "logits" in piece.outputs for piece in pieces[:-1])
    assert count == 3


@pytest.mark.parametrize("dialect", STANDARD)
def test_a_wider_stream_passes_as_it_is(dialect: str, tmp_path: Path) -> None:
    path, feeds = _write(_decoder("llama", tmp_path), tmp_path, dialect, "fp16", wide=True)
    expected = _run(path.read_bytes(), tmp_path, feeds)
    _, pieces = itertools.islice(partitions(path), 2)
    assert pieces[0].leaves == pieces[1].enters
    assert pieces[0].leaves is not None
    assert pieces[0].leaves.dtype == "float32"
    found = _chain(pieces, tmp_path, feeds)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- where it is cut
def _branches(folder: Path, widths: list[int], head: int) -> Path:
    """x + B·A·x for each width, then the chosen rows, scaled, times a head; float32 weights of 2·4·width values for a
    branch, of 4·(1 + head) behind all of them."""
    nodes, stream = [helper.make_node("Identity", ["inputs_embeds"], ["begin"])], "begin"
    weights = {"scale": (4, 1), "head": (4, head)}
    for i, width in enumerate(widths):
        weights |= {f"a{i}": (4, width), f"b{i}": (width, 4)}
        nodes.append(helper.make_node("MatMul", [stream, f"a{i}"], [f"inner{i}"]))
        nodes.append(helper.make_node("MatMul", [f"inner{i}", f"b{i}"], [f"branch{i}"]))
        nodes.append(helper.make_node("Add", [stream, f"branch{i}"], [f"stream{i}"]))
        stream = f"stream{i}"
    nodes.append(helper.make_node("Gather", [stream, "logits_indices"], ["rows"], axis=1))
    nodes.append(helper.make_node("Mul", ["rows", "scale"], ["scaled"]))
    nodes.append(helper.make_node("MatMul", ["scaled", "head"], ["logits"]))
    inputs = [
        helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["batch", "sequence", 4]),
        helper.make_tensor_value_info("logits_indices", TensorProto.INT64, ["rows"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "rows", head])]
    tensors = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, tensors)), folder / "g.onnx")
    return folder / "g.onnx"


@pytest.mark.parametrize(("widths", "head"), [([3, 3, 3, 3], 2), ([3, 1, 4, 1, 5, 9, 2, 6], 5), ([2, 2, 2], 40)])
def test_the_heaviest_piece_is_as_light_as_can_be(widths: list[int], head: int, tmp_path: Path) -> None:
    found = list(partitions(_branches(tmp_path, widths, head)))
    assert len(found) == len(widths) + 1
    sizes, end = [32 * width for width in widths], 16 * (1 + head)
    for count, pieces in enumerate(found, 1):
        best = min(
            max(sum([*sizes, end][a:b]) for a, b in itertools.pairwise([0, *cuts, len(sizes) + 1]))
            for cuts in itertools.combinations(range(1, len(sizes) + 1), count - 1)
        )
        assert max(piece.weight_bytes for piece in pieces) == best
        assert sum(piece.weight_bytes for piece in pieces) == sum(sizes) + end
        assert [piece.leaves for piece in pieces[:-1]] == [piece.enters for piece in pieces[1:]]
        assert pieces[0].enters is pieces[-1].leaves is None


def test_a_graph_with_no_stream_is_one_piece(tmp_path: Path) -> None:
    path = _branches(tmp_path, [2, 2], 3)
    model = onnx.load(path)
    for node in model.graph.node:
        node.input[:] = ["pixels" if name == "inputs_embeds" else name for name in node.input]
    model.graph.input[0].name = "pixels"
    onnx.save(model, path)
    assert [len(pieces) for pieces in partitions(path)] == [1]


def test_an_output_beside_the_stream_is_not_lost(tmp_path: Path) -> None:
    path = _branches(tmp_path, [2, 2], 3)
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("Identity", ["logits_indices"], ["beside"]))
    model.graph.output.append(helper.make_tensor_value_info("beside", TensorProto.INT64, ["rows"]))
    onnx.save(model, path)
    assert [len(pieces) for pieces in partitions(path)] == [1]


def test_a_damaged_graph(tmp_path: Path) -> None:
    path = _branches(tmp_path, [2, 2], 3)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BundleError, match="damaged"):
        list(partitions(path))
