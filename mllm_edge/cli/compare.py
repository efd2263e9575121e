"""`mllm-edge compare`: two bundles, or a bundle and its source, beside each other."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mllm_edge.cli.export import TARGETS
from mllm_edge.cli.exporter import load_exporter
from mllm_edge.cli.options import POSITIVE, json_option
from mllm_edge.cli.output import note, print_json, table, write_answer
from mllm_edge.cli.progress import stages
from mllm_edge.errors import MllmEdgeError

if TYPE_CHECKING:
    from mllm_edge.compare.cases import Case
    from mllm_edge.compare.compare import Comparison

__all__ = ["command"]


@click.command("compare", short_help="Compare two bundles, or a bundle and its source.")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Ask this instead; repeatable.")
@click.option("--image", "images", multiple=True, metavar="FILE", help="An image for every prompt; repeatable.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest error of the logits, relative to their range; default: by the coarser recipe, fp32 0.001, fp16 0.02, "
    "int8 0.25, int4 0.6.",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="cpu",
    show_default=True,
    help="Which graphs of B are run, always by ONNX Runtime on the CPU; another target's are slow there.",
)
@click.option("--threads", type=POSITIVE, help="Threads inside one operator; default: physical cores.")
@click.option("--backend", type=click.Choice(["auto", "cpu"]), default="auto", show_default=True)
@json_option("Print the comparison as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    a: str,
    b: str,
    prompts: tuple[str, ...],
    images: tuple[str, ...],
    tolerance: float | None,
    target: str,
    threads: int | None,
    backend: str,
    as_json: bool,
) -> None:
    """Compare bundle B with bundle A, or a bundle with its checkpoint directory (in either order).

    A, or the checkpoint, is the reference, and both are fed its greedy tokens. A bundle given twice, with --target,
    compares its graphs for that target with those for the cpu. The exit code is 1 when the logits differ by more than
    the tolerance. A checkpoint is run by transformers in float32, in full.
    """
    sources = [path for path in (a, b) if _is_checkpoint(path)]
    if len(sources) == 2:
        raise MllmEdgeError(f"{a} and {b} are both checkpoints", f"mllm-edge export {b} OUT, then compare with OUT")
    cases = _cases(prompts, images)
    options: dict[str, Any] = {"tolerance": tolerance, "target": target, "threads": threads, "backend": backend}
    with stages() as progress:
        progress.stage("comparing", 2 * (len(cases) if cases else 3))
        options["progress"] = progress.advance
        result = _with_source(sources[0], b if sources[0] == a else a, cases, options) if sources else None
        if result is None:
            from mllm_edge.compare.compare import compare

            result = compare(a, b, cases, **options)
    if as_json:
        print_json(result.as_dict())
    else:
        write_answer(_report(result) + "\n")
    if not result.within:
        note(f"error: the logits differ by more than the tolerance of {result.tolerance:g}")
        ctx.exit(1)


def _is_checkpoint(path: str) -> bool:
    folder = Path(path)
    return (folder / "config.json").is_file() and not (folder / "manifest.json").is_file()


def _cases(prompts: tuple[str, ...], images: tuple[str, ...]) -> "list[Case] | None":
    if not prompts and not images:
        return None
    from mllm_edge.compare.cases import Case
    from mllm_edge.runtime.prompt.image import load_image

    loaded = tuple(load_image(image) for image in images)
    shown = "".join(f", {image}" for image in images)
    return [Case(prompt, loaded, f"{prompt!r}{shown}") for prompt in prompts or ("Describe the image.",)]


def _with_source(source: str, bundle: str, cases: "list[Case] | None", options: dict[str, Any]) -> "Comparison":
    load_exporter()  # tells what is missing, and silences other libraries
    from mllm_edge.export.compare import compare_with_source

    return compare_with_source(source, bundle, cases, **options)


def _report(result: "Comparison") -> str:
    rows = [[name, f"{error:.1e}"] for name, error in result.errors.items()]
    rows += [["KL, nats", f"{result.kl:.1e}"]]
    return "\n".join(
        [
            f"{result.other} ({result.target}) against {result.reference}",
            *(f"  {case}" for case in result.cases),
            "",
            table(["error", ""], rows),
            f"greedy tokens agree: {result.greedy_agreement:.1%} of {result.greedy_tokens}",
            f"tolerance of the logits: {result.tolerance:g}",
        ]
    )
