"""The profiler: stages that are the call, statistics that admit what they cannot know, and files as the schema says."""

import csv
import io
import itertools
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError, BundleError, ImageError, MllmEdgeError
from mllm_edge.runtime import limits
from mllm_edge.runtime.machine.power import IDLE_SAMPLES, PowerMeter
from mllm_edge.runtime.planning.memory import MemoryModel
from mllm_edge.runtime.planning.shapes import layouts_of
from mllm_edge.runtime.profiling import files, measure, memory, roofline
from mllm_edge.runtime.profiling import runs as runs_module
from mllm_edge.runtime.profiling.environment import Clock, read_clocks, read_environment, versions
from mllm_edge.runtime.profiling.first_use import first_use
from mllm_edge.runtime.profiling.measure import Profile, profile, synthetic_image
from mllm_edge.runtime.profiling.runs import shares
from mllm_edge.runtime.profiling.statistics import (
    PERCENTILES,
    Distribution,
    is_settled,
    jitter,
    noise,
    samples_needed,
)
from mllm_edge.runtime.profiling.sweep import KEYS, parse_sweep, points, prompt_of, run_sweep, sweep_dict
from mllm_edge.runtime.prompt.tokenizer import Tokenizer
from mllm_edge.runtime.trace import LOAD_STAGES, in_order
from mllm_edge.runtime.trace import STAGES as FIXED_STAGES

STAGES = tuple(in_order([*FIXED_STAGES, "vision_encoder", "connector"]))


def check_schema(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str = "$") -> None:
    """The part of JSON Schema that the profile's schema uses; raises AssertionError that names the place."""
    known = {"type", "properties", "required", "additionalProperties", "items", "anyOf", "oneOf", "enum", "const"}
    assert set(schema) <= known | {"$ref", "$defs", "$schema", "title", "description"}, f"{where}: {set(schema)}"
    if "$ref" in schema:
        return check_schema(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, where)
    for choices in (schema[word] for word in ("anyOf", "oneOf") if word in schema):
        errors = [_error(value, choice, root, where) for choice in choices]
        assert errors.count(None) >= 1, f"{where}: {errors}"
    if "const" in schema:
        assert value == schema["const"], where
    if "enum" in schema:
        assert value in schema["enum"], where
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    types |= {"integer": int, "number": (int, float)}  # type: ignore[dict-item]
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        assert any(isinstance(value, types[name]) for name in names), f"{where}: {value!r} is no {names}"
        assert not (isinstance(value, bool) and "boolean" not in names), where
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), f"{where}: {set(schema['required']) - set(value)}"
        for key, entry in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            assert inner is not False, f"{where}.{key}"
            check_schema(entry, inner, root, f"{where}.{key}")
    if isinstance(value, list):
        for n, entry in enumerate(value):
            check_schema(entry, schema.get("items", {}), root, f"{where}[{n}]")


def _error(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> str | None:
    try:
        check_schema(value, schema, root, where)
    except AssertionError as e:
        return str(e)
    return None


@pytest.fixture(scope="module")
def result(tiny_bundle: Path) -> Profile:
    return profile(tiny_bundle, "Hi", new_tokens=6, runs=2, warmup=1, iterations=3)


# ---------------------------------------------------------------- statistics
def test_distribution_of_one_sample_has_no_percentiles_and_no_spread() -> None:
    assert Distribution.of([[3.0]]) == Distribution(1, 3.0, 3.0, 3.0, {}, None, 0)


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_percentiles_need_enough_samples(percentile: int) -> None:
    needed = samples_needed(percentile)
    samples = np.random.default_rng(0).random(needed)
    full = Distribution.of([samples[:3], samples[3:]]).percentiles
    assert full[f"p{percentile}"] == pytest.approx(np.percentile(samples, percentile))
    assert f"p{percentile}" not in Distribution.of([samples[:-1]]).percentiles


def test_samples_needed() -> None:
    assert [samples_needed(p) for p in PERCENTILES] == [10, 10, 100]


def test_spread_is_between_the_medians_of_runs() -> None:
    found = Distribution.of([[1.0, 2.0, 9.0], [3.0, 2.0, 3.0], [4.0, 2.0]])
    assert (found.count, found.median, found.minimum, found.maximum) == (8, 2.5, 1.0, 9.0)
    assert found.spread == pytest.approx((3 - 2) / 2.5)
    assert Distribution.of([[1.0, 2.0, 9.0]]).spread is None


def _profiles(random: np.random.Generator) -> tuple[list[list[float]], list[list[float]]]:
    """Two profiles of the same thing: loads differ by 8%, calls of one load by 1%, and they drift while they run."""
    loads = 1 + 0.08 * random.standard_normal((2, 3))
    calls = loads[..., None] * (1 + 0.01 * random.standard_normal((2, 3, 4)) + 0.01 * np.linspace(0, 1, 4))
    return calls[0].tolist(), calls[1].tolist()


def test_two_profiles_agree_within_the_spread_that_they_report() -> None:
    random = np.random.default_rng(0)
    pairs = [[Distribution.of(runs) for runs in _profiles(random)] for _ in range(2000)]
    apart = [abs(a.median - b.median) > np.hypot(a.spread * a.median, b.spread * b.median) for a, b in pairs]
    assert 0.01 < np.mean(apart) < 0.06  # not by inflating
    # What the calls of the first loads alone would have said.
    single = [[Distribution.of(runs[:1]) for runs in _profiles(random)] for _ in range(2000)]
    apart = [abs(a.median - b.median) > np.hypot(a.maximum - a.minimum, b.maximum - b.minimum) for a, b in single]
    assert np.mean(apart) > 0.5


def test_calls_have_settled_when_the_last_two_are_not_faster() -> None:
    falling = [2.0, 1.5, 1.2, 1.1, 1.05, 1.045, 1.048]
    assert [is_settled(falling[:n]) for n in range(8)] == [False] * 7 + [True]
    assert is_settled([1.0, 1.3, 1.2])
    assert not is_settled([1.0, 1.3, 0.9])
    assert is_settled([1.0, 0.995, 0.992])  # by less than 1%


def test_outliers_lie_three_interquartile_ranges_outside() -> None:
    assert Distribution.of([[1.0, 2.0, 3.0, 4.0, 5.0, 10.0]]).outliers == 0
    assert Distribution.of([[1.0, 2.0, 3.0, 4.0], [5.0, 13.0, -9.0, 3.0]]).outliers == 2


def test_jitter_is_between_neighbours_of_one_call() -> None:
    found = jitter([[1.0, 3.0, 1.0], [7.0]])
    assert found is not None
    assert (found.seconds, found.relative) == (2.0, 1.0)
    assert jitter([[1.0], []]) is None
    assert jitter([]) is None


def test_noise_is_the_larger_spread() -> None:
    quiet, loud = [[1.0], [1.01, 1.02]], [[1.0], [1.2, 1.1]]
    assert (noise(quiet, loud).name, noise(quiet, loud).noisy) == ("tpot", True)
    assert (noise(quiet, []).name, noise(quiet, []).noisy) == ("total", False)
    assert noise([[1.0, 1.2]], [[1.0, 1.2]]).spread is None
    assert not noise([[1.0, 1.2]], [[1.0, 1.2]]).noisy


def test_runs_share_the_calls() -> None:
    assert [shares(10, 3), shares(2, 3), shares(4, 1)] == [[4, 3, 3], [1, 1], [4]]


# ---------------------------------------------------------------- environment
def test_clocks_are_read_from_sysfs(tmp_path: Path) -> None:
    for number, cpus, current in (("10", "2 3", "1500000"), ("2", "0 1", "")):
        folder = tmp_path / "sys/devices/system/cpu/cpufreq" / f"policy{number}"
        folder.mkdir(parents=True)
        for name, text in {
            "affected_cpus": cpus,
            "scaling_governor": "schedutil",
            "scaling_min_freq": "800000",
            "scaling_max_freq": "2000000",
            "scaling_cur_freq": current,
        }.items():
            (folder / name).write_text(f"{text}\n")
    assert read_clocks(tmp_path) == (
        Clock((0, 1), "schedutil", 8e8, 2e9, None),
        Clock((2, 3), "schedutil", 8e8, 2e9, 1.5e9),
    )
    assert read_clocks(tmp_path / "nowhere") == ()


def test_environment_and_versions() -> None:
    machine = read_environment()
    assert machine.cores > 0
    assert machine.affinity is None or len(machine.affinity) == len(os.sched_getaffinity(0))
    assert {"mllm-edge", "python", "numpy", "onnxruntime"} <= set(versions("cpu"))


# ---------------------------------------------------------------- measurement
def test_synthetic_image_is_always_the_same() -> None:
    first, second = (np.asarray(synthetic_image()) for _ in range(2))
    assert first.shape == (480, 640, 3)
    assert np.array_equal(first, second)


def test_every_call_has_the_tokens_asked_for(tiny_bundle: Path) -> None:
    calls: list[int] = []
    result = profile(tiny_bundle, "Hi", new_tokens=12, runs=2, warmup=1, iterations=3, progress=calls.append)
    assert calls == [1] * 7  # the cold ones, too
    assert result.setting.new_tokens == 12
    assert result.tpot is not None
    assert result.tpot.count == 3 * 11
    assert tuple(result.stages) == STAGES
    assert all(d.count == 3 and 0 < d.minimum <= d.median <= d.maximum for d in result.stages.values())
    assert result.setting.tiles > 0
    titles = {1: ["load", "cold", "warm-up 1", "call 1", "call 2"], 2: ["load", "cold", "warm-up 1", "call 1"]}
    assert [title for title, _ in result.traces] == [f"run {n}, {title}" for n in titles for title in titles[n]]


def test_figures_are_of_all_runs_and_spreads_between_them(result: Profile) -> None:
    assert [len(run.calls) for run in result.runs] == [2, 1]
    medians = [np.median([call.total for call in run.calls]) for run in result.runs]
    assert result.total.median == np.median([call.total for call in result.calls])
    assert result.total.spread == pytest.approx(abs(medians[0] - medians[1]) / result.total.median)
    prefill = [np.median([call.stages["prefill"] for call in run.calls]) for run in result.runs]
    assert result.stages["prefill"].spread == pytest.approx(np.ptp(prefill) / result.stages["prefill"].median)
    tpots = [float(np.mean(call.token_seconds)) for call in result.calls]
    assert result.tokens_per_second == pytest.approx(1 / np.median(tpots))
    assert result.noise.spread == max(result.total.spread, Distribution.of([tpots[:2], tpots[2:]]).spread or 0)


def test_calls_are_made_until_they_settle_but_no_more_than_allowed(tiny_bundle: Path, monkeypatch) -> None:
    told = iter([False, False, True, True, False, False, False, False])
    monkeypatch.setattr(runs_module, "is_settled", lambda totals: next(told))
    found = profile(tiny_bundle, "Hi", new_tokens=1, runs=2, warmup=3, iterations=2)
    assert [(run.warmup, run.settled) for run in found.runs] == [(2, True), (3, False)]


def test_counts_are_positive(tmp_path: Path) -> None:
    for runs, iterations in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=r"^(runs|iterations) must be a whole number from 1 on, not 0"):
            profile(tmp_path, "Hi", runs=runs, iterations=iterations)


def test_the_stages_do_not_overlap_and_are_within_the_call(result: Profile) -> None:
    assert 0 < result.coverage <= 1
    counted = [trace for title, trace in result.traces if ", call " in title]
    for trace, call in zip(counted, result.calls, strict=True):
        spans = sorted(trace.spans, key=lambda span: span.start)
        assert {span.name for span in spans} == set(STAGES)
        for before, after in itertools.pairwise(spans):
            assert before.start + before.seconds <= after.start
        assert sum(call.stages.values()) == pytest.approx(sum(span.seconds for span in spans))
        assert sum(call.stages.values()) <= call.total
        counts = {name: sum(span.name == name for span in spans) for name in ("first_token", "decode", "sample")}
        assert counts == {"first_token": 1, "decode": 5, "sample": 5}


def test_the_first_call_is_apart(result: Profile) -> None:
    for run in result.runs:
        assert set(run.cold.stages) == set(STAGES)
        assert set(run.load_stages) == set(LOAD_STAGES)
        assert run.load == pytest.approx(sum(run.load_stages.values()))
        assert run.cold not in result.calls
    traces = dict(result.traces)
    for loading, cold in ((traces[f"run {n}, load"], traces[f"run {n}, cold"]) for n in (1, 2)):
        assert cold.origin >= loading.origin + max(span.start + span.seconds for span in loading.spans)
    assert len(result.calls) == 3


def test_the_models_end_is_ignored(tiny_bundle: Path) -> None:
    with VLM.load(tiny_bundle) as vlm:
        first = vlm.generate("Hi", max_new_tokens=1).token_ids[0]
        vlm.stop_ids = frozenset({first})
        assert vlm.generate("Hi", max_new_tokens=5).token_ids == ()
        assert len(vlm.generate("Hi", max_new_tokens=5, ignore_eos=True).token_ids) == 5


def test_one_token_has_no_intervals(tiny_bundle: Path) -> None:
    result = profile(tiny_bundle, "Hi", new_tokens=1, warmup=0, iterations=1)
    data = result.as_dict()
    assert result.tokens_per_second == 0
    assert data["tpot"] is None
    assert data["jitter"] is None
    assert data["noise"]["spread"] is None
    assert "decode" not in data["stages"]
    check_schema(data, files.schema(), files.schema())


def test_given_images_are_used(tiny_bundle: Path) -> None:
    images = [np.zeros((64, 48, 3), np.uint8)] * 2
    one, two = (profile(tiny_bundle, "Hi", images[:n], new_tokens=2, warmup=0, iterations=1) for n in (1, 2))
    assert (one.setting.images, two.setting.images) == ("ndarray", "ndarray, ndarray")
    assert two.setting.image_sizes == ((48, 64), (48, 64))
    assert two.setting.tiles == 2 * one.setting.tiles


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        profile(tmp_path, "Hi")


def test_an_unreadable_image_is_found_before_the_load(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        profile(tmp_path, "Hi", [str(tmp_path / "absent.png")])


# ---------------------------------------------------------------- memory
def test_memory_adds_up(result: Profile, tiny_bundle: Path) -> None:
    m, bundle = result.memory, Bundle.load(tiny_bundle)
    assert m.base + sum(m.weights.values()) + m.kv_cache + m.rest == m.peak
    assert set(m.weights) == {"vision_encoder", "connector", "decoder"}
    predicted = m.predicted
    assert 0 < predicted.kv_cache <= m.kv_cache, "what of it is written"
    assert predicted.weights > sum(m.weights.values()), "as the engine keeps them"
    assert m.error_percent == pytest.approx(100 * (predicted.total - m.peak) / m.peak)
    layouts, s = layouts_of(bundle.manifest.model.image, [(640, 480)]), result.setting
    capacity = limits.CAPACITY_STEP
    planned = MemoryModel(bundle, "cpu").predict(s.prompt_tokens, layouts, [(480, 640)], s.new_tokens, capacity, m.base)
    assert predicted.total == planned.peak
    assert predicted.activations == planned.vision + planned.prefill
    assert "GPU memory: no GPU is in use" in m.notes
    if sys.platform == "linux":  # elsewhere a process cannot forget its peak
        assert m.stages is not None
        assert tuple(m.stages) == (*LOAD_STAGES, *STAGES)
        assert max(m.stages.values()) <= m.peak


def test_pictures_are_predicted_as_decoded_and_as_pixel_values(result: Profile, tiny_bundle: Path) -> None:
    image = Bundle.load(tiny_bundle).manifest.model.image
    assert image is not None
    assert image.patches is None
    pixels = result.setting.tiles * image.channels * image.height * image.width
    assert result.memory.predicted.images == 3 * 640 * 480 + 5 * pixels


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="what stages take is read from Linux's /proc; elsewhere there is no base to predict from",
)
def test_the_prediction_of_a_fresh_process_is_near(tiny_bundle: Path) -> None:
    code = (
        "import sys; from mllm_edge.runtime.profiling.measure import profile\n"
        "found = profile(sys.argv[1], 'Hi', new_tokens=4, runs=1, warmup=0, iterations=1).memory\n"
        "print(found.error_percent, found.base - found.stages['backend'])"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_bundle], capture_output=True, text=True, check=True)
    error, used = map(float, done.stdout.split())
    assert abs(error) < 15
    assert 2e6 < used < 1e8  # the library's code alone


def test_a_process_that_fails_tells_nothing(monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert first_use() is None
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert first_use() is None


def test_what_the_first_use_took_counts_only_in_a_process_that_was_new(tiny_bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr(measure, "first_use", lambda: 10**12)
    options: dict[str, Any] = {"new_tokens": 1, "runs": 1, "warmup": 0, "iterations": 1}
    assert profile(tiny_bundle, "Hi", **options).memory.base < 10**12
    monkeypatch.delitem(sys.modules, "onnxruntime")
    assert profile(tiny_bundle, "Hi", **options).memory.base > 10**12
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(measure, "first_use", lambda: None)
    found = profile(tiny_bundle, "Hi", **options).memory
    assert found.base < 10**12
    assert any("first use of the libraries" in note for note in found.notes)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process forget its peak: /proc/self/clear_refs")
def test_a_watched_stage_has_its_own_peak() -> None:
    trace = memory.WatchedTrace()
    # From the system, whatever this process has freed before.
    with trace.span("large"), mmap.mmap(-1, 40_000_000) as block:
        block.write(b"1" * len(block))
    with trace.span("small"):
        pass
    assert trace.peaks["large"] - trace.peaks["small"] > 30_000_000


def test_where_peaks_cannot_be_read_it_is_said(tiny_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "absent" / "clear_refs")
    result = profile(tiny_bundle, "Hi", new_tokens=2, warmup=0, iterations=1)
    assert result.memory.stages is None
    assert any("peak of each stage" in text for text in result.memory.notes)
    check_schema(result.as_dict(), files.schema(), files.schema())


# ---------------------------------------------------------------- files
def test_the_json_form_is_as_the_schema_says(result: Profile) -> None:
    data = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    check_schema(data, files.schema(), files.schema())
    with pytest.raises(AssertionError):
        check_schema({**data, "load": 1}, files.schema(), files.schema())
    del data["memory"]["base"]
    with pytest.raises(AssertionError):
        check_schema(data, files.schema(), files.schema())


def test_operators_and_power_are_measured_when_asked(tiny_bundle: Path, result: Profile, monkeypatch) -> None:
    monkeypatch.setattr(measure, "PowerMeter", partial(PowerMeter, period=1e-4))
    assert result.operators is result.power is None
    found = profile(tiny_bundle, "Hi", new_tokens=3, warmup=0, iterations=2, operators=True, power=True)
    assert found.operators is not None
    assert {o.stage for o in found.operators} == {"vision_encoder", "connector", "prefill", "decode"}
    assert found.power is not None
    assert sum(call.total for call in found.calls) <= found.power.seconds
    assert found.power.idle.samples == IDLE_SAMPLES
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    check_schema(data, files.schema(), files.schema())
    assert len(data["operators"]) == len(found.operators)


def test_operators_are_not_told_by_every_backend(tiny_bundle: Path, monkeypatch) -> None:
    load = VLM.load

    def load_elsewhere(path: Path, **options: Any) -> VLM:
        vlm = load(path, **options)
        vlm.backend.target = vlm.backend.name = "cuda"
        return vlm

    monkeypatch.setattr(VLM, "load", load_elsewhere)
    with pytest.raises(BackendError, match="told by the CPU and TensorRT, not by cuda"):
        profile(tiny_bundle, "Hi", operators=True)


def test_csv_has_a_row_for_each_stage_and_call(result: Profile) -> None:
    rows = list(csv.DictReader(io.StringIO(files.csv_text([result]))))
    assert len(rows) == 5 * (len(STAGES) + 2) + 2 * 2
    found = {(row["run"], row["call"], row["stage"]): float(row["seconds"]) for row in rows}
    assert found["1", "2", "prefill"] == result.calls[1].stages["prefill"]
    assert found["2", "1", "prefill"] == result.calls[2].stages["prefill"]
    assert found["2", "cold", "total"] == result.runs[1].cold.total
    assert found["2", "cold", "load, open"] == result.runs[1].load_stages["open"]


def test_chrome_trace_has_the_spans_of_every_call(result: Profile) -> None:
    data = json.loads(json.dumps(files.chrome_trace([result])))
    spans = [event for event in data["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == sum(len(trace.spans) + 1 for _, trace in result.traces)
    assert min(event["ts"] for event in spans) == 0
    last = [event for event in spans if event["cat"] == "run 2, call 1" and event["name"] == "prefill"]
    assert last[0]["dur"] == pytest.approx(1e6 * result.calls[2].stages["prefill"])


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "a.json"
    files.write_whole(place, "old")

    def fail(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        files.write_whole(place, "new")
    assert place.read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


def test_bad_places_are_named(tmp_path: Path) -> None:
    files.check_places([tmp_path / "a.json", tmp_path / "b.csv"])
    for paths, words in (
        ([tmp_path], "is a folder"),
        ([tmp_path / "absent" / "a.json"], "absent does not exist"),
        ([tmp_path / "a", tmp_path / "." / "a"], "named twice"),
    ):
        with pytest.raises(MllmEdgeError, match=words):
            files.check_places(paths)


# ---------------------------------------------------------------- sweeps
def test_points_are_all_combinations() -> None:
    sweep = parse_sweep(["new=2,4", "size=64x48"], ["a", "b"])
    assert sweep == {"new": [2, 4], "size": ["64x48"], "bundle": ["a", "b"]}
    assert points(sweep)[1] == {"new": 2, "size": "64x48", "bundle": "b"}
    assert len(points(sweep)) == 4
    assert points({}) == [{}]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["speculation=on,off"], "speculation=on: .*, a whole number from 0 to 15"),
        (["speculation=0,16"], "speculation=16"),
        (["zzz=1"], ", ".join(KEYS)),
        (["new=0"], "new=0"),
        (["new="], "new="),
        (["size=64"], "WIDTHxHEIGHT"),
        (["new=1", "new=2"], "given twice"),
        (["new=1,1"], "same value twice"),
        (["bundle=a"], "named twice"),
    ],
)
def test_bad_sweeps_are_refused_by_name(texts: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_sweep(texts, ["a", "b"])


def test_a_prompt_of_so_many_tokens(tiny_bundle: Path) -> None:
    tokenizer = Tokenizer.load(tiny_bundle, Bundle.load(tiny_bundle).generation())
    for tokens in (1, 7, 50):
        text = prompt_of(tiny_bundle, "What is it?", tokens)
        assert len(tokenizer.encode(text, add_special_tokens=False)) == tokens


def test_a_sweep_measures_what_its_points_say(tiny_bundle: Path) -> None:
    sweep = parse_sweep(["images=1,2", "size=64x32", "new=2,3", "prompt=9"], [str(tiny_bundle)])
    found = run_sweep(tiny_bundle, "Hi", (), sweep, warmup=0, iterations=1, threads=1)
    assert [(len(p.setting.image_sizes), p.setting.new_tokens) for p in found] == [(1, 2), (1, 3), (2, 2), (2, 3)]
    assert all(size == (64, 32) for p in found for size in p.setting.image_sizes)
    assert found[2].setting.images == "synthetic, 64 x 32 px, seed 0, synthetic, 64 x 32 px, seed 0"
    data = json.loads(json.dumps(sweep_dict(sweep, found)))
    check_schema(data, files.schema(), files.schema())
    assert data["profiles"][3]["point"] == {"images": 2, "size": "64x32", "new": 3, "prompt": 9}
    header = files.csv_text(found).splitlines()[0]
    assert header == "bundle,run,call,stage,seconds,images,size,new,prompt"


def test_a_sweep_over_speculation(tiny_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    """The decoder's share of the limit is that of a step, which runs the guesses as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(roofline, "_SECONDS", 0.01)
    sweep = parse_sweep(["speculation=0,4"], [str(tiny_bundle)])
    text, options = "abcabcabcabc " * 3, {"new_tokens": 40, "warmup": 0, "iterations": 2, "limits": True}
    without, guessed = run_sweep(tiny_bundle, text, (), sweep, runs=1, threads=1, **options)
    data = json.loads(json.dumps(sweep_dict(sweep, [without, guessed])))
    check_schema(data, files.schema(), files.schema())
    assert [p["point"] for p in data["profiles"]] == [{"speculation": 0}, {"speculation": 4}]
    assert [p["setting"]["speculation"] for p in data["profiles"]] == [0, 4]
    assert "speculation" not in data["profiles"][0]
    s = guessed.speculation
    assert 0 < s.accepted < s.guessed
    assert s.decode_steps + s.accepted == 2 * 39
    assert data["profiles"][1]["speculation"]["acceptance"] == s.accepted / s.guessed
    assert data["profiles"][1]["speculation"]["tokens_per_step"] == pytest.approx(78 / s.decode_steps)
    assert all(call["decode_steps"] == s.decode_steps / 2 for call in data["profiles"][1]["runs"][0]["calls"])
    assert (without.jitter is None, guessed.jitter) == (False, None)
    assert without.tpot is not None
    assert guessed.tpot is not None
    assert (without.tpot.count, guessed.tpot.count) == (2 * 39, 2)
    roofs = [next(roof for roof in p.roofline or () if roof.stage == "decode") for p in (without, guessed)]
    assert roofs[0].seconds == pytest.approx(without.stages["decode"].median / 39)
    assert roofs[1].seconds == pytest.approx(guessed.stages["decode"].median / (s.decode_steps / 2))
    assert roofs[1].flops / roofs[0].flops == pytest.approx(1 + s.guessed / s.decode_steps, rel=1e-6)
    assert roofs[1].bytes == roofs[0].bytes


def test_speculation_out_of_range_is_found_before_the_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speculation must be"):
        profile(tmp_path, "Hi", speculation=16)


def test_given_images_are_resized_in_a_sweep(tiny_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (50, 40)).save(picture)
    found = run_sweep(tiny_bundle, "Hi", [str(picture)], {"size": ["20x30"]}, new_tokens=1, warmup=0, iterations=1)
    assert found[0].setting.images == f"{picture} at 20 x 30 px"
