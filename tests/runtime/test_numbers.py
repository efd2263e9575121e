"""Every number of every public call: type and range, and an error that names option, value and range."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.errors import ImageError, OptionError, PromptError
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.conversation import Conversation
from mllm_edge.runtime.decode.sampling import SamplingParams
from mllm_edge.runtime.decode.speculation import PromptLookup
from mllm_edge.runtime.machine.threads import Threads
from mllm_edge.runtime.numbers import number, whole
from mllm_edge.runtime.profiling.measure import profile, synthetic_image
from mllm_edge.runtime.profiling.sweep import prompt_of

NEVER: tuple[Any, ...] = ("4", "hot", b"4", None, True, np.True_, [], [1], {}, 1j, float("nan"), np.array([1, 2]))
NO_WHOLE: tuple[Any, ...] = (*NEVER, 2.5, 2.0, np.float32(2), float("inf"), -1, -(10**30))
WHOLE = {"max_new_tokens": (0,), "top_k": (), "speculation": (16, 10**30), "seed": ()}
REAL: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, float("inf"), 1e300, 10**400),
    "top_p": (0, 0.0, 1.01, -1),
    "min_p": (-0.1, 1.5),
    "repetition_penalty": (0, -1.0, float("inf"), 1e39),
    "frequency_penalty": (float("-inf"), 1e39, -1e39),
    "presence_penalty": (float("inf"), 10**400),
}
CASES = [(name, value) for name, more in WHOLE.items() for value in (*NO_WHOLE, *more)]
CASES += [(name, value) for name, more in REAL.items() for value in (*NEVER, *more)]
# None is as the checkpoint says it.
OPTIONAL = ("max_new_tokens", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
CASES = [(name, value) for name, value in CASES if not (name in OPTIONAL and value is None)]


@pytest.fixture(scope="module")
def vlm(tiny_bundle: Path) -> VLM:
    return VLM.load(tiny_bundle)


def refused(name: str, value: Any, work: Callable[[], Any]) -> None:
    with pytest.raises(OptionError, match=f"^{name} must be a (whole )?number ") as caught:
        work()
    assert isinstance(caught.value, ValueError)
    assert repr(value)[:60] in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda x: repr(x)[:20])
def test_of_an_answer(vlm: VLM, name: str, value: Any) -> None:
    options = {name: value}
    refused(name, value, lambda: vlm.stream("Hi", **options))
    refused(name, value, lambda: vlm.generate("Hi", **options))
    refused(name, value, lambda: next(Conversation(vlm).ask("Hi", **options)))
    if name in SamplingParams.__dataclass_fields__:
        refused(name, value, lambda: SamplingParams(**options))
    if name == "speculation":
        refused(name, value, lambda: PromptLookup([1, 2], value))


@pytest.mark.parametrize("value", [*NO_WHOLE, 0], ids=lambda x: repr(x)[:20])
def test_of_a_load_and_a_profile(tiny_bundle: Path, value: Any) -> None:
    if value is not None:
        refused("threads", value, lambda: VLM.load(tiny_bundle, threads=value))
        refused("threads", value, lambda: open_backend("cpu", value))
        refused("max_context", value, lambda: VLM.load(tiny_bundle, max_context=value))
        refused("threads", value, lambda: profile(tiny_bundle, "Hi", threads=value))
        refused("max_context", value, lambda: profile(tiny_bundle, "Hi", max_context=value))
    for name in ("new_tokens", "runs", "iterations"):
        refused(name, value, lambda name=name: profile(tiny_bundle, "Hi", **{name: value}))  # type: ignore[misc]
    if isinstance(value, (str, float)):
        refused("warmup", value, lambda: profile(tiny_bundle, "Hi", warmup=value))  # type: ignore[arg-type]
    refused("width", value, lambda: synthetic_image(value, 4))
    refused("prompt", value, lambda: prompt_of(tiny_bundle, "Hi", value))


def test_thousands_of_threads_are_refused(tiny_bundle: Path) -> None:
    refused("threads", 100_000, lambda: VLM.load(tiny_bundle, threads=100_000))


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint8])
def test_whole_numbers_of_any_kind(tiny_bundle: Path, kind: Callable[[int], Any]) -> None:
    with VLM.load(tiny_bundle, threads=kind(1), max_context=kind(100)) as vlm:
        result = vlm.generate("Hi", max_new_tokens=kind(3), top_k=kind(4), seed=kind(5), temperature=kind(1))
        assert len(result.token_ids) == 3
        assert vlm.generate("Hi", max_new_tokens=10**30, seed=10**30).finish_reason == "length"


@pytest.mark.parametrize("kind", [float, np.float16, np.float32, np.float64])
def test_numbers_of_any_kind(vlm: VLM, kind: Callable[[float], Any]) -> None:
    options = {"temperature": kind(0.5), "top_p": kind(0.5), "min_p": kind(0.25), "repetition_penalty": kind(1.5)}
    assert vlm.generate("Hi", max_new_tokens=3, seed=1, **options).token_ids


@pytest.mark.parametrize("stop", [5, [5], [None], [""], ["x", b"y"], 1.5])
def test_stop_strings(vlm: VLM, stop: Any) -> None:
    with pytest.raises(OptionError, match="stop"):
        vlm.stream("Hi", stop=stop)


@pytest.mark.parametrize("size", [("64", 64), (64.0, 64), (64,), (64, 64, 3), 64, (0, 4), (True, 4), "ab"])
def test_sizes_of_images(vlm: VLM, size: Any) -> None:
    with pytest.raises(ValueError, match=r"image size|no pixels|no videos"):
        vlm.count_tokens("Hi", [size])
    assert vlm.count_tokens("Hi", [np.array([64, 48])]) == vlm.count_tokens("Hi", [(64, 48)])


@pytest.mark.parametrize("value", [5, None, 1.5, True, object()])
def test_what_is_no_list(vlm: VLM, value: Any) -> None:
    with pytest.raises(OptionError, match="image_sizes must be a list"):
        vlm.count_tokens("Hi", value)
    if value is not None:
        with pytest.raises(ImageError, match="images is"):
            vlm.stream("Hi", images=value)


@pytest.mark.parametrize("trace", ["x", 5, True])
def test_a_trace_that_is_none(vlm: VLM, tiny_bundle: Path, trace: Any) -> None:
    with pytest.raises(OptionError, match="trace must be a Trace"):
        vlm.stream("Hi", trace=trace)
    with pytest.raises(OptionError, match="trace must be a Trace"):
        VLM.load(tiny_bundle, trace=trace)


def test_components_and_inputs_that_there_are_not(vlm: VLM) -> None:
    with pytest.raises(OptionError, match=r"no component is named 'nope'"):
        vlm.component("nope", {})
    with pytest.raises(OptionError, match=r"no input of vision_encoder is named 'x'"):
        vlm.component("vision_encoder", {"x": 1})
    for value in ("a", [[1], [1, 2]], object()):
        with pytest.raises(OptionError, match="no array of"):
            vlm.component("vision_encoder", {"pixel_values": value})
    with pytest.raises(PromptError, match="no images"):
        vlm.image_features(vlm.processor.process("Hi"))
    with pytest.raises(PromptError, match="no images"):
        vlm.stage_outputs(vlm.processor.process("Hi"))


@pytest.mark.parametrize(
    "text", ["[" * 100000, '[{"role": "user", "content": [5]}]', '[{"role": "user", "content": [{"type": "image"}]}]']
)
def test_files_that_hold_no_conversation(vlm: VLM, tmp_path: Path, text: str) -> None:
    (tmp_path / "talk.json").write_text(text)
    for path in ("talk.json", "gone.json", ""):
        with pytest.raises(PromptError, match=r"give a file that /save wrote"):
            Conversation(vlm).load(str(tmp_path / path))


def test_the_helpers() -> None:
    assert type(whole("x", np.int8(3), 0, 3)) is int
    assert type(number("x", np.float32(0.5), 0, 1)) is float
    with pytest.raises(OptionError, match=r"^x must be a whole number from 1 to 3, not 4(\n|$)"):
        whole("x", 4, 1, 3)
    with pytest.raises(OptionError, match=r"^x must be a number above 0 to 1, not 0(\n|$)"):
        number("x", 0, 0, 1, above=True)


# ---------------------------------------------------------------- threads
def test_where_and_how_threads_wait() -> None:
    new, old, plain = (1, 26, 0), (1, 25, 1), Threads.of(3)
    stop, time = "session.force_spinning_stop", "session.intra_op.spin_duration_us"
    assert plain.settings(True, new) == {time: "200"}
    assert plain.settings(False, new) == {stop: "1", time: "20"}
    assert plain.settings(True, old) == plain.settings(False, old) == {stop: "1"}
    assert Threads.of(3, "on").settings(True, new) == Threads.of(3, "on").settings(True, old) == {}
    assert Threads.of(3, "on").settings(False, new) == {stop: "1"}
    for stepping in (True, False):
        assert Threads.of(3, "off").settings(stepping, new) == {"session.intra_op.allow_spinning": "0"}


def test_small_steps_are_one_threads() -> None:
    default, small, large = Threads(4), 10**6, 10**8
    assert [default.for_graph(True, n).count for n in (small, large)] == [1, 4]
    assert default.for_graph(False, small).count == 4
    assert Threads.of(3).for_graph(True, small).count == 3
    assert Threads(2, "auto", (0, 1)).for_graph(True, small).count == 2


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")
def test_affinity(tiny_bundle: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    first, last = allowed[0], allowed[-1]
    text = ",".join(map(str, allowed))
    assert (
        Threads.of(None, "auto", text)
        == Threads.of(None, "auto", allowed)
        == Threads(len(allowed), "auto", tuple(allowed))
    )
    assert Threads.of(1, affinity=f" {first} ").affinity == (first,)
    settings = Threads(3, "auto", (first, last)).settings(True, (1, 26))
    places = f"{first + 1},{last + 1}"
    assert settings["session.intra_op_thread_affinities"] == f"{places};{places}"
    with VLM.load(tiny_bundle, affinity=[first], spin="off") as vlm:
        assert vlm.backend.threads == 1  # type: ignore[attr-defined]
    if len(allowed) > 1:
        with VLM.load(tiny_bundle, affinity=allowed) as vlm:
            assert vlm.generate("Hi", max_new_tokens=3).token_ids


@pytest.mark.parametrize(
    "affinity",
    ["", "a", "1-", "3-1", "0,,1", "-1", "0;1", [], [-1], [True], ["0"], [0.0], 3, [10**6], "1000000", [None]],
)
def test_affinity_that_is_none(tiny_bundle: Path, affinity: Any) -> None:
    with pytest.raises(OptionError, match="affinity"):
        VLM.load(tiny_bundle, affinity=affinity)


def test_threads_and_spin_that_fit_nothing(tiny_bundle: Path) -> None:
    with pytest.raises(OptionError, match="threads=2 are more than the CPUs of affinity, 0"):
        VLM.load(tiny_bundle, threads=2, affinity="0")
    for spin in ("yes", True, None, ["auto"]):
        with pytest.raises(OptionError, match="spin must be auto, on or off"):
            VLM.load(tiny_bundle, spin=spin)  # type: ignore[arg-type]
