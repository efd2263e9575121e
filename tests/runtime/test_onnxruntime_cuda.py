"""The CUDA backend with ONNX Runtime's processor in the place of the GPU: the same code but for the kernels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError, ExportError
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.backends import onnxruntime_cuda
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.vlm import VLM
from mllm_edge.spec import TensorSpec, Variant
from tests.families.row import families_of, rows
from tests.runtime.test_tensorrt import answers, batch_and_again

HALF = np.dtype("float16")


@pytest.fixture(scope="module")
def single(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "bundle"
    export(str(tiny_checkpoint), out, targets=["cuda"], recipe_name="int4", verify_mode="off")
    return out


def gpu() -> OnnxRuntimeCuda:
    return OnnxRuntimeCuda("CPUExecutionProvider", "cpu")


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        pytest.param(*one.values, recipe, id=f"{one.values[0]}-{recipe}", marks=one.marks)
        for recipe in ("fp16", "int8", "int4")
        # Weights of 8 and 4 bits are blocks of the same kind.
        for one in families_of("calibration" if recipe == "int8" else "", "cuda")
    ],
)
def test_answers_are_those_of_the_processor(compared: Callable[..., Any], family: str, recipe: str) -> None:
    """The graphs agree with the source model as well, which the export checks."""
    report, path = compared(family, rows()[family].first, recipe)
    assert report.targets == rows()[family].reached
    bundle = Bundle.load(path)
    for component in bundle.manifest.components:
        variant = bundle.variant(component, "cuda")
        assert {np.dtype(t.dtype) for t in variant.inputs} <= {HALF, np.dtype("int32"), np.dtype("int64")}
        operators = _operators(bundle.listed(variant.file))
        assert operators.isdisjoint({"DynamicQuantizeMatMul", "MatMulIntegerToFloat"})
        assert ("MatMulNBits" in operators) == (recipe != "fp16")
    with VLM(bundle, OnnxRuntimeCpu(target="cuda")) as vlm:
        expected = answers(vlm)
    with VLM(bundle, gpu()) as vlm:
        assert vlm.decoder.reset(64).buffer(0, "key").nbytes == _half_cache(bundle)
        assert answers(vlm) == expected
        assert answers(vlm) == expected


def _operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def _half_cache(bundle: Bundle) -> int:
    heads, head_dim = bundle.manifest.model.state[0].shape
    return heads * 64 * head_dim * 2


def test_batches_and_snapshots(single: Path) -> None:
    bundle = Bundle.load(single)
    variant = bundle.variant("decoder", "cuda")
    rng = np.random.default_rng(0)
    prompts = [rng.standard_normal((n, bundle.manifest.model.hidden_size)).astype(np.float32) for n in (7, 4)]
    found = []
    for chosen in (gpu(), OnnxRuntimeCpu(target="cuda")):
        decoder = Decoder(chosen.open(bundle.listed(variant.file), variant), variant, bundle.manifest.model, chosen)
        rows = batch_and_again(decoder, prompts)
        # One sequence after the other: each is bound as a part of the buffers.
        rows.append(decoder.forward_batch(prompts).copy())
        found.append(rows)
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def _sums_and_squares(folder: Path) -> tuple[Path, Variant]:
    """Of x [n]: a = 2x, b = x², c = 4x."""
    make, kind = onnx.helper.make_node, onnx.TensorProto.FLOAT
    nodes = [make("Add", ["x", "x"], ["a"]), make("Mul", ["x", "x"], ["b"]), make("Add", ["a", "a"], ["c"])]
    values = {name: onnx.helper.make_tensor_value_info(name, kind, ["n"]) for name in "xabc"}
    graph = onnx.helper.make_graph(nodes, "g", [values["x"]], [values[name] for name in "abc"])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "graph.onnx")
    x, *outputs = (TensorSpec(name, "float32", ("n",)) for name in "xabc")
    return folder / "graph.onnx", Variant("cpu", "contrib", "float32", "graph.onnx", (x,), tuple(outputs))


@pytest.mark.parametrize("backend", [OnnxRuntimeCpu, gpu])
@pytest.mark.parametrize("bound", ["b", "c", "cb", "ca"])
def test_outputs_are_told_by_their_names(tmp_path: Path, backend: Any, bound: str) -> None:
    """Whichever of them are bound, when, and in which order."""
    x = np.array([3, 5], np.float32)
    expected = {"a": [6, 10], "b": [9, 25], "c": [12, 20]}
    for early in (True, False):
        session = backend().open(*_sums_and_squares(tmp_path))
        if not early:
            assert _lists(session.run({"x": x})) == expected
        targets = {name: np.zeros(2, np.float32) for name in bound}
        for name, target in targets.items():
            session.bind({}, {name: target})
        for _ in range(2):
            free = session.run({"x": x})
            assert set(free) == set("abc") - set(bound)
            assert _lists(free | targets) == expected
            for target in targets.values():
                target[:] = 0


def _lists(arrays: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: array.tolist() for name, array in sorted(arrays.items())}


def test_a_part_is_written_and_read_by_itself() -> None:
    buffer = gpu().allocate((1, 4, 3), "float16")
    part = buffer.part(1, 1, 3)
    assert part.nbytes == 2 * 3 * 2
    part.write(1, np.ones((1, 2, 3), HALF))
    assert np.array_equal(buffer.read(1, 4)[0, :, 0], [0, 1, 1, 0])
    assert part.read(1, 1).shape == (1, 1, 3)


def test_without_the_provider() -> None:
    assert "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    with pytest.raises(BackendError, match="has no CUDAExecutionProvider") as caught:
        open_backend("cuda")
    assert "pip install onnxruntime-gpu" in caught.value.fix


@pytest.fixture
def _unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime with the provider, which falls back to the CPU when it finds no GPU."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    opened = onnxruntime.InferenceSession

    def open_on_the_processor(path: str, options: Any, providers: list[Any], **more: Any) -> Any:
        return opened(path, options, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_on_the_processor)


@pytest.mark.usefixtures("_unusable")
def test_a_gpu_that_cannot_be_used(single: Path) -> None:
    notices: list[str] = []
    with VLM.load(single, backend="cuda", notice=notices.append) as vlm:
        found = answers(vlm)
    assert len(notices) == 3
    assert all("runs on the CPU instead of cuda" in n and "cannot use it here" in n for n in notices)
    with VLM.load(single, backend="cpu") as vlm:
        assert answers(vlm) == found


@pytest.mark.usefixtures("_unusable")
def test_standard_output_belongs_to_answers(
    single: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ONNX Runtime prints there is the reason that is given."""
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn.so.9\nPlease follow x"))
    notices: list[str] = []
    VLM.load(single, backend="cuda", notice=notices.append).close()
    assert all("cannot use it here: Failed to load libcudnn.so.9 (" in notice for notice in notices)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("_unusable")
def test_auto(single: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(single)
    machine = onnxruntime_cuda.read_machine
    assert open_backend("auto", bundle=bundle).name == ("cuda" if machine(Path("/")).gpus else "cpu")
    with_gpu = lambda *_: type("Machine", (), {"gpus": ("one",)})()  # noqa: E731
    monkeypatch.setattr(onnxruntime_cuda, "read_machine", with_gpu)
    assert open_backend("auto", bundle=bundle).name == "cuda"
    assert open_backend("auto", bundle=Bundle.load(tiny_bundle)).name == "cpu"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert open_backend("auto", bundle=bundle).name == "cpu"


@pytest.mark.parametrize("family", families_of("", "cuda"))
def test_float32_is_refused(saved: Callable[..., Path], family: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="GroupQueryAttention takes half precision"):
        export(str(saved(family)), tmp_path / "out", targets=["cuda"], recipe_name="fp32")
