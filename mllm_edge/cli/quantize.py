"""`mllm-edge quantize`: a float bundle (or a checkpoint) becomes a calibrated, quantized bundle, with the proof."""

import shlex
import time
from typing import Any

import click

from mllm_edge.cli.export import TARGETS
from mllm_edge.cli.exporter import load_exporter
from mllm_edge.cli.output import bytes_text, milliseconds, note, print_json, table
from mllm_edge.cli.progress import stages
from mllm_edge.cli.signals import interrupted_message, interruptible

__all__ = ["RECIPES", "command"]

RECIPES = ("int8", "int4", "mixed", "fp16")
_STOPPED = interrupted_message("the quantization") + "; the same command goes on where it was"
_WORST = 5  # layers shown


@click.command("quantize", short_help="Quantize a bundle with calibration data.")
@click.argument("source")
@click.argument("out", type=click.Path())
@click.option("--data", required=True, type=click.Path(), help="A folder of images, or a .jsonl file of questions.")
@click.option(
    "--recipe", default="int4", show_default=True, help=f"Precision: {', '.join(RECIPES)}, or a file NAME.toml."
)
@click.option("--prompt", help="The question that goes with each image of a folder.")
@click.option("--held-back", type=click.IntRange(min=1), help="Samples kept for the proof; default: a quarter, to 32.")
@click.option("--max-kl", type=click.FloatRange(min=0), help="Fail when the mean KL divergence is larger.")
@click.option("--min-agreement", type=click.FloatRange(0, 1), help="Fail when fewer likeliest tokens stay the same.")
@click.option(
    "--target",
    "targets",
    type=click.Choice(TARGETS),
    multiple=True,
    default=("cpu",),
    show_default="cpu",
    help="Where it will run, when SOURCE is a checkpoint; may be repeated.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads inside one operator; default: physical cores.")
@click.option("--force", is_flag=True, help="Replace the bundle in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    source: str,
    out: str,
    data: str,
    recipe: str,
    prompt: str | None,
    held_back: int | None,
    max_kl: float | None,
    min_agreement: float | None,
    targets: tuple[str, ...],
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Quantize SOURCE, a bundle exported with --recipe fp16 or fp32 (or a checkpoint), to the new bundle OUT.

    Part of the data calibrates, part is held back to prove what quantization cost. A run that was interrupted goes on
    where it was when started again in the same way.
    """
    began = time.perf_counter()
    with interruptible(_STOPPED) as check, stages(check) as progress:
        progress.stage("loading the exporter")
        load_exporter()
        from mllm_edge.calibration.data import DEFAULT_PROMPT
        from mllm_edge.export.quantize import Gate, quantize

        report = quantize(
            source,
            out,
            recipe=recipe,
            data=data,
            prompt=prompt or DEFAULT_PROMPT,
            held_back=held_back,
            gate=Gate(max_kl, min_agreement),
            targets=targets,
            force=force,
            threads=threads,
            progress=progress,
        ).as_dict()
    report["seconds"] = time.perf_counter() - began
    if as_json:
        print_json(report)
    else:
        note(f"\n{_summary(report)}")


def _summary(report: dict[str, Any]) -> str:
    out = shlex.quote(report["out"])
    ending = (
        f"wrote {report['out']}: {bytes_text(report['nbytes'])} in {report['seconds']:.1f} s\n"
        f'next: mllm-edge run {out} "What is in the picture?" --image FILE'
    )
    return "\n\n".join(part for part in (_proof(report), _layers(report), ending) if part)


def _proof(report: dict[str, Any]) -> str:
    proof = report["proof"]
    rows = [
        [f"{name}: SQNR, cosine", f"{found['sqnr']:.1f} dB, {found['cosine']:.5f}"]
        for name, found in proof["components"].items()
    ]
    rows += [
        ["KL divergence: mean, worst", f"{proof['kl']:.2g}, {proof['kl_worst']:.2g}"],
        ["likeliest token agrees", f"{proof['top1']:.2%} of {proof['positions']}"],
        ["greedy answer repeated", f"{proof['prefix']:.1%}"],
    ]
    if proof["exact_match"]:
        before, after = proof["exact_match"]
        rows.append(["answers right: float, quantized", f"{before:.1%}, {after:.1%}"])
    for title, key, text in (
        ("size", "nbytes", bytes_text),
        ("prefill ms", "prefill_seconds", milliseconds),
        ("token ms", "token_seconds", milliseconds),
    ):
        before, after = proof[key]
        rows.append([f"{title}: float, quantized", f"{text(before)}, {text(after)}"])
    title = f"{report['recipe']}, {report['samples']} samples; proof on {report['held_back']} others"
    return table([title, ""], rows)


def _layers(report: dict[str, Any]) -> str:
    ranked = sorted(
        ((errors, f"{c}: {n}") for c, found in report["layers"].items() for n, errors in found.items()), reverse=True
    )
    if not ranked:
        return ""
    rows = [[name, f"{error:.2%}", f"{nearest:.2%}"] for (error, nearest), name in ranked[:_WORST]]
    return table(["layers with the largest error", "error", "by rounding"], rows)
