"""A decoder in segments on the stand-in for TensorRT: how they are chosen, stored, found, and run as one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends import tensorrt_engines as engines
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.backends.tensorrt_build import modules
from mllm_edge.runtime.backends.tensorrt_engines import FOLDER, Limits, find_engines, make_engines, plan_segments
from mllm_edge.runtime.backends.tensorrt_segments import SegmentedSession
from mllm_edge.runtime.profiling.operators import profile_operators
from tests.families.row import families_of
from tests.runtime.tensorrt_stand_in import StandIn
from tests.runtime.test_tensorrt import TARGETS, agrees_in_batches, answers, load, reference

FREE = Callable[[int], None]
LIMITS = Limits(1024)


@pytest.fixture(scope="module", params=families_of("segments"))
def exported(request: pytest.FixtureRequest, floats: Callable[[str], Path]) -> Path:
    return floats(request.param)


@pytest.fixture
def bundle(single: Path, tmp_path: Path) -> Bundle:
    """A copy to build engines in."""
    return Bundle.load(shutil.copytree(single, tmp_path / "bundle"))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> FREE:
    """Sets how much memory is free; a build takes twice the weights."""
    monkeypatch.setattr(engines, "_WEIGHTS_TIMES", 2)
    monkeypatch.setattr(engines, "_BUILDER", 0)

    def set_free(nbytes: int) -> None:
        found = SimpleNamespace(memory_free=nbytes)
        monkeypatch.setattr("mllm_edge.runtime.backends.tensorrt.read_machine", lambda: found)

    return set_free


def build(bundle: Bundle, target: str, count: int, limits: Limits = LIMITS) -> list[Path]:
    """The decoder's engines."""
    variant = bundle.variant("decoder", target)
    segments = plan_segments(bundle, variant, count, 0)
    return [e.path for e in make_engines(bundle, segments, modules(variant.minimum)[0], "sm87", limits)]


def decoders(bundle: Bundle) -> list[str]:
    """What of engines of the decoder lies in the bundle, by the ends of their names."""
    return sorted(path.stem.rpartition("sm87")[2] for path in (bundle.path / FOLDER).glob("decoder*.engine"))


# ---------------------------------------------------------------- running
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_answers_are_those_of_onnxruntime(
    machine: StandIn, exported: Path, tmp_path: Path, target: str, count: int
) -> None:
    path = Path(shutil.copytree(exported, tmp_path / "bundle"))
    with reference(path, target) as vlm:
        expected = answers(vlm)
    build(Bundle.load(path), target, count)
    vlm, notices = load(path, target)
    with vlm:
        assert answers(vlm) == expected
        assert answers(vlm) == expected
    assert not any("decoder" in notice for notice in notices), "they were found"
    assert machine.counts["builds"] == count + len(Bundle.load(path).manifest.components) - 1
    if target == "tensorrt":  # where shapes and addresses stay
        assert machine.counts["replays"] > 50 * count
        assert machine.counts["bytes copied on the device"] == 0
    assert not machine.memory, "everything was freed"


def test_layers_of_all_segments_are_told(machine: StandIn, bundle: Bundle) -> None:
    build(bundle, "tensorrt", 3)
    found = profile_operators(bundle.path, "What?", new_tokens=3, target="tensorrt")
    layers = set(bundle.manifest.model.state[0].layers)
    for stage in ("prefill", "decode"):
        told = [operator for operator in found if operator.stage == stage]
        assert {operator.layer for operator in told} - {None} == layers
        assert sum(operator.kind == "TensorScatter" for operator in told) == 2 * len(layers)
        assert {operator.calls for operator in told} == {1 if stage == "prefill" else 2}


@pytest.mark.parametrize("target", TARGETS)
def test_batches_and_snapshots(machine: StandIn, bundle: Bundle, target: str) -> None:
    build(bundle, target, 3, Limits(128, max_batch=2))
    agrees_in_batches(bundle, target)


def test_segments_share_memory(machine: StandIn, bundle: Bundle) -> None:
    """What kernels work in, and what passes; it is there once, however many segments there are."""
    variant, held = bundle.variant("decoder", "tensorrt"), []
    for count in (1, 2, 3):
        build(bundle, "tensorrt", count)
        before = machine.allocated()
        session = open_backend("tensorrt").open(bundle.listed(variant.file), variant)
        assert isinstance(session, SegmentedSession) == (count > 1)
        held.append(machine.allocated() - before)
        del session
    passing = 1024 * bundle.manifest.model.hidden_size * 2
    assert held == [1 << 16, (1 << 16) + passing, (1 << 16) + 2 * passing]


def test_what_is_not_there(machine: StandIn, bundle: Bundle) -> None:
    build(bundle, "tensorrt", 2)
    variant = bundle.variant("decoder", "tensorrt")
    session = open_backend("tensorrt").open(bundle.listed(variant.file), variant)
    with pytest.raises(BackendError, match=r"decoder.tensorrt.onnx has no input pixels"):
        session.run({"pixels": np.zeros(1)})
    with pytest.raises(BackendError, match="was not given"):
        session.run({"inputs_embeds": np.zeros((1, 1, bundle.manifest.model.hidden_size), np.float16)})


# ---------------------------------------------------------------- choosing
@pytest.mark.parametrize("target", TARGETS)
def test_as_few_segments_as_the_memory_is_enough_for(bundle: Bundle, free: FREE, target: str) -> None:
    variant = bundle.variant("decoder", target)
    needs = [
        max(engines.building_memory(segment) for segment in plan_segments(bundle, variant, count, 0))
        for count in (1, 2, 3)
    ]
    assert needs == sorted(set(needs), reverse=True)
    assert needs[0] > 1.8 * needs[1]
    for count, need in enumerate(needs, 1):
        assert len(plan_segments(bundle, variant, None, need)) == count
    assert len(plan_segments(bundle, variant, None, 0)) == 1, "nobody knows how much is free"
    least = plan_segments(bundle, variant, None, 1)
    assert max(engines.building_memory(segment) for segment in least) < needs[1]
    with pytest.raises(BackendError, match=r"can be cut into \d+ segments at most, not 99") as caught:
        plan_segments(bundle, variant, 99, 0)
    assert caught.value.fix.startswith("--segments ")
    tower = bundle.variant("vision_encoder", target)
    assert len(plan_segments(bundle, tower, 3, 0)) == len(plan_segments(bundle, tower, None, 1)) == 1


def test_run_builds_segments_where_memory_is_small(machine: StandIn, bundle: Bundle, free: FREE) -> None:
    variant = bundle.variant("decoder", "tensorrt")
    with load(bundle.path, "tensorrt")[0] as vlm:
        expected = answers(vlm)
    shutil.rmtree(bundle.path / FOLDER)
    free(engines.building_memory(plan_segments(bundle, variant, 2, 0)[1]) + 20_000)
    vlm, notices = load(bundle.path, "tensorrt")
    with vlm:
        assert answers(vlm) == expected
    told = [notice for notice in notices if "decoder" in notice]
    parts = [notice.partition(" for sm87")[0] for notice in told]
    assert parts == [f"building the engine of segment {i} of 2 of decoder.tensorrt.onnx" for i in (1, 2)]
    assert decoders(bundle) == ["-seg1of2", "-seg2of2"]


# ---------------------------------------------------------------- what lies in the bundle
def test_engines_are_whole_or_in_segments(machine: StandIn, bundle: Bundle) -> None:
    """Those that divide the decoder otherwise go when the new ones are there."""
    variant = bundle.variant("decoder", "tensorrt")
    (module,) = modules(variant.minimum)
    for count, names in ((2, ["-seg1of2", "-seg2of2"]), (1, [""]), (3, ["-seg1of3", "-seg2of3", "-seg3of3"])):
        paths = build(bundle, "tensorrt", count)
        assert decoders(bundle) == names
        assert [e.path for e in find_engines(bundle, variant, module, "sm87")] == paths
        assert len(list((bundle.path / FOLDER).glob("decoder*.json"))) == count
        builds = machine.counts["builds"]
        assert build(bundle, "tensorrt", count) == paths
        assert machine.counts["builds"] == builds, "kept"
    assert not find_engines(bundle, variant, module, "sm86")
    paths = build(bundle, "tensorrt", 3, Limits(64))
    assert machine.counts["builds"] == builds + 3
    for path in paths[1:]:
        path.unlink()
    (bundle.path / FOLDER / paths[1].name.replace("3.", "x.")).write_bytes(b"another's")
    assert not find_engines(bundle, variant, module, "sm87")


def test_a_build_goes_on_at_the_next_segment(machine: StandIn, bundle: Bundle) -> None:
    whole = build(bundle, "tensorrt", 1)
    machine.refuse["seg2of3"] = "no kernel for this layer"
    with pytest.raises(BackendError, match=r"decoder.tensorrt-seg2of3.onnx: .* built no engine: no kernel"):
        build(bundle, "tensorrt", 3)
    assert decoders(bundle) == ["", "-seg1of3"]
    variant = bundle.variant("decoder", "tensorrt")
    (found,) = find_engines(bundle, variant, modules(variant.minimum)[0], "sm87")
    assert found.path == whole[0], "as long as it is needed"
    machine.refuse.clear()
    before = machine.counts["builds"]
    build(bundle, "tensorrt", 3)
    assert machine.counts["builds"] == before + 2
    assert decoders(bundle) == ["-seg1of3", "-seg2of3", "-seg3of3"]


@pytest.mark.parametrize("what", ["missing", "damaged", "of other limits"])
def test_a_segment_that_is_not_good_is_built_again(machine: StandIn, bundle: Bundle, free: FREE, what: str) -> None:
    variant = bundle.variant("decoder", "tensorrt")
    free(engines.building_memory(plan_segments(bundle, variant, 2, 0)[1]) + 20_000)
    with load(bundle.path, "tensorrt")[0] as vlm:
        expected = answers(vlm)
    (path,) = (bundle.path / FOLDER).glob("decoder*seg2of2.engine")
    if what == "missing":
        path.unlink()
    elif what == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        facts = path.with_name(f"{path.name}.json")
        facts.write_text(facts.read_text().replace('"max_batch": 1', '"max_batch": 2'))
    vlm, notices = load(bundle.path, "tensorrt")
    with vlm:
        assert answers(vlm) == expected
    assert len(notices) == 1
    assert "segment 2 of 2" in notices[0]


def test_segments_that_tensorrt_does_not_open_are_built_again(machine: StandIn, bundle: Bundle) -> None:
    load(bundle.path, "tensorrt")[0].close()
    build(bundle, "tensorrt", 2)
    machine.trouble["deserialize"] = 1
    variant, notices = bundle.variant("decoder", "tensorrt"), []  # type: ignore[var-annotated]
    open_backend("tensorrt", notice=notices.append).open(bundle.listed(variant.file), variant)
    assert "seg1of2.engine does not open, although it is whole" in notices[0]
    assert decoders(bundle) == [""], "memory is enough for that"


def test_out_of_memory_names_more_segments(machine: StandIn, bundle: Bundle) -> None:
    machine.refuse["decoder"] = "Requested amount of GPU memory (9 bytes) could not be allocated."
    for count in (1, 2):
        with pytest.raises(BackendError, match="not enough memory to build the engine") as caught:
            build(bundle, "tensorrt", count)
        assert f"--segments {count + 1}, a smaller --max-seq" in caught.value.fix
