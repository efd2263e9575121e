"""Engines as they are built, stored and found again, on the stand-in: what GPUs, drivers and files do to them."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError, BundleError
from mllm_edge.runtime.backends import engine_facts, tensorrt_engines
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.backends.cuda import Cuda
from mllm_edge.runtime.backends.engine_facts import FOLDER, damaged_engines
from mllm_edge.runtime.backends.tensorrt_build import build, modules
from mllm_edge.runtime.backends.tensorrt_engines import build_workspace, find_engine
from mllm_edge.runtime.backends.tensorrt_log import log_of
from mllm_edge.runtime.machine.hardware import read_machine
from mllm_edge.runtime.vlm import VLM
from tests.runtime.machines import MACHINES
from tests.runtime.tensorrt_stand_in import StandIn, install
from tests.runtime.test_tensorrt import answers, load


# ---------------------------------------------------------------- timings of earlier builds
def timings(bundle: Path) -> Path:
    (cache,) = (bundle / FOLDER).glob("timings-*.cache")
    return cache


def build_again(bundle: Path) -> list[tuple[int, ...]]:
    """All engines, from nothing but the timings; answers."""
    for path in (bundle / FOLDER).glob("*.engine*"):
        path.unlink()
    with load(bundle, "tensorrt")[0] as vlm:
        return answers(vlm)


def test_timings_are_kept(machine: StandIn, bundle: Path) -> None:
    load(bundle, "tensorrt")[0].close()
    cache = timings(bundle)
    assert "sm87" in cache.name
    assert "10.16.1" in cache.name
    assert cache.read_bytes().endswith(b": !!!")
    build_again(bundle)
    assert cache.read_bytes().endswith(b": !!!!!!")


@pytest.mark.parametrize("damage", [b"timings of another GPU: !!!!!", b"torn", b""])
def test_timings_that_tensorrt_refuses_are_made_anew(machine: StandIn, bundle: Path, damage: bytes) -> None:
    """Nothing that was built is lost for them."""
    load(bundle, "tensorrt")[0].close()
    timings(bundle).write_bytes(damage)
    build_again(bundle)
    assert machine.counts["builds"] == 6
    assert timings(bundle).read_bytes().endswith(b": !!!")


def test_timings_that_cannot_be_kept(machine: StandIn, bundle: Path) -> None:
    load(bundle, "tensorrt")[0].close()
    cache = timings(bundle)
    cache.unlink()
    cache.mkdir()
    build_again(bundle)
    assert len(list((bundle / FOLDER).glob("*.engine"))) == 3


# ---------------------------------------------------------------- what TensorRT says
def test_one_logger_serves_the_process(machine: StandIn, bundle: Path) -> None:
    """TensorRT goes on with its first one; the stand-in warns of a second, and fails when the first is gone."""
    with load(bundle, "tensorrt")[0] as vlm:
        answers(vlm)
    gc.collect()
    vlm, notices = load(bundle, "tensorrt", max_context=200)
    vlm.close()
    assert not any("logger" in notice for notice in notices)
    assert machine.log is log_of(modules({"tensorrt": "10.3"})[0].trt)


def test_errors_are_those_of_their_operation(machine: StandIn, bundle: Path) -> None:
    opened = Bundle.load(bundle)
    variant, chosen = opened.variant("decoder", "tensorrt"), open_backend("tensorrt")
    machine.refuse["decoder"] = "Requested amount of GPU memory (9 bytes) could not be allocated."
    with pytest.raises(BackendError, match="not enough memory to build the engine: Requested amount"):
        chosen.open(opened.listed(variant.file), variant)
    machine.refuse["decoder"] = ""
    with pytest.raises(BackendError, match="built no engine: it does not say why"):
        chosen.open(opened.listed(variant.file), variant)


def test_warnings_reach_the_user_once(machine: StandIn, bundle: Path) -> None:
    machine.warn = {"build": "Detected layernorm in half precision", "open": "CUDA lazy loading is not enabled"}
    vlm, notices = load(bundle, "tensorrt")
    vlm.close()
    told = [notice for notice in notices if "warns" in notice]
    assert told == [f"TensorRT 10.16.1 warns: {machine.warn[what]}" for what in ("build", "open")]
    vlm, notices = load(bundle, "tensorrt")
    vlm.close()
    assert notices == [f"TensorRT 10.16.1 warns: {machine.warn['open']}"]


# ---------------------------------------------------------------- whose engine it is
def test_another_model_of_the_same_capability(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT opens the engine of an AGX Orin on an Orin Nano, with a warning, and some are wrong there."""
    install(monkeypatch).model = ("Orin", 16)
    with load(bundle, "tensorrt")[0] as vlm:
        expected = answers(vlm)
    machine = install(monkeypatch)
    machine.model = ("Orin", 8)
    vlm, notices = load(bundle, "tensorrt")
    with vlm:
        assert answers(vlm) == expected
    assert machine.counts["builds"] == 3
    assert not any("warns" in notice for notice in notices)
    assert len(list((bundle / FOLDER).glob("*.engine"))) == 6, "either finds its own"
    assert len(list((bundle / FOLDER).glob("timings-*.cache"))) == 2
    machine = install(monkeypatch)
    load(bundle, "tensorrt")[0].close()
    assert machine.counts["builds"] == 0
    opened, (module,) = Bundle.load(bundle), modules({"tensorrt": "10.15"})
    assert module.gpu == "Orin, 16 multiprocessors"
    variant = opened.variant("decoder", "tensorrt")
    stored = find_engine(opened, variant, module, "sm87")
    assert stored is not None
    for name in (stored.path.name, f"{stored.path.name}.json"):
        shutil.copy(bundle / FOLDER / name, bundle / FOLDER / name.replace("orin-16", "orin-8"))
    install(monkeypatch).model = ("Orin", 8)
    (other,) = modules({"tensorrt": "10.15"})
    assert find_engine(opened, variant, other, "sm87") is None, "even under the right name"


def test_tensorrt_for_rtx_builds_for_a_capability(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "1.7.1", (8, 6), rtx=True).model = ("RTX 3090", 82)
    load(bundle, "tensorrt")[0].close()
    machine = install(monkeypatch, "1.7.1", (8, 6), rtx=True)
    machine.model = ("RTX 3060", 28)
    load(bundle, "tensorrt")[0].close()
    assert machine.counts["builds"] == 0


def test_a_driver_too_old_for_the_bindings(bundle: Path, machine: StandIn) -> None:
    machine.trouble = dict.fromkeys(("cudaGetDeviceCount", "cudaGetDeviceProperties"), 35)
    assert modules({"tensorrt": "10.15"})[0].gpu == ""
    with pytest.raises(BackendError, match="cudaErrorInsufficientDriver") as caught:
        open_backend("tensorrt")
    assert "driver" in caught.value.fix


# ---------------------------------------------------------------- memory to work in
@pytest.mark.parametrize(("name", "free"), [("orin nano", 5_000_000 << 10), ("desktop", 1 << 30)])
def test_the_workspace_is_half_of_what_is_free(
    machine: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, free: int
) -> None:
    """On a board CUDA tells of less than the system would give, which holds files in memory."""
    machine.free = 1 << 30
    found = read_machine(MACHINES[name].write(tmp_path))
    monkeypatch.setattr(tensorrt_engines, "read_machine", lambda: found)
    assert build_workspace(Cuda()) == free // 2


def test_a_board_without_room(machine: StandIn, bundle: Path) -> None:
    """For an engine, or for what its kernels work in: what is there is not built again, which would not help."""
    load(bundle, "tensorrt")[0].close()
    opened = Bundle.load(bundle)
    variant = opened.variant("decoder", "tensorrt")
    machine.trouble["deserialize"], machine.refuse["open"] = 1, "Requested amount of GPU memory (9 bytes) …"
    with pytest.raises(BackendError, match="not enough memory to open the engine: Requested amount") as caught:
        open_backend("tensorrt").open(opened.listed(variant.file), variant)
    assert "--max-seq" in caught.value.fix
    machine.free = machine.allocated() + 1000
    with pytest.raises(BackendError, match=r"cudaErrorMemoryAllocation: 65536 bytes wanted, 1000 are free") as caught:
        open_backend("tensorrt").open(opened.listed(variant.file), variant)
    assert "--max-seq" in caught.value.fix
    vlm, notices = load(bundle, "tensorrt")
    vlm.close()
    assert all("runs on the CPU instead of tensorrt" in notice for notice in notices)
    assert machine.counts["builds"] == 3


# ---------------------------------------------------------------- files that are whole, or not
@pytest.fixture
def built(machine: StandIn, bundle: Path) -> Path:
    load(bundle, "tensorrt")[0].close()
    return bundle


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose bytes are all read."""
    found: list[str] = []
    whole = engine_facts.sha256

    def sha256(path: Path, progress: Callable[[int], None] = lambda n: None) -> str:
        found.append(path.name)
        return whole(path, progress)

    monkeypatch.setattr(engine_facts, "sha256", sha256)
    return found


def large(path: Path) -> Path:
    """An engine of two megabytes, with its facts."""
    data = np.random.default_rng(0).bytes(2 << 20)
    engine_facts.write_engine(path, memoryview(data), {"device": "sm87"}, {"max_seq": 64})
    return path


def test_an_engine_is_not_read_whole_to_be_opened(built: Path, machine: StandIn, hashed: list[str]) -> None:
    load(built, "tensorrt")[0].close()
    assert machine.counts["builds"] == 3
    assert hashed == []


def test_weights_are_compared_when_an_engine_is_built(
    built: Path, machine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not read when there is one; none is made of damaged ones."""
    data = built / "decoder.tensorrt.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    checked: list[str] = []
    check = Bundle.check
    monkeypatch.setattr(Bundle, "check", lambda self, name: (checked.append(name), check(self, name)))
    load(built, "tensorrt")[0].close()
    assert not [name for name in checked if ".onnx" in name]
    for path in (built / FOLDER).glob("decoder*"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(BundleError, match=r"decoder.tensorrt.onnx.data is damaged: bytes 0 to"):
            load(built, "tensorrt")
    assert machine.counts["builds"] == 3
    data.write_bytes(whole)
    load(built, "tensorrt")[0].close()
    assert machine.counts["builds"] == 4


def test_a_copy_is_compared_once(built: Path, machine: StandIn, tmp_path: Path, hashed: list[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built, copy, copy_function=shutil.copyfile)
    for _ in range(2):
        load(copy, "tensorrt")[0].close()
    assert machine.counts["builds"] == 3
    assert sorted(hashed) == sorted(path.name for path in (built / FOLDER).glob("*.engine"))


def test_facts_of_before_are_completed(built: Path, machine: StandIn, hashed: list[str]) -> None:
    for path in (built / FOLDER).glob("*.json"):
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({name: facts[name] for name in ("identity", "limits", "sha256")}))
    for _ in range(2):
        load(built, "tensorrt")[0].close()
    assert machine.counts["builds"] == 3
    assert len(hashed) == 3


@pytest.mark.parametrize("where", [0, 500_000, 1 << 20, (2 << 20) - 1])
def test_bytes_that_change(tmp_path: Path, where: int) -> None:
    path = large(tmp_path / "x.engine")
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    assert engine_facts.known_limits(path, {"device": "sm87"}) is None


def test_a_sample_finds_pages_that_never_reached_the_disk(tmp_path: Path) -> None:
    """As a power loss leaves them: size and time are right."""
    path = large(tmp_path / "x.engine")
    stat = path.stat()
    with path.open("r+b") as f:
        f.seek(1 << 20)
        f.write(bytes(1 << 18))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert engine_facts.known_limits(path, {"device": "sm87"}) is None
    assert engine_facts.known_limits(large(path), {"device": "sm87"}) == {"max_seq": 64}
    assert engine_facts.known_limits(path, {"device": "sm86"}) is None


def test_all_bytes_are_compared_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    path, read = large(tmp_path / FOLDER / "x.engine"), [0]
    (tmp_path / FOLDER / "y.engine").write_bytes(b"without facts, and never opened")

    def progress(nbytes: int) -> None:
        read[0] += nbytes

    assert list(damaged_engines(tmp_path, progress)) == []
    assert read == [2 << 20]
    stat = path.stat()
    with path.open("r+b") as f:
        f.seek(100_000)  # between the pieces of the sample
        f.write(b"\0" * 8)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert engine_facts.known_limits(path, {"device": "sm87"}) == {"max_seq": 64}
    assert list(damaged_engines(tmp_path)) == [path]


# ---------------------------------------------------------------- versions
# In the order in which they came.
NAMES = ["IRuntimeConfig", "IAttentionInputLayer", "IKVCacheUpdateLayer", "CausalMaskKind"]
NAMES += ["IRuntimeCache", "ComputeCapability"]


@pytest.mark.parametrize(
    ("version", "rtx", "names", "targets"),
    [
        ("10.3.0", False, 0, 1),
        ("10.13.3", False, 1, 1),
        ("10.15.1", False, 3, 2),
        ("11.0.0", False, 4, 2),
        ("1.7.1", True, 6, 2),
    ],
)
def test_versions_have_their_own_names(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, version: str, rtx: bool, names: int, targets: int
) -> None:
    """And each runs what it is new enough for."""
    install(monkeypatch, version, (8, 6), rtx=rtx)
    (module,) = modules({"tensorrt_rtx" if rtx else "tensorrt": "1.0"})
    assert [name for name in NAMES if hasattr(module.trt, name)] == NAMES[:names]
    for target in ("tensorrt-10.3", "tensorrt")[:targets]:
        with VLM.load(bundle, backend=target, notice=lambda text: None) as vlm:
            assert vlm.backend.name == target
            assert answers(vlm)


def _quantized(folder: Path, scale: float) -> Path:
    """x · the weight in 8 bits, with one scale for each of two channels."""
    make, half = onnx.helper.make_node, onnx.TensorProto.FLOAT16
    scales = onnx.numpy_helper.from_array(np.array([1, scale], np.float16), "scale")
    codes = onnx.numpy_helper.from_array(np.ones((4, 2), np.int8), "codes")
    nodes = [make("DequantizeLinear", ["codes", "scale"], ["w"], axis=1), make("MatMul", ["x", "w"], ["y"])]
    values = [onnx.helper.make_tensor_value_info(name, half, [1, n]) for name, n in (("x", 4), ("y", 2))]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], [scales, codes])
    opset = [onnx.helper.make_opsetid("", 19)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "g.onnx")
    return folder / "g.onnx"


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-9])
def test_scales_must_be_positive(machine: StandIn, tmp_path: Path, scale: float) -> None:
    (module,) = modules({"tensorrt": "10.3"})
    with pytest.raises(BackendError, match="scale scale must be all positive"):
        build(_quantized(tmp_path, scale), [], module=module)
    assert build(_quantized(tmp_path, 0.5), [], module=module).nbytes
