"""`mllm-edge quantize`: a float bundle (or a checkpoint) becomes a calibrated, quantized bundle, with the proof."""

import time
from collections.abc import Mapping
from typing import Any

import click

from mllm_edge.cli.exporter import load_exporter, require_exporter
from mllm_edge.cli.options import RecipeName, calibration_options, json_option, target_option
from mllm_edge.cli.output import note, print_json
from mllm_edge.cli.progress import stages
from mllm_edge.cli.proof import proof_summary
from mllm_edge.cli.signals import interrupted_message, interruptible

__all__ = ["RECIPES", "command"]

RECIPES = ("int8", "int4", "mixed", "fp8", "w4a8", "fp16")
_STOPPED = interrupted_message("the quantization") + "; the same command goes on where it was"


@click.command("quantize", short_help="Quantize a bundle with calibration data.")
@click.argument("source")
@click.argument("out", type=click.Path())
@click.option(
    "--recipe",
    type=RecipeName(RECIPES),
    default="int4",
    show_default=True,
    help=f"Precision: {', '.join(RECIPES)}, or a file NAME.toml.",
)
@calibration_options("the built-in text calibrates the decoder")
@target_option("Where it will run, when SOURCE is a checkpoint; may be repeated.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads inside one operator; default: physical cores.")
@click.option("--force", is_flag=True, help="Replace the bundle in OUT.")
@json_option("Print the report as JSON.")
def command(
    source: str,
    out: str,
    data: str | None,
    no_builtin_text: bool,
    recipe: str,
    most_bits: float | None,
    prompt: str | None,
    skip_bad: bool,
    held_back: int | None,
    max_kl: float | None,
    allow_loss: bool,
    min_agreement: float | None,
    targets: tuple[str, ...],
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Quantize SOURCE, a bundle exported with --recipe fp16 or fp32 (or a checkpoint), to the new bundle OUT.

    Part of the data calibrates, part is held back to prove what quantization cost. Questions that come with mllm-edge
    calibrate beside it, or alone without --data: then the vision encoder is rounded, for they have no images. A run
    that was interrupted goes on where it was when started again in the same way.
    """
    _check(data, {"--prompt": prompt, "--skip-bad": skip_bad or None}, no_builtin_text)
    began = time.perf_counter()
    with interruptible(_STOPPED) as check, stages(check) as progress:
        from mllm_edge.export.early import check_quantize

        require_exporter()
        check_quantize(source, out, data, force)
        progress.stage("loading the exporter")
        load_exporter()
        from mllm_edge.calibration.data import DEFAULT_PROMPT
        from mllm_edge.export.quantize import FromCheckpoint, Gate, quantize

        report = quantize(
            source,
            out,
            recipe=recipe,
            most_bits=most_bits,
            data=data,
            builtin=not no_builtin_text,
            prompt=prompt or DEFAULT_PROMPT,
            held_back=held_back,
            gate=Gate(max_kl, min_agreement),
            allow_loss=allow_loss,
            checkpoint=FromCheckpoint(targets),
            skip_bad=skip_bad,
            force=force,
            threads=threads,
            progress=progress,
        ).as_dict()
    report["seconds"] = time.perf_counter() - began
    if as_json:
        print_json(report)
    else:
        note(f"\n{proof_summary(report)}")
    if report["warning"]:
        note(f"warning: {report['warning']}")


def _check(data: str | None, own: Mapping[str, Any], no_builtin_text: bool) -> None:
    """Raise UsageError for options that need --data, `own` by name."""
    if data is not None:
        return
    for option, value in own.items():
        if value is not None:
            raise click.UsageError(f"{option} needs --data")
    if no_builtin_text:
        raise click.UsageError("--no-builtin-text leaves nothing to calibrate with: give --data")
