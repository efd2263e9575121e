"""`mllm-edge export`: a checkpoint becomes a bundle."""

import contextlib
import ctypes
import shlex
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from mllm_edge.cli.exporter import load_exporter, require_exporter
from mllm_edge.cli.options import TARGETS, RecipeName, calibration_options, json_option, target_option
from mllm_edge.cli.output import bytes_text, note, print_json, table
from mllm_edge.cli.progress import stages
from mllm_edge.cli.proof import float32_operators, proof_summary
from mllm_edge.cli.signals import interrupted_message, interruptible

if TYPE_CHECKING:
    from mllm_edge.compare.cases import Case

__all__ = ["RECIPES", "TARGETS", "command"]

# Repeated here so that the help needs no export extra; a test compares them with the exporter's own.
RECIPES = ("fp32", "fp16", "int8", "int4")
_FLOAT = RECIPES[:2]
# mallopt's names for the size from which an allocation is mapped, and for how much freed memory is kept.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_STOPPED = interrupted_message("the export") + "; its temporary files are gone"


@click.command("export", short_help="Export a checkpoint to a bundle.")
@click.argument("model")
@click.argument("out", type=click.Path())
@target_option("Where it will run; may be repeated. Others come with the cpu's graphs, the fallback.")
@click.option("--no-fallback", is_flag=True, help="Leave out the cpu's graphs beside another target's.")
@click.option(
    "--recipe",
    type=RecipeName((*RECIPES, "mixed")),
    default="int4",
    show_default=True,
    help=f"Precision: {', '.join(RECIPES)}; with --data also mixed, or a file NAME.toml.",
)
@calibration_options("weights are only rounded")
@click.option(
    "--verify",
    type=click.Choice(["auto", "full", "off"]),
    default="auto",
    show_default=True,
    help="Compare with the source model; auto takes the first decoder layers only when the model is large.",
)
@click.option(
    "--verify-image",
    "verify_images",
    type=click.Path(),
    multiple=True,
    metavar="FILE",
    help="A picture of your own to compare on, too; may be repeated, all go into one prompt.",
)
@click.option("--verify-prompt", metavar="TEXT", help="A prompt of your own to compare on, about these pictures.")
@click.option(
    "--adapter",
    "adapters",
    type=click.Path(),
    multiple=True,
    metavar="DIR",
    help="Merge a LoRA adapter, a directory or a hub id; may be repeated, each is merged on top of those before. One "
    "that lies in MODEL is merged first, unless 'none' is given.",
)
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--force", is_flag=True, help="Replace the bundle in OUT.")
@click.option("--dry-run", is_flag=True, help="Check the checkpoint and tell the sizes; write nothing.")
@json_option("Print the report as JSON.")
def command(
    model: str,
    out: str,
    targets: tuple[str, ...],
    no_fallback: bool,
    recipe: str,
    data: str | None,
    most_bits: float | None,
    no_builtin_text: bool,
    prompt: str | None,
    skip_bad: bool,
    held_back: int | None,
    max_kl: float | None,
    allow_loss: bool,
    min_agreement: float | None,
    verify: Any,
    verify_images: tuple[str, ...],
    verify_prompt: str | None,
    adapters: tuple[str, ...],
    revision: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Export MODEL, a checkpoint directory or a hub id like owner/name, to a bundle in the new directory OUT.

    The result is compared with the source model; when they disagree, or quantization costs more than --max-kl, the
    export fails. A failed or interrupted export leaves OUT as it was. With --data, weights are calibrated, as the verb
    quantize does it, and not only rounded.
    """
    calibration = {"--prompt": prompt, "--held-back": held_back, "--min-agreement": min_agreement}
    calibration |= {"--skip-bad": skip_bad or None, "--no-builtin-text": no_builtin_text or None}
    _check(recipe, data, calibration, dry_run)
    _check_loss(recipe, data, verify, max_kl, allow_loss)
    _check_verify(verify, verify_images, verify_prompt)
    began = time.perf_counter()
    _keep_freed_memory()
    with interruptible(_STOPPED) as check, stages(check) as progress:
        _check_places(model, out, data, force, dry_run)
        progress.stage("loading the exporter")
        pipeline = load_exporter()
        from mllm_edge.loss import MAX_KL

        source: dict[str, Any] = {
            "targets": targets,
            "fallback": not no_fallback,
            "verify_mode": verify,
            "revision": revision,
            "adapters": adapters,
            "verify_cases": tuple(_verify_cases(verify_images, verify_prompt)),
        }
        if data is None:
            done = pipeline.export(
                model,
                out,
                recipe_name=recipe,
                force=force,
                dry_run=dry_run,
                most_bits=most_bits,
                max_kl=MAX_KL if max_kl is None else max_kl,
                allow_loss=allow_loss,
                progress=progress,
                **source,
            )
        else:
            from mllm_edge.calibration.data import DEFAULT_PROMPT
            from mllm_edge.export.quantize import FromCheckpoint, Gate, quantize

            done = quantize(
                model,
                out,
                recipe=recipe,
                most_bits=most_bits,
                data=data,
                builtin=not no_builtin_text,
                prompt=prompt or DEFAULT_PROMPT,
                held_back=held_back,
                gate=Gate(max_kl, min_agreement),
                allow_loss=allow_loss,
                checkpoint=FromCheckpoint(**source),
                skip_bad=skip_bad,
                force=force,
                progress=progress,
            )
    report = done.as_dict()
    report["seconds"] = time.perf_counter() - began
    if as_json:
        print_json(report)
    else:
        note(f"\n{_summary(report) if data is None else proof_summary(report)}")
    if report["warning"]:
        note(f"warning: {report['warning']}")


def _check_verify(verify: str, images: tuple[str, ...], prompt: str | None) -> None:
    """Raise UsageError for a picture that is not there, or where nothing is compared."""
    from mllm_edge.runtime.prompt.image import image_path

    if verify == "off" and (images or prompt is not None):
        raise click.UsageError("--verify-image and --verify-prompt compare: leave out --verify off")
    for image in images:
        if not image_path(image).is_file():
            raise click.UsageError(f"--verify-image {image}: no such file")


def _check_loss(recipe: str, data: str | None, verify: str, max_kl: float | None, allow_loss: bool) -> None:
    """Raise UsageError for a demand on a loss that is not measured."""
    given = [name for name, value in (("--max-kl", max_kl), ("--allow-loss", allow_loss or None)) if value is not None]
    if data is not None or not given:
        return
    if recipe in _FLOAT:
        raise click.UsageError(f"{given[0]}: --recipe {recipe} does not quantize, and has limits of its own")
    if verify == "off":
        raise click.UsageError(f"{given[0]} needs the comparison with the source model: leave out --verify off")


def _verify_cases(images: tuple[str, ...], prompt: str | None) -> "list[Case]":
    from mllm_edge.calibration.data import DEFAULT_PROMPT
    from mllm_edge.compare.cases import Case
    from mllm_edge.runtime.prompt.image import image_path

    if not images and prompt is None:
        return []
    return [Case(prompt or DEFAULT_PROMPT, tuple(str(image_path(image)) for image in images))]


def _check(recipe: str, data: str | None, calibration: Mapping[str, Any], dry_run: bool) -> None:
    """Raise UsageError for options that need --data, or don't go with it."""
    if data is not None:
        if dry_run:
            raise click.UsageError("--dry-run does not calibrate: leave out --data")
        return
    for option, value in calibration.items():
        if value is not None:
            raise click.UsageError(f"{option} needs --data")
    if recipe not in RECIPES:
        raise click.UsageError(f"without --data, --recipe is one of {', '.join(RECIPES)}, not {recipe!r}")


def _check_places(model: str, out: str, data: str | None, force: bool, dry_run: bool) -> None:
    """What can be told before the exporter is loaded, which takes seconds."""
    from mllm_edge.export.early import check_export, check_quantize

    require_exporter()
    if data is None:
        check_export(model, out, force, dry_run)
    else:
        check_quantize(model, out, data, force)


def _keep_freed_memory() -> None:
    """Let the C library hand the memory of one weight to the next, where it can be told to.

    Otherwise each weight's memory goes back to the system and comes again as zeroed pages, which takes a third of the
    processor time of a large export.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def _summary(report: dict[str, Any]) -> str:
    from mllm_edge.loss import words

    parts = [_components(report)]
    if report["parity"]:
        parity = report["parity"]
        if "float32" in parity:
            parts.append(_parity(parity["float32"], " in float32"))
        parts += [_parity(found) for found in (parity, *parity.get("targets", {}).values())]
    elif not report["dry_run"]:
        parts.append("not compared with the source model (--verify off)")
    parts += [float32_operators(report), words(report), _ending(report)]
    return "\n\n".join(part for part in parts if part)


def _ending(report: dict[str, Any]) -> str:
    out = shlex.quote(report["out"])
    if report["dry_run"]:
        options = "".join(f" --target {target}" for target in report["targets"] if target != "cpu")
        options += "".join(f" --adapter {shlex.quote(adapter)}" for adapter in report["adapters"])
        command = f"mllm-edge export {shlex.quote(report['source'])} {out} --recipe {report['recipe']}{options}"
        return f"dry run: nothing was written\nnext: {command}"
    size = bytes_text(report["nbytes"])
    command = f'mllm-edge run {out} "What is in the picture?" --image FILE'
    return f"wrote {report['out']}: {size} in {report['seconds']:.1f} s\nnext: {command}"


def _components(report: dict[str, Any]) -> str:
    title = f"{report['family']}, {report['parameters'] / 1e6:.1f} M parameters, {report['recipe']}"
    rows = [[name, bytes_text(nbytes)] for name, nbytes in report["components"].items()]
    return table([title, "size"], [*rows, ["total", bytes_text(report["nbytes"])]])


def _parity(parity: dict[str, Any], form: str = "") -> str:
    limits = parity["limits"]
    rows = [[n, f"{e:.1e}", f"{limits[n]:g}" if n in limits else ""] for n, e in parity["errors"].items()]
    text = table([f"{parity['target']}{form} against the source model ({parity['scope']})", "error", "limit"], rows)
    notes = "".join(f"\n{line}" for line in parity["notes"])
    return f"{text}\ngreedy tokens agree: {parity['greedy_agreement']:.1%} of {parity['greedy_tokens']}{notes}"
