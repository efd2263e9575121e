"""Profiles beside each other: what is noise, what is change, and what cannot be compared."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mllm_edge.errors import DataError
from mllm_edge.runtime.profiling.diff import Change, compare_profiles, differences, read_profiles
from mllm_edge.runtime.profiling.measure import profile


@pytest.fixture(scope="module")
def data(tiny_bundle: Path) -> dict[str, Any]:
    """A profile whose spreads are known: 10% everywhere."""
    found = profile(tiny_bundle, "Hi", new_tokens=4, warmup=0, iterations=2).as_dict()
    for figure in (*found["stages"].values(), found["ttft"], found["tpot"], found["total"]):
        figure["spread"] = 0.1
    found["noise"]["noisy"] = False
    return found


def _scaled(data: dict[str, Any], stage: str, factor: float) -> dict[str, Any]:
    other = copy.deepcopy(data)
    other["stages"][stage]["median"] *= factor
    return other


def _change(a: dict[str, Any], b: dict[str, Any], name: str) -> Change:
    return next(change for change in compare_profiles(a, b).changes if change.name == name)


def test_a_profile_equals_itself(data: dict[str, Any]) -> None:
    found = compare_profiles(data, data)
    assert found.warnings == ()
    assert {c.name for c in found.changes} == {*data["stages"], "ttft", "tpot", "total", "peak memory"}
    assert not any(change.beyond_noise for change in found.changes)
    assert all(change.growth == 0 for change in found.changes)


def test_another_speculation_is_named(data: dict[str, Any]) -> None:
    """Profiles that say nothing of it were written before there was any."""
    guessed, before = copy.deepcopy(data), copy.deepcopy(data)
    guessed["setting"]["speculation"] = 4
    del before["setting"]["speculation"]
    assert compare_profiles(data, before).warnings == ()
    assert compare_profiles(before, guessed).warnings == ("different speculation: 0 and 4",)


def test_noise_is_both_spreads_together(data: dict[str, Any]) -> None:
    within, beyond = (_change(data, _scaled(data, "prefill", f), "prefill") for f in (1.15, 1.16))
    assert within.noise == pytest.approx(within.before * 0.1 * (1 + 1.15**2) ** 0.5)
    assert (within.beyond_noise, beyond.beyond_noise) == (False, True)
    assert _change(data, _scaled(data, "prefill", 0.8), "prefill").beyond_noise


def test_only_growth_beyond_limit_and_noise_fails(data: dict[str, Any]) -> None:
    grown = _change(data, _scaled(data, "prefill", 1.2), "prefill")
    assert (grown.grew_above(0.1), grown.grew_above(0.25)) == (True, False)
    assert not _change(data, _scaled(data, "prefill", 0.5), "prefill").grew_above(0.1)
    assert not _change(data, _scaled(data, "prefill", 1.05), "prefill").grew_above(0.01)


def test_one_run_is_never_beyond_the_noise(data: dict[str, Any]) -> None:
    single = _scaled(data, "prefill", 3)
    single["stages"]["prefill"]["spread"] = single["total"]["spread"] = None
    found = compare_profiles(data, single)
    assert not next(c for c in found.changes if c.name == "prefill").beyond_noise
    assert any("one run" in text for text in found.warnings)


def test_memory_grows_by_more_than_two_per_cent(data: dict[str, Any]) -> None:
    other = copy.deepcopy(data)
    other["memory"]["peak"] = round(1.01 * data["memory"]["peak"])
    assert not _change(data, other, "peak memory").beyond_noise
    other["memory"]["peak"] = round(1.2 * data["memory"]["peak"])
    assert _change(data, other, "peak memory").grew_above(0.1)


@pytest.mark.parametrize(
    ("section", "name", "value", "words"),
    [
        ("machine", "processor", "another", "processor"),
        ("machine", "clocks", [{"governor": "powersave", "maximum_hz": 1.0}], "clock settings"),
        ("setting", "threads", 99, "threads"),
        ("setting", "new_tokens", 99, "new tokens"),
        ("bundle", "digest", "0", "bundle"),
        ("noise", "noisy", True, "noisy"),
    ],
)
def test_what_cannot_be_compared_is_a_warning(
    data: dict[str, Any], section: str, name: str, value: Any, words: str
) -> None:
    other = copy.deepcopy(data)
    other[section][name] = value
    warnings = compare_profiles(data, other).warnings
    assert len(warnings) == 1
    assert words in warnings[0]


def test_stages_of_one_only_are_named(data: dict[str, Any]) -> None:
    other = copy.deepcopy(data)
    del other["stages"]["connector"]
    assert compare_profiles(data, other).warnings == ("stages of one only: connector",)


def test_sweeps_are_paired_by_their_points(data: dict[str, Any]) -> None:
    a = [{**data, "point": {"new": n}} for n in (1, 2)]
    b = [{**_scaled(data, "prefill", 2), "point": {"new": n}} for n in (2, 3)]
    found = differences(a, b)
    assert [d.point for d in found] == [{"new": 2}]
    with pytest.raises(DataError, match="in common"):
        differences(a[:1], b)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a profile"),
        ('{"metrics": 1}', "not a profile"),
        ('{"version": 99, "stages": {}}', "version 99"),
        ('{"version": 1, "stages": {}}', "version 1, this mllm-edge reads 2"),
        ('{"version": 2, "stages": {}}', "lacks bundle"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DataError, match=words):
        read_profiles(file)


def test_a_sweep_is_read_as_its_profiles(data: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"version": 2, "sweep": {}, "profiles": [data, data]}))
    assert len(read_profiles(file)) == 2
