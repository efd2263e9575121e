"""What a profile is written as: JSON, CSV, a Chrome trace. Files are written whole or not at all."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_edge.files import check_places, write_whole
from mllm_edge.runtime.profiling.measure import Profile

__all__ = ["check_places", "chrome_trace", "csv_text", "schema", "write_whole"]


def schema() -> dict[str, Any]:
    """The JSON schema of what `profile` writes."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("profile.schema.json").read_text(encoding="utf-8"))
    return data


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
