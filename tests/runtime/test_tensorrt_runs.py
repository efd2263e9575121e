"""Runs on TensorRT as a GPU has them: streams, recorded steps, memory; on the stand-in."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends import tensorrt as backend
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.backends.cuda import Cuda, Memory, Staging
from mllm_edge.runtime.backends.cuda_arrays import CudaArray, taken
from mllm_edge.runtime.vlm import VLM
from tests.runtime.tensorrt_stand_in import StandIn, install
from tests.runtime.test_dlpack import CUDA, Lent
from tests.runtime.test_tensorrt import TARGETS, answers, load, reference

LONG: dict[str, Any] = {"max_new_tokens": 257, "ignore_eos": True}


@pytest.fixture
def cuda(machine: StandIn) -> Cuda:
    return Cuda()


def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float16)


# ---------------------------------------------------------------- tokens
@pytest.mark.parametrize("graphs", ["1", "0"])
@pytest.mark.parametrize(
    ("version", "rtx", "target"),
    [
        ("10.3.0", False, "tensorrt-10.3"),
        ("10.13.3", False, "tensorrt-10.3"),
        ("10.16.1", False, "tensorrt-10.3"),
        ("10.16.1", False, "tensorrt"),
        ("11.1.0", False, "tensorrt"),
        ("1.7.1", True, "tensorrt-10.3"),
        ("1.7.1", True, "tensorrt"),
    ],
)
def test_tokens_are_those_of_onnxruntime(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, version: str, rtx: bool, target: str, graphs: str
) -> None:
    """Behind one another and beyond a span of 64, one a step or guessed, whatever logits are copied."""
    machine = install(monkeypatch, version, (8, 6), rtx=rtx)
    monkeypatch.setenv(backend.GRAPHS, graphs)
    options: dict[str, Any] = {"max_new_tokens": 70, "ignore_eos": True}
    asked: list[dict[str, Any]] = [{}, {"frequency_penalty": -0.5}]
    with reference(bundle, target) as vlm:
        expected = [
            vlm.generate(text, **options, **choice).token_ids for text in ("Hi.", "abc " * 9) for choice in asked
        ]
    with load(bundle, target)[0] as vlm:
        for speculation in (0, 15, 3):
            found = [
                vlm.generate(text, speculation=speculation, **options, **choice).token_ids
                for text in ("Hi.", "abc " * 9)
                for choice in asked
            ]
            assert found == expected
    assert (machine.counts["replays"] > 100) == (graphs == "1" and not rtx)
    assert machine.status == 0
    assert not machine.memory


# ---------------------------------------------------------------- streams
class Written:
    """An array that another library's work, still on a stream of its own, is going to write."""

    def __init__(self, machine: StandIn, cuda: Cuda):
        self.values, self.machine, self.stream = values(), machine, machine.new_stream(blocking=False)
        self.memory = Memory(cuda, self.values.nbytes)
        machine.enqueue(self.stream, self._write)
        facts = {"data": (self.memory.address, False), "shape": self.values.shape, "typestr": "<f2", "strides": None}
        self.interface: dict[str, Any] = {**facts, "version": 2}

    def _write(self) -> int:
        view = self.machine.view(self.memory.address, self.values.nbytes)
        assert view is not None
        view[:] = self.values.reshape(-1).view(np.uint8)
        return 0


class Ordered(Lent):
    """DLPack's promise: the consumer's stream waits for the owner's."""

    def __init__(self, written: Written):
        super().__init__(written.memory.address, written.values.shape, (CUDA, 0))
        self.written = written

    def __dlpack__(self, **options: Any) -> Any:
        machine = self.written.machine
        machine.order(machine.stream(options["stream"]), machine.stream(self.written.stream))
        return super().__dlpack__(**options)


@pytest.mark.parametrize("how", ["dlpack", "both", "version 2", "version 3"])
def test_what_another_stream_still_writes_is_waited_for(machine: StandIn, cuda: Cuda, how: str) -> None:
    written = Written(machine, cuda)
    if how == "version 3":
        written.interface |= {"version": 3, "stream": written.stream}
    if how in ("dlpack", "both"):
        lent: Any = Ordered(written)
    else:
        lent = type("Lent", (), {})()
    if how != "dlpack":
        lent.__cuda_array_interface__ = written.interface
    array = taken(cuda, "x", lent)
    assert isinstance(array, CudaArray)
    assert np.array_equal(array.read(0, 2), written.values)
    # Only an array that does not tell its stream makes everyone wait.
    assert machine.counts["waits for all"] == (how == "version 2")


def test_the_stand_in_shows_what_was_not_waited_for(machine: StandIn, cuda: Cuda) -> None:
    written = Written(machine, cuda)
    array = CudaArray(cuda, written.memory, written.memory.address, written.values.shape, written.values.dtype)
    assert not np.array_equal(array.read(0, 2), written.values)


def test_others_use_the_legacy_stream_while_a_step_is_recorded(machine: StandIn, cuda: Cuda) -> None:
    found: list[int] = []
    cuda.capture(lambda: found.append(machine.enqueue(0, lambda: 0)))
    assert found == [0]


@pytest.mark.parametrize("late", [False, True])
def test_what_was_uploaded_may_be_changed(machine: StandIn, cuda: Cuda, late: bool) -> None:
    machine.late = late
    expected = values()
    array = CudaArray(cuda, memory := Memory(cuda, expected.nbytes), memory.address, expected.shape, expected.dtype)
    given = expected.copy()
    array.write(0, given)
    given[...] = 0
    assert np.array_equal(array.read(0, 2), expected)


def test_page_locked_memory_is_written_when_it_was_read(machine: StandIn, cuda: Cuda) -> None:
    """Where nothing waits for a run, the next one's inputs must not overtake it."""
    staging = Staging(cuda)
    staging.reserve(64, 64)
    kept = [Memory(cuda, 64) for _ in range(2)]
    for number, memory in enumerate(kept):
        staging.begin()
        staging.view(0, (64,), np.uint8)[:] = number
        staging.send(0, 64)
        cuda.copy((memory.address, staging.address, 64))
    cuda.wait()
    found = [machine.view(memory.address, 64) for memory in kept]
    assert [set(view.tolist()) for view in found if view is not None] == [{0}, {1}]


def test_what_is_lent_goes_back_when_it_was_read(machine: StandIn, bundle: Path) -> None:
    """Although nothing waits for a run whose outputs stay on the device."""
    opened, chosen = Bundle.load(bundle), open_backend("tensorrt")
    variant = opened.variant("vision_encoder", "tensorrt")
    session = chosen.open(opened.listed(variant.file), variant)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float16)
    expected = session.run({"pixel_values": pixels})["vision_hidden"]
    output: Any = chosen.allocate(expected.shape, expected.dtype.name)
    memory: Any = chosen.allocate(pixels.shape, "float16")
    memory.write(0, pixels)
    session.bind({}, {"vision_hidden": output})
    pending: list[int] = []

    class Watching(Lent):
        def _delete(self, managed: int) -> None:
            pending.append(sum(len(stream.queue) for stream in machine.streams.values()))
            super()._delete(managed)

    lent = Watching(memory.address, pixels.shape, (CUDA, 0))
    assert not session.run({"pixel_values": lent})  # type: ignore[dict-item]
    assert any(stream.queue for stream in machine.streams.values()), "it has not run yet"
    session.bind({"pixel_values": pixels}, {})
    assert lent.returned == 1
    assert pending == [0]
    assert np.array_equal(output.read(0, 1), expected)


# ---------------------------------------------------------------- recorded steps
def test_tensorrt_for_rtx_records_by_itself(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded from outside would keep the kernels of the first runs."""
    machine = install(monkeypatch, "1.7.1", (8, 6), rtx=True)
    with load(bundle, "tensorrt")[0] as vlm:
        expected = answers(vlm)
    assert machine.counts["records"] == machine.counts["fallback records"] == 0
    assert set(machine.strategies) == {"WHOLE_GRAPH_CAPTURE"}
    machine.strategies.clear()
    monkeypatch.setenv(backend.GRAPHS, "0")
    with load(bundle, "tensorrt")[0] as vlm:
        assert answers(vlm) == expected
    assert set(machine.strategies) == {"DISABLED"}


def test_engines_for_rtx_do_not_allocate(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "1.7.1", (8, 6), rtx=True)
    with load(bundle, "tensorrt")[0]:
        engines = list((bundle / "engines").glob("*.engine"))
    assert [b"REQUIRE_USER_ALLOCATION" in engine.read_bytes() for engine in engines] == [True] * 3


def test_spans_double_on_rtx(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled for each."""
    install(monkeypatch, "1.7.1", (8, 6), rtx=True)
    with load(bundle, "tensorrt")[0] as vlm:
        expected = vlm.generate("Hi. " * 20, **LONG).token_ids
        prompt = vlm.count_tokens("Hi. " * 20)
        steps = vlm.decoder._session._contexts[-1]._steps  # type: ignore[attr-defined]
        spans = {step.shapes["attention_bias"][-1] for step in steps.values()}
    assert spans == {max(64, 1 << (length - 1).bit_length()) for length in range(prompt + 1, prompt + 257)}
    assert len(spans) >= 3
    with reference(bundle, "tensorrt") as vlm:
        assert vlm.generate("Hi. " * 20, **LONG).token_ids == expected


@pytest.mark.parametrize("speculation", [0, 15])
@pytest.mark.parametrize("target", TARGETS)
def test_a_long_answer_allocates_and_records_little(
    machine: StandIn, bundle: Path, target: str, speculation: int
) -> None:
    with reference(bundle, target) as vlm:
        expected = [vlm.generate("abcabc", **LONG, **choice).token_ids for choice in ({}, {"frequency_penalty": -0.5})]
    with load(bundle, target)[0] as vlm:
        found, steps = [], 0
        for choice in ({}, {"frequency_penalty": -0.5}):
            result = vlm.generate("abcabc", speculation=speculation, **LONG, **choice)
            found.append(result.token_ids)
            steps += 257 - result.metrics.accepted
    assert found == expected
    assert machine.counts["page-locked allocations"] <= 8
    assert machine.counts["records"] <= 8
    assert machine.counts["replays"] > steps / 3 if speculation else machine.counts["replays"] > 0.95 * steps


@pytest.mark.parametrize("target", TARGETS)
def test_graphs_that_cannot_become_others_are_made_anew(machine: StandIn, bundle: Path, target: str) -> None:
    machine.updates = False
    with reference(bundle, target) as vlm:
        expected = vlm.generate("abcabc", **LONG).token_ids
    with load(bundle, target)[0] as vlm:
        assert vlm.generate("abcabc", speculation=15, **LONG).token_ids == expected
        assert vlm.generate("abcabc", **LONG).token_ids == expected
    assert machine.counts["records"] > 8
    assert not machine.counts["updates"]


def test_graphs_outlast_longer_prompts(machine: StandIn, bundle: Path) -> None:
    """Which take more memory for inputs."""
    with load(bundle, "tensorrt")[0] as vlm:
        for words in (5, 20, 40):
            vlm.generate("Hi. " * words, max_new_tokens=8, ignore_eos=True)
        before = machine.counts["records"], machine.counts["runs"]
        for words in (5, 20, 40):
            vlm.generate("Hi. " * words, max_new_tokens=8, ignore_eos=True)
    assert machine.counts["records"] == before[0]
    assert machine.counts["runs"] == before[1] + 3, "prefill alone"


# ---------------------------------------------------------------- what TensorRT says
@pytest.mark.parametrize("target", TARGETS)
def test_sizes_that_tensorrt_does_not_tell(machine: StandIn, bundle: Path, target: str) -> None:
    """Of caches, on one GPU."""
    variant = Bundle.load(bundle).variant("decoder", target)
    machine.unknown = [t.name for t in variant.outputs]
    with reference(bundle, target) as vlm:
        expected = answers(vlm)
    with load(bundle, target)[0] as vlm:
        assert answers(vlm) == expected


def test_sizes_that_tensorrt_tells_otherwise(machine: StandIn, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = "tests.runtime.tensorrt_stand_in._Context.get_tensor_shape"
    monkeypatch.setattr(real, lambda self, name: (1, 1, 7))
    with load(bundle, "tensorrt")[0] as vlm, pytest.raises(BackendError, match=r"TensorRT makes \[1, 1, 7\] of"):
        vlm.generate("Hi.", max_new_tokens=2)


def test_a_profile_that_is_refused(machine: StandIn, bundle: Path) -> None:
    """When the engine is opened, so that the processor takes over; the bindings raise where others return False."""
    load(bundle, "tensorrt")[0].close()
    machine.trouble["profile"] = 1
    vlm, notices = load(bundle, "tensorrt")
    with vlm:
        assert answers(vlm)
    assert len(notices) == 3
    assert all(
        "on the CPU instead of tensorrt: TensorRT refuses profile 0: the profile is in use" in n for n in notices
    )


def test_inputs_that_contradict_each_other(machine: StandIn, bundle: Path) -> None:
    with load(bundle, "tensorrt")[0] as vlm:
        vlm.generate("Hi.", max_new_tokens=4, ignore_eos=True)
        session = vlm.decoder._session
        with pytest.raises(BackendError, match="the sequence of other inputs"):
            session.run({"inputs_embeds": np.zeros((1, 2, vlm.spec.hidden_size), np.float16)})


# ---------------------------------------------------------------- memory
def test_components_share_the_memory_to_work_in(machine: StandIn, bundle: Path) -> None:
    with load(bundle, "tensorrt")[0] as vlm:
        assert [len(memory) for memory in machine.memory.values()] == [1 << 16]
        expected = answers(vlm)
    assert not machine.memory
    with reference(bundle, "tensorrt") as vlm:
        assert answers(vlm) == expected


def test_memory_to_work_in_that_grows(machine: StandIn, bundle: Path) -> None:
    """A component that is opened later wants more; what was recorded before does not work in what is gone."""
    opened, chosen = Bundle.load(bundle), open_backend("tensorrt")
    with VLM(opened, chosen, notice=lambda text: None) as vlm:
        expected = answers(vlm)
        before = machine.counts["updates"]
        chosen._workspace().reserve(1 << 20)  # type: ignore[attr-defined]
        assert answers(vlm) == expected
        assert machine.counts["updates"] > before
    assert not machine.memory
