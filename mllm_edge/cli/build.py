"""`mllm-edge build`: TensorRT engines into a bundle."""

from typing import TYPE_CHECKING, Any

import click

from mllm_edge.cli.options import POSITIVE, json_option
from mllm_edge.cli.output import bytes_text, note, print_json, table
from mllm_edge.cli.progress import stages
from mllm_edge.cli.signals import interrupted_message, interruptible

if TYPE_CHECKING:
    from mllm_edge.runtime.build import BuildPlan, BuiltEngine

__all__ = ["command"]

_TARGETS = ("tensorrt", "tensorrt-10.3")


class _Segments(click.ParamType):
    """A number; auto is None."""

    name = "auto|n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "auto" else POSITIVE.convert(value, param, ctx)


@click.command("build", short_help="Build a bundle's TensorRT engines.")
@click.argument("bundle", type=click.Path())
@click.option("--device", default="auto", show_default=True, help="auto: the GPU here; or one like sm86, with RTX.")
@click.option("--target", type=click.Choice(_TARGETS), help="Default: the first that the bundle and TensorRT have.")
@click.option("--max-seq", type=POSITIVE, help="Tokens of prompt and answer; default: the context, 4096 at most.")
@click.option("--max-images", type=POSITIVE, default=4, show_default=True, help="Images or tiles in one vision run.")
@click.option("--max-batch", type=POSITIVE, default=1, show_default=True, help="Sequences at once.")
@click.option(
    "--segments",
    type=_Segments(),
    default="auto",
    show_default=True,
    help="Engines that the decoder is divided into; auto: as few as the free memory is enough for.",
)
@json_option("Print the engines as JSON.")
def command(bundle: str, as_json: bool, **options: Any) -> None:
    """Build the engines of BUNDLE for one GPU and store them in its directory engines/.

    They serve every machine with the same GPU and TensorRT; `run` takes them when they fit and builds those that are
    missing. TensorRT for RTX builds for other GPUs too, and needs none itself.
    """
    from mllm_edge.runtime.build import build_engines, plan_build

    plan = plan_build(bundle, **options)
    note(_plan_text(plan))
    with interruptible(interrupted_message("the build")) as check, stages(check) as progress:
        engines = build_engines(plan, progress)
    for text in dict.fromkeys(text for engine in engines for text in engine.warnings):
        note(f"{plan.module.title} warns: {text}")
    if as_json:
        limits, module = vars(plan.limits), {"name": plan.module.name, "version": plan.module.version}
        facts = {"target": plan.target, "device": plan.device, "module": module, "limits": limits}
        print_json({"bundle": bundle, **facts, "engines": [engine.as_dict() for engine in engines]})
    else:
        rows = [[_part_text(e), bytes_text(e.nbytes), f"{e.seconds:.1f}" if e.seconds else "kept"] for e in engines]
        note("\n" + table([f"engines for {plan.device}", "size", "seconds"], rows))


def _plan_text(plan: "BuildPlan") -> str:
    """What is going to happen, and whether memory is enough for it."""
    limits, decoder = plan.limits, plan.memory["decoder"]
    most = max(max(memory) for memory in plan.memory.values())
    lines = [
        f"{plan.module.title}, {plan.device}, target {plan.target}: {limits.max_seq} tokens, "
        f"{limits.max_images} images or tiles, batch {limits.max_batch}",
        f"takes about {bytes_text(most)} of memory; {bytes_text(plan.free)} are free",
    ]
    if len(decoder) > 1:
        each = ", ".join(bytes_text(memory) for memory in decoder)
        lines.append(f"the decoder in {len(decoder)} segments, one after the other: {each}")
    if plan.free and most > plan.free:
        lines.append("that is likely too little: close other programs, or export with --recipe int4")
        if len(decoder) == 1 and decoder[0] > plan.free and not plan.exactly:
            lines.append("the decoder cannot be cut into segments that would take less")
    return "\n".join(lines)


def _part_text(engine: "BuiltEngine") -> str:
    return engine.component if engine.segments == 1 else f"{engine.component} {engine.segment} of {engine.segments}"
