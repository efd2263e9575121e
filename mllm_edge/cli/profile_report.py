"""Profiles as people read them: tables on a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mllm_edge.cli.output import bytes_text, milliseconds, table

if TYPE_CHECKING:
    from mllm_edge.runtime.machine.power import PowerReading
    from mllm_edge.runtime.profiling.environment import Environment
    from mllm_edge.runtime.profiling.measure import Profile
    from mllm_edge.runtime.profiling.operators import Operator
    from mllm_edge.runtime.profiling.statistics import Distribution

__all__ = ["named", "report", "sweep_report"]

_LONGEST = 5
# The stages, then what is made of several.
_NAMES = {
    "preprocess": "preprocess",
    "embed": "embed",
    "allocate": "allocate cache",
    "prefill": "prefill",
    "first_token": "first token",
    "decode": "decode",
    "sample": "sample",
    "detokenize": "detokenize",
    "ttft": "TTFT",
    "tpot": "TPOT",
    "total": "whole call",
}


def named(stage: str) -> str:
    """A stage as people read it; a component by its name."""
    return _NAMES.get(stage, stage.replace("_", " "))


def report(result: "Profile") -> str:
    """One profile: setting, stages, the load and the first call, memory, and what else was measured."""
    parts = [_setting(result), _stages(result), _figures(result), _memory(result)]
    if result.roofline is not None:
        parts.append(_roofline(result))
    if result.operators is not None:
        parts.append(_operators(result.operators))
    if result.power is not None:
        parts.append(_power(result.power))
    return "\n\n".join(parts)


def sweep_report(profiles: "Sequence[Profile]") -> str:
    """Several profiles: a row for each point."""
    keys = list(profiles[0].point)
    header = [", ".join(keys), "prompt tokens", "TTFT ms", "vision ms", "prefill ms", "TPOT ms", "tok/s", "call ms"]
    rows = [_sweep_row(p, keys) for p in profiles]
    parts = [_machine(profiles[0].machine), table([*header, "peak memory", "spread"], rows)]
    noisy = [p for p in profiles if p.noise.noisy]
    return "\n\n".join([*parts, *dict.fromkeys(_noise(p) for p in noisy[:1])])


def _sweep_row(p: "Profile", keys: Sequence[str]) -> list[str]:
    from mllm_edge.runtime.trace import STAGES

    stages = p.stages
    vision = sum(stages[name].median for name in stages if name not in STAGES)
    return [
        ", ".join(str(p.point[key]) for key in keys),
        str(p.setting.prompt_tokens),
        milliseconds(p.ttft.median),
        milliseconds(vision) if vision else "",
        milliseconds(stages["prefill"].median),
        milliseconds(p.tpot.median) if p.tpot else "",
        f"{p.tokens_per_second:.1f}" if p.tpot else "",
        milliseconds(p.total.median),
        bytes_text(p.memory.peak),
        "" if p.noise.spread is None else f"{p.noise.spread:.1%}",
    ]


def _setting(result: "Profile") -> str:
    s, b = result.setting, result.bundle
    images = f" ({s.image_tokens} of {s.tiles} image tiles)" if s.image_tokens else ""
    return "\n".join(
        [
            f"{b.path} ({b.recipe}), {s.threads} threads, {s.backend}",
            _machine(result.machine),
            ", ".join(f"{name} {version}" for name, version in result.versions.items()),
            f"{s.prompt_tokens} prompt tokens{images} + {s.new_tokens} new; image: {s.images}",
            _calls(result),
        ]
    )


def _calls(result: "Profile") -> str:
    runs = result.runs
    falling = [str(number) for number, run in enumerate(runs, 1) if not run.settled]
    settled = f"not seen to settle in run {', '.join(falling)}" if falling else "settled"
    warmup = ", ".join(str(run.warmup) for run in runs)
    loads = "1 run" if len(runs) == 1 else f"{len(runs)} runs, each with a load of its own"
    return f"{loads}: cold call, warm-up calls ({warmup}: {settled}); {result.setting.iterations} counted calls"


def _machine(machine: "Environment") -> str:
    clocks = dict.fromkeys(f"{c.governor} {_ghz(c.current_hz)} of {_ghz(c.maximum_hz)} GHz" for c in machine.clocks)
    load = f", load {machine.load_average[0]:.1f}" if machine.load_average else ""
    return f"{machine.processor}, {machine.cores} cores; clocks: {', '.join(clocks) or 'not told by the system'}{load}"


def _ghz(hz: float | None) -> str:
    return "?" if hz is None else f"{hz / 1e9:.1f}"


def _stages(result: "Profile") -> str:
    from mllm_edge.runtime.profiling.statistics import PERCENTILES, samples_needed

    measured = {**result.stages, "ttft": result.ttft, "total": result.total}
    if result.tpot:
        measured["tpot"] = result.tpot
    order = [*result.stages, *(name for name in _NAMES if name not in result.stages)]
    shown = {named(name): (name, measured[name]) for name in order if name in measured}
    names = [f"p{p}" for p in PERCENTILES if any(f"p{p}" in d.percentiles for _, d in shown.values())]
    total = result.total.median
    header = ["ms", "median", *names, "min", "max", "spread", "share", "outliers", "samples"]
    rows = [
        [title, *_row(d, names), _share(d.median / total, name), str(d.outliers), str(d.count)]
        for title, (name, d) in shown.items()
    ]
    lines = [table(header, rows), f"the stages make {result.coverage:.1%} of the call"]
    omitted = [p for p in PERCENTILES if any(f"p{p}" not in d.percentiles for _, d in shown.values())]
    if omitted:
        needs = ", ".join(f"p{p} {samples_needed(p)}" for p in omitted)
        lines.append(f"left out where samples are too few (needed: {needs}); raise --iterations")
    return "\n".join([*lines, _noise(result)])


def _share(share: float, name: str) -> str:
    """Of stages only: TTFT and the like are made of them."""
    return "" if name in ("ttft", "tpot", "total") else f"{share:.1%}"


def _row(d: "Distribution", names: list[str]) -> list[str]:
    percentiles = [milliseconds(d.percentiles[n]) if n in d.percentiles else "" for n in names]
    spread = "" if d.spread is None else f"{d.spread:.1%}"
    return [milliseconds(d.median), *percentiles, milliseconds(d.minimum), milliseconds(d.maximum), spread]


def _noise(result: "Profile") -> str:
    n = result.noise
    if n.spread is None:
        return "one run tells nothing about noise; measure with --runs 3 and as many --iterations or more"
    what = {"total": "whole call", "tpot": "time per token"}[n.name]
    figure = f"the runs' median {what} differs by up to {n.spread:.1%}, bound {n.bound:.0%}"
    return f"this machine is noisy: {figure}" if n.noisy else f"quiet: {figure}"


def _figures(result: "Profile") -> str:
    first = result.runs[0]
    rows = []
    if result.tokens_per_second:
        rows.append(["decode rate", f"{result.tokens_per_second:.1f} tok/s"])
    if result.setting.speculation:
        rows.append(["speculation", _speculation(result)])
    if result.jitter:
        share = f"{result.jitter.relative:.1%} of an interval"
        rows.append(["jitter", f"{milliseconds(result.jitter.seconds)} ms from token to token, {share}"])
    parts = ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in first.load_stages.items())
    rows.append(["load", f"{milliseconds(first.load)} ms ({parts})"])
    rows.append(["first call", f"TTFT {milliseconds(first.cold.ttft)} ms, whole {milliseconds(first.cold.total)} ms"])
    stages = ", ".join(f"{named(name)} {milliseconds(seconds)}" for name, seconds in first.cold.stages.items())
    rows.append(["", stages])
    return "\n".join(f"{name:<13}{value}" for name, value in rows)


def _speculation(result: "Profile") -> str:
    s = result.speculation
    if s.acceptance is None or s.tokens_per_step is None:
        return f"up to {result.setting.speculation} tokens, none was guessed"
    accepted = f"{s.acceptance:.0%} of the guesses accepted, {s.tokens_per_step:.2f} tokens a step"
    return f"up to {result.setting.speculation} tokens: {accepted}; TPOT is each call's mean"


def _memory(result: "Profile") -> str:
    m = result.memory
    rows = [
        ["peak memory", f"{bytes_text(m.peak)}, predicted {bytes_text(m.predicted.total)} ({m.error_percent:+.0f}%)"],
        ["base", f"{bytes_text(m.base)} (Python and the engine's library, used once)"],
        ["weights", f"{bytes_text(sum(m.weights.values()))} (+ {bytes_text(m.mapped)} read from disk row by row)"],
        ["KV cache", bytes_text(m.kv_cache)],
        ["rest", f"{bytes_text(m.rest)} (images, arenas, packed weights)"],
        ["bundle", bytes_text(result.bundle.nbytes)],
    ]
    if m.gpu is not None:
        predicted = f"predicted {bytes_text(m.predicted.on_gpu)} for weights, KV cache and activations"
        rows.insert(1, ["GPU memory", f"{bytes_text(m.gpu)} in use, by all processes; {predicted}"])
    lines = [f"{name:<13}{value}" for name, value in rows]
    if m.stages is not None:
        lines.append("peak while it ran: " + ", ".join(f"{named(n)} {bytes_text(b)}" for n, b in m.stages.items()))
    if m.gpu_stages is not None:
        lines.append(
            "GPU memory after it: " + ", ".join(f"{named(n)} {bytes_text(b)}" for n, b in m.gpu_stages.items())
        )
    return "\n".join([*lines, *m.notes])


def _roofline(result: "Profile") -> str:
    assert result.roofline is not None
    assert result.limits is not None
    header = ["stage", "ms", "MB", "Mop", "bound by", "of the limit", ""]
    rows = [
        [
            named(r.stage),
            milliseconds(r.seconds),
            f"{r.bytes / 1e6:.1f}",
            f"{r.flops / 1e6:.0f}",
            r.bound,
            f"{r.percent_of_limit:.0f}%",
            r.advice,
        ]
        for r in result.roofline
    ]
    rates = ", ".join(f"{name} {rate / 1e9:.0f} Gop/s" for name, rate in result.limits.flops_per_second.items())
    return "\n".join(
        [
            table(header, rows),
            f"limits of this processor: reads {result.limits.read_bytes_per_second / 1e9:.1f} GB/s, {rates}; "
            f"decode is one {_step(result)}",
        ]
    )


def _step(result: "Profile") -> str:
    return "step" if result.setting.speculation else "token"


def _operators(operators: "Sequence[Operator]") -> str:
    """The longest kinds and layers of every stage."""
    from mllm_edge.runtime.profiling.operators import by_kind, by_layer, top

    kinds = [[named(o.stage), o.kind, str(o.calls), *_time(o)] for o in top(by_kind(operators), _LONGEST)]
    layers = [[named(o.stage), _layer(o), str(o.calls), *_time(o)] for o in top(by_layer(operators), _LONGEST)]
    return "\n".join(
        [
            table(["stage", "operator", "runs", "ms", "share"], kinds),
            "",
            table(["stage", "layer", "runs", "ms", "share"], layers),
            f"the {_LONGEST} longest of each stage in a call with ONNX Runtime's profiler, which slows small ones down",
        ]
    )


def _time(operator: "Operator") -> list[str]:
    return [milliseconds(operator.seconds), f"{operator.share:.1%}"]


def _layer(operator: "Operator") -> str:
    return "outside of layers" if operator.layer is None else str(operator.layer)


def _power(power: "PowerReading") -> str:
    rows = [[name, f"{rail.watts:.2f}", f"{rail.joules:.2f}"] for name, rail in power.rails.items()]
    lines = [table(["rail", "W", "J"], rows)] if rows else []
    if power.joules_per_token is not None:
        whole = _joules(power.joules_per_token, power.joules_per_image)
        lines.append(f"{whole}: {power.scope} ({' + '.join(power.total)}), idle power included")
    if power.joules_per_token_above_idle is not None:
        above = _joules(power.joules_per_token_above_idle, power.joules_per_image_above_idle)
        lines.append(f"{above}: above the {power.idle.watts:.2f} W that it drew idle, for {power.idle.seconds:.1f} s")
    heat = ", ".join(f"{zone} {h.start:.0f} to {h.peak:.0f} °C" for zone, h in power.temperatures.items())
    lines += [heat] if heat else []
    if power.throttled is not None:
        lines.append(_throttled(power))
    return "\n".join([*lines, *power.absent])


def _joules(token: float, image: float | None) -> str:
    return f"{token:.3f} J a token" + ("" if image is None else f", {image:.2f} J an image")


def _throttled(power: "PowerReading") -> str:
    idle = power.idle.throttled or ()
    names = [f"{name}, also at idle" if name in idle else name for name in power.throttled or ()]
    return f"the machine throttled: {'; '.join(names)}" if names else "no throttling"
