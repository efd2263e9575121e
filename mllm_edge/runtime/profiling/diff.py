"""Two profiles beside each other: what changed beyond the noise.

A stage changed when its medians differ by more than both spreads together, √(a² + b²), a spread being the largest
difference between the medians of a profile's own runs. A profile of one run has no spread, and nothing is beyond it.
Peak memory has no samples: a change by 2 per cent is one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_edge.errors import DataError
from mllm_edge.runtime.profiling.measure import VERSION

__all__ = ["Change", "Difference", "compare_profiles", "differences", "read_profiles"]

_MEMORY_NOISE = 0.02
_AGAIN = "write it with `mllm-edge profile BUNDLE --json FILE`"
# What makes two profiles incomparable when it differs, as section, field and words.
_SAME = (
    ("machine", "processor", "processor"),
    ("machine", "affinity", "CPUs that may be used"),
    ("machine", "memory", "memory"),
    ("machine", "gpus", "GPUs"),
    ("setting", "backend", "backend"),
    ("setting", "threads", "threads"),
    ("setting", "max_context", "--max-context"),
    ("setting", "image_sizes", "image sizes"),
    ("setting", "prompt_tokens", "prompt tokens"),
    ("setting", "new_tokens", "new tokens"),
    ("setting", "speculation", "speculation"),
    ("bundle", "digest", "bundle"),
)
# What profiles mean that were written before there was such a setting.
_UNTOLD = {"speculation": 0}


@dataclass(frozen=True)
class Change:
    """One figure of both: the medians `before` and `after` (seconds, or bytes for peak memory), and the `noise` in the
    same unit; None where it cannot be known."""

    name: str
    before: float
    after: float
    noise: float | None

    @property
    def growth(self) -> float:
        """after / before − 1."""
        if self.before:
            return self.after / self.before - 1
        return math.inf if self.after else 0.0

    @property
    def beyond_noise(self) -> bool:
        """Whether it changed at all."""
        return self.noise is not None and abs(self.after - self.before) > self.noise

    def grew_above(self, limit: float) -> bool:
        """Whether it grew by more than that share, beyond the noise."""
        return self.beyond_noise and self.growth > limit

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        growth = self.growth if math.isfinite(self.growth) else None
        return {**vars(self), "growth": growth, "beyond_noise": self.beyond_noise}


@dataclass(frozen=True)
class Difference:
    """Of one pair of profiles: the sweep's `point` that both are of, what makes them hard to compare, the changes."""

    point: Mapping[str, Any]
    warnings: tuple[str, ...]
    changes: tuple[Change, ...]

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        changes = [change.as_dict() for change in self.changes]
        return {"point": dict(self.point), "warnings": list(self.warnings), "changes": changes}


def read_profiles(path: str | Path) -> list[dict[str, Any]]:
    """The profiles in a JSON file, one or those of a sweep; raises DataError when it holds none of this version."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(f"{path}: not valid JSON ({e})", _AGAIN) from None
    if not isinstance(data, dict) or "version" not in data or not ("stages" in data or "profiles" in data):
        raise DataError(f"{path}: not a profile", _AGAIN)
    if data["version"] != VERSION:
        raise DataError(f"{path}: a profile of version {data['version']}, this mllm-edge reads {VERSION}", _AGAIN)
    found: list[dict[str, Any]] = data.get("profiles", [data])
    for profile in found:
        missing = {"stages", "total", "ttft", "tpot", "memory", "machine", "setting", "bundle"} - set(profile)
        if missing:
            raise DataError(f"{path}: the profile lacks {', '.join(sorted(missing))}", _AGAIN)
    return found


def differences(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Of profiles with the same point; raises DataError when no two have one."""
    others = {_key(profile): profile for profile in b}
    pairs = [(profile, others[_key(profile)]) for profile in a if _key(profile) in others]
    if not pairs:
        raise DataError("the two files have no point of a sweep in common", "compare sweeps over the same values")
    return [compare_profiles(before, after) for before, after in pairs]


def compare_profiles(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    """`b` against `a`, both in their JSON form: the stages that both have, TTFT, TPOT, the whole call, peak memory."""
    names = [name for name in a["stages"] if name in b["stages"]]
    pairs = [(name, a["stages"][name], b["stages"][name]) for name in names]
    pairs += [(name, a[name], b[name]) for name in ("ttft", "tpot", "total") if a[name] and b[name]]
    changes = [Change(name, x["median"], y["median"], _noise(x, y)) for name, x, y in pairs]
    before, after = a["memory"]["peak"], b["memory"]["peak"]
    changes.append(Change("peak memory", before, after, _MEMORY_NOISE * before))
    return Difference(a.get("point", {}), tuple(_warnings(a, b)), tuple(changes))


def _noise(a: Mapping[str, Any], b: Mapping[str, Any]) -> float | None:
    """Both spreads together."""
    if a["spread"] is None or b["spread"] is None:
        return None
    return math.hypot(a["spread"] * a["median"], b["spread"] * b["median"])


def _warnings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    found = []
    for section, name, words in _SAME:
        x, y = (side[section].get(name, _UNTOLD.get(name)) for side in (a, b))
        if x != y:
            shown = f"{a['bundle']['path']} and {b['bundle']['path']}" if name == "digest" else f"{x} and {y}"
            found.append(f"different {words}: {shown}")
    if _governors(a) != _governors(b):
        found.append(f"different clock settings: {_governors(a)} and {_governors(b)}")
    for side in (x for x in (a, b) if x.get("noise", {}).get("noisy")):
        found.append(f"{side['bundle']['path']}, {side['created']}: the machine was noisy")
    if any(x["total"]["spread"] is None for x in (a, b)):
        found.append("a profile has one run: nothing is beyond the noise (measure with --runs 3)")
    missing = sorted(set(a["stages"]) ^ set(b["stages"]))
    return [*found, f"stages of one only: {', '.join(missing)}"] if missing else found


def _governors(profile: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    return [(clock["governor"], clock["maximum_hz"]) for clock in profile["machine"].get("clocks", [])]


def _key(profile: Mapping[str, Any]) -> str:
    return json.dumps(profile.get("point", {}), sort_keys=True)
