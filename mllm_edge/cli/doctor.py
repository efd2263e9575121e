"""`mllm-edge doctor`: what this machine has, and which targets work on it."""

import dataclasses
import platform
import shutil
from pathlib import Path
from typing import Any

import click

from mllm_edge import __version__
from mllm_edge.cli.doctor_checkpoint import checkpoint_report, checkpoint_text
from mllm_edge.cli.options import json_option
from mllm_edge.cli.output import bytes_text, print_json, write_answer

__all__ = ["command"]


@click.command("doctor", short_help="Tell which targets work here, or whether a checkpoint exports.")
@click.option("--checkpoint", type=click.Path(), metavar="DIR", help="Look at a checkpoint instead of this machine.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="DIR", help="A LoRA adapter to be merged; with --checkpoint."
)
@json_option("Print the findings as JSON.")
@click.pass_context
def command(ctx: click.Context, checkpoint: str | None, adapters: tuple[str, ...], as_json: bool) -> None:
    """Tell what is installed and visible here, which targets work, and what would make the others work.

    A target works when this version runs its bundles on this machine. The exit code is 0 when at least one works.

    With --checkpoint: tell in seconds what an export of it would do, and write nothing: its family, what would be
    refused and why, files that contradict each other, bits, memory and time. The exit code is 0 when it would export.
    """
    if checkpoint is not None:
        report = checkpoint_report(checkpoint, adapters)
        if as_json:
            print_json(report)
        else:
            write_answer(checkpoint_text(report) + "\n")
        ctx.exit(0 if report["exports"] else 1)
    if adapters:
        raise click.UsageError("--adapter goes with --checkpoint")
    from mllm_edge.runtime.backends.cuda import gpu_problem
    from mllm_edge.runtime.backends.installed import engines, extras, wheels
    from mllm_edge.runtime.doctor import best_target, diagnose, machine_problems, precisions, wheel_problems
    from mllm_edge.runtime.machine.hardware import read_machine

    machine, found, brought = read_machine(Path("/"), shutil.which("nvidia-smi")), engines(), wheels()
    targets = diagnose(machine, found, refused=gpu_problem())
    report = {
        "python": platform.python_version(),
        "mllm_edge": __version__,
        "extras": extras(),
        "machine": dataclasses.asdict(machine),
        "engines": {name: dataclasses.asdict(engine) for name, engine in found.items()},
        "wheels": brought,
        "precisions": {gpu.name: precisions(gpu.compute_capability) for gpu in machine.gpus},
        "problems": [dataclasses.asdict(p) for p in (*machine_problems(machine), *wheel_problems(brought))],
        "targets": {t.name: {**dataclasses.asdict(t), "works": t.works} for t in targets},
        "use": best_target(targets),
    }
    if as_json:
        print_json(report)
    else:
        write_answer(_text(report) + "\n")
    if not any(target.works for target in targets):
        ctx.exit(1)


def _text(report: dict[str, Any]) -> str:
    lines = [f"{name:<16}{value}" for name, value in (_machine(report) | _software(report)).items() if value]
    for problem in report["problems"]:
        lines += [f"problem: {problem['what']}", f"  fix: {problem['fix']}"]
    lines.append("")
    for name, target in report["targets"].items():
        lines.append(f"{name:<16}{_verdict(target)}")
        for problem in target["problems"]:
            lines += [f"  {problem['what']}", f"    fix: {problem['fix']}"]
    if report["use"]:
        lines += ["", f"{'use':<16}mllm-edge export --target {report['use']}"]
    return "\n".join(lines)


def _machine(report: dict[str, Any]) -> dict[str, str]:
    m = report["machine"]
    cores = f", {m['cores']} cores, {m['threads']} threads" if m["threads"] else ""
    return {
        "mllm-edge": f"{report['mllm_edge']}, Python {report['python']}",
        "board": m["board"] + (f", L4T {m['l4t']}, JetPack {m['jetpack'] or '?'}" if m["l4t"] else ""),
        "CPU": f"{m['cpu'] or m['architecture']}{cores}",
        "features": ", ".join(m["features"]),
        "memory": _memory(m),
        "disk": f"{bytes_text(m['disk_free'])} free",
        "power mode": m["power"]["name"] if m["power"] else "",
        "driver": m["driver"],
        "CUDA": m["cuda"],
        "GPU": "; ".join(_gpu(gpu) for gpu in m["gpus"]),
        "precisions": "; ".join(", ".join(found) for found in report["precisions"].values()),
        "system TensorRT": m["tensorrt"],
    }


def _memory(machine: dict[str, Any]) -> str:
    if not machine["memory"]:
        return ""
    shared = ", shared with the GPU" if machine["unified"] else ""
    return f"{bytes_text(machine['memory'])}, {bytes_text(machine['memory_free'])} free{shared}"


def _gpu(gpu: dict[str, Any]) -> str:
    capability = f"compute capability {gpu['compute_capability']}" if gpu["compute_capability"] else ""
    return ", ".join(filter(None, [gpu["name"], bytes_text(gpu["memory"]) if gpu["memory"] else "", capability]))


def _software(report: dict[str, Any]) -> dict[str, str]:
    extras = (f"{name} (lacks {', '.join(x)})" if x else name for name, x in report["extras"].items())
    facts = {"extras": ", ".join(extras)}
    for name, engine in report["engines"].items():
        providers = f" ({', '.join(engine['providers'])})" if engine["providers"] else ""
        facts[name] = f"does not load: {engine['problem']}" if engine["problem"] else f"{engine['version']}{providers}"
    facts["wheels"] = ", ".join(sorted({wheel for found in report["wheels"].values() for wheel in found}))
    return facts


def _verdict(target: dict[str, Any]) -> str:
    if target["runs"]:
        return "works" if target["works"] else "does not work here"
    able = "can be exported, but this version does not run it" if target["exported"] else "not in this version"
    return able + (", whatever is installed" if target["problems"] else "; this machine has what it needs")
