"""Every system that people ask for: those that are exported, with what the tests prove of them, and why others are not.

`proven.json` is written by the tests, of what passed; what is known from elsewhere: `known.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from mllm_edge.calibration.recipes import MOST_BITS
from mllm_edge.export.family import families
from mllm_edge.export.known import known_systems

__all__ = ["System", "systems"]

Status = Literal["supported", "planned", "impossible"]
_EIGHT = 8.25  # bits a weight of what sees images, scales included


@dataclass(frozen=True)
class System:
    """A kind of model. `model_type`: of config.json, "" where there is none; `why`: it is not exported.

    Of those that are: the `family` that exports it, its `decoders`, `components`, and the `precisions` and `targets`
    that the tests compare with the source; the smallest public `checkpoint`, and the bytes that its weights take at
    most in the recipe int4 (None: not known).
    """

    model_type: str
    name: str
    status: Status
    why: str = ""
    family: str = ""
    decoders: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    checkpoint: str = ""
    int4_bytes: int | None = None
    examples: tuple[str, ...] = ()


def systems() -> list[System]:
    """All systems: those that are exported first. Imports no torch."""
    proven = json.loads(files("mllm_edge.export").joinpath("proven.json").read_text("utf-8"))
    found = [_system(entry, proven) for entry in known_systems()]
    order: tuple[Status, ...] = ("supported", "planned", "impossible")
    return sorted(found, key=lambda system: order.index(system.status))


def _system(entry: Mapping[str, Any], proven: Mapping[str, Mapping[str, list[str]]]) -> System:
    model_type, family = entry["model_type"], families().get(entry["model_type"])
    if family is None:
        status: Status = "planned" if model_type else "impossible"
        return System(model_type, entry["name"], status, entry.get("why") or "not yet")
    shown = proven.get(family.name, {})
    return System(
        model_type,
        entry["name"],
        "supported",
        family=family.name,
        decoders=family.decoders,
        components=tuple(shown.get("components", ())),
        precisions=tuple(shown.get("precisions", ())),
        targets=tuple(shown.get("targets", ())),
        checkpoint=entry["checkpoint"],
        int4_bytes=round(1e9 * (entry["vision"] * _EIGHT + entry["decoder"] * MOST_BITS) / 8),
        examples=family.examples,
    )
