"""What a profile is written as: JSON, CSV, a Chrome trace. Files are written whole or not at all."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_edge.errors import MllmEdgeError
from mllm_edge.runtime.profiling.measure import Profile

__all__ = ["check_places", "chrome_trace", "csv_text", "schema", "write_whole"]


def schema() -> dict[str, Any]:
    """The JSON schema of what `profile` writes."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("profile.schema.json").read_text(encoding="utf-8"))
    return data


def check_places(paths: Sequence[str | Path]) -> None:
    """Raise MllmEdgeError unless each path can become a file, all of them different: to be asked before long work."""
    for path in map(Path, paths):
        if path.is_dir():
            raise MllmEdgeError(f"{path} is a folder", "name a file in it")
        if not path.parent.is_dir():
            raise MllmEdgeError(f"{path.parent} does not exist", f"mkdir -p {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise MllmEdgeError(f"{path.parent} cannot be written to", "name a file in another folder")
    places = [Path(path).resolve() for path in paths]
    for place in places:
        if places.count(place) > 1:
            raise MllmEdgeError(f"{place} is named twice", "give each file a name of its own")


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file at once: it appears whole, or what was there stays."""
    place = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as f:
            f.write(text)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, place)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def csv_text(profiles: Sequence[Profile]) -> str:
    """One row for each stage of each call that is counted, and of the cold ones: seconds. The last columns are the
    sweep's keys."""
    keys = list(dict.fromkeys(key for p in profiles for key in p.point))
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(["bundle", "run", "call", "stage", "seconds", *keys])
    for p in profiles:
        point = [p.point.get(key, "") for key in keys]
        for number, run in enumerate(p.runs, 1):
            for title, call in [("cold", run.cold), *((str(n), call) for n, call in enumerate(run.calls, 1))]:
                spans = {**call.stages, "ttft": call.ttft, "total": call.total}
                if title == "cold":
                    spans |= {f"load, {name}": seconds for name, seconds in run.load_stages.items()}
                rows.writerows([p.bundle.path, number, title, name, spent, *point] for name, spent in spans.items())
    return buffer.getvalue()


def chrome_trace(profiles: Sequence[Profile]) -> dict[str, Any]:
    """The spans of the load and of every call in Chrome's trace event format, times in µs; a profile is a process."""
    begin = min((trace.origin for p in profiles for _, trace in p.traces), default=0.0)
    events: list[dict[str, Any]] = []
    for number, p in enumerate(profiles, 1):
        point = "".join(f", {key} {value}" for key, value in p.point.items())
        named = {"name": "process_name", "ph": "M", "pid": number, "tid": 0, "args": {"name": p.bundle.path + point}}
        events.append(named)
        for title, trace in p.traces:
            end = max((span.start + span.seconds for span in trace.spans), default=0.0)
            spans = [(title, 0.0, end), *((span.name, span.start, span.seconds) for span in trace.spans)]
            events += [
                {
                    "name": name,
                    "cat": title,
                    "ph": "X",
                    "pid": number,
                    "tid": 0,
                    "ts": 1e6 * (trace.origin - begin + start),
                    "dur": 1e6 * seconds,
                }
                for name, start, seconds in spans
            ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
