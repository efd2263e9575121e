"""`mllm-edge profile`: how fast and how large a bundle is on this machine."""

from typing import TYPE_CHECKING

import click

from mllm_edge.cli.options import POSITIVE, json_option, runtime_options
from mllm_edge.cli.output import bytes_text, milliseconds, print_json, table, write_answer
from mllm_edge.cli.progress import stages

if TYPE_CHECKING:
    from mllm_edge.runtime.profile import Distribution, Profile

__all__ = ["command"]

_NAMES = {
    "preprocess": "preprocess",
    "vision_encoder": "vision encoder",
    "connector": "connector",
    "embed": "embed",
    "prefill": "prefill",
    "ttft": "TTFT",
    "tpot": "TPOT",
    "total": "whole call",
}


@click.command("profile", short_help="Measure latency, throughput and memory.")
@click.argument("bundle", type=click.Path())
@click.option(
    "--image", "images", multiple=True, metavar="FILE", help="An image; repeatable. Default: a synthetic one."
)
@click.option("--prompt", default="Describe the image.", show_default=True)
@click.option("-n", "--new-tokens", type=POSITIVE, default=32, show_default=True, help="Tokens of every answer.")
@click.option("--warmup", type=click.IntRange(min=0), default=2, show_default=True, help="Calls that are not counted.")
@click.option("--iterations", type=POSITIVE, default=10, show_default=True, help="Calls that are counted.")
@runtime_options
@json_option("Print all measurements as JSON.")
def command(
    bundle: str,
    images: tuple[str, ...],
    prompt: str,
    new_tokens: int,
    warmup: int,
    iterations: int,
    threads: int | None,
    max_context: int | None,
    backend: str,
    as_json: bool,
) -> None:
    """Repeat one greedy call on BUNDLE and show where its time goes.

    The answer always has as many tokens as asked for: the model's own end is ignored.
    """
    from mllm_edge.runtime.profile import profile

    with stages() as progress:
        progress.stage("profiling", warmup + iterations)
        result = profile(
            bundle,
            prompt,
            images,
            new_tokens=new_tokens,
            warmup=warmup,
            iterations=iterations,
            threads=threads,
            max_context=max_context,
            backend=backend,
            progress=progress.advance,
        )
    if as_json:
        print_json(result.as_dict())
    else:
        write_answer(_report(result) + "\n")


def _report(result: "Profile") -> str:
    return "\n\n".join([_setting(result), _stages(result), _figures(result)])


def _setting(result: "Profile") -> str:
    images = f" ({result.image_tokens} of {result.tiles} image tiles)" if result.image_tokens else ""
    return "\n".join(
        [
            f"{result.bundle} on {result.machine}, {result.threads} threads, {result.backend}",
            f"{result.prompt_tokens} prompt tokens{images} + {result.new_tokens} new; image: {result.image}",
            f"{result.warmup} warm-up calls, {result.iterations} counted calls",
        ]
    )


def _stages(result: "Profile") -> str:
    from mllm_edge.runtime.profile import PERCENTILES, samples_needed

    measured = {**result.stages, **({"tpot": result.tpot} if result.tpot else {})}
    shown = {title: measured[name] for name, title in _NAMES.items() if name in measured}
    names = sorted({name for d in shown.values() for name in d.percentiles}, key=lambda name: int(name[1:]))
    header = ["ms", "median", *names, "min", "max", "samples"]
    text = table(header, [[title, *_row(d, names)] for title, d in shown.items()])
    omitted = [p for p in PERCENTILES if any(f"p{p}" not in d.percentiles for d in shown.values())]
    if omitted:
        needs = ", ".join(f"p{p} {samples_needed(p)}" for p in omitted)
        text += f"\nleft out where samples are too few (needed: {needs}); raise --iterations"
    return text


def _row(d: "Distribution", names: list[str]) -> list[str]:
    percentiles = [milliseconds(d.percentiles[n]) if n in d.percentiles else "" for n in names]
    return [milliseconds(d.median), *percentiles, milliseconds(d.minimum), milliseconds(d.maximum), str(d.count)]


def _figures(result: "Profile") -> str:
    rows = [
        ["load", f"{result.load_seconds:.2f} s"],
        ["peak memory", bytes_text(result.peak_rss)],
        ["KV cache", bytes_text(result.kv_cache_bytes)],
        ["bundle", bytes_text(result.bundle_bytes)],
    ]
    if result.tokens_per_second:
        rows.insert(0, ["decode rate", f"{result.tokens_per_second:.1f} tok/s"])
    return "\n".join(f"{name:<13}{value}" for name, value in rows)
