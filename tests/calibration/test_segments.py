"""Pieces of a graph, run one after another, compute what the whole graph does."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.linears import find_groups, find_layers
from mllm_edge.calibration.segments import Segment, cut, extract
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.prompt.tables import table_inputs
from tests.tiny import save_tiny_idefics3, save_tiny_qwen2_vl


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_idefics3(folder)
    out = tmp_path_factory.mktemp("bundle") / "fp32"
    export(str(folder), out, recipe_name="fp32", verify_mode="off")
    return out


def run(model: ir.Model, folder: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    path = folder / "piece.onnx"
    ir.save(model, path, external_data="piece.onnx.data")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    given = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


@pytest.fixture(scope="module")
def grid_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose vision encoder has several inputs."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_qwen2_vl(folder)
    out = tmp_path_factory.mktemp("bundle") / "fp32"
    export(str(folder), out, recipe_name="fp32", verify_mode="off")
    return out


def encoder_inputs(bundle: Path) -> dict[str, np.ndarray]:
    random, image = np.random.default_rng(0), Bundle.load(bundle).manifest.model.image
    assert image is not None
    pixels = random.normal(size=(6, *image.shape)).astype(np.float32)
    return {"pixel_values": pixels, **table_inputs(image, 2, 3, {})}


@pytest.mark.parametrize("most_bytes", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("kind", ["bundle", "grid_bundle"])
def test_pieces_give_the_inputs_of_every_layer(
    kind: str, tmp_path: Path, most_bytes: int, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(kind)
    model = ir.load(bundle / "vision_encoder.onnx")
    layers = find_layers(model.graph)
    record = [group.x.name or "" for group in find_groups(layers)]
    inputs = encoder_inputs(bundle)
    whole = run(extract(model, Segment((), (), ()), record, {}), tmp_path, inputs)
    segments = cut(model.graph, most_bytes)
    assert [name for s in segments for name in s.layers] == [layer.name for layer in layers]
    assert (len(segments) > 2) == (most_bytes < 1 << 30)
    values = dict(inputs)
    for segment in segments:
        own = {layer.x.name for layer in layers if layer.name in segment.layers} - values.keys()
        types = {name: ir.DataType.from_numpy(values[name].dtype) for name in segment.needs}
        gives = tuple(name for name in segment.gives if name not in segment.needs)
        if gives or own:
            part = extract(model, Segment(segment.needs, gives, ()), sorted(n for n in own if n), types)
            values |= run(part, tmp_path, values)
    for name in record:
        np.testing.assert_allclose(values[name], whole[name], atol=1e-5)


def test_groups_of_a_decoder_stay_in_one_piece(bundle: Path) -> None:
    graph = ir.load(bundle / "decoder.onnx").graph
    groups = find_groups(find_layers(graph))
    owner = {name: i for i, segment in enumerate(cut(graph, 1)) for name in segment.layers}
    assert len(set(owner.values())) > 3
    for group in groups:
        names = [layer.name for layer in group.layers] + ([group.fold.layer] if group.fold and group.fold.layer else [])
        assert len({owner[name] for name in names}) == 1


def test_layers_and_folds_of_a_decoder(bundle: Path) -> None:
    groups = {g.layers[0].name: g for g in find_groups(find_layers(ir.load(bundle / "decoder.onnx").graph))}
    gate = groups["layers.0.gate_proj"]
    assert [layer.name for layer in gate.layers] == ["layers.0.gate_proj", "layers.0.up_proj"]
    assert gate.fold is not None
    assert gate.fold.kind == "norm"
    down = groups["layers.0.down_proj"]
    assert down.fold is not None
    assert (down.fold.kind, down.fold.layer) == ("layer", "layers.0.up_proj")
    assert groups["layers.0.o_proj"].fold is None
    assert "lm_head" in groups
