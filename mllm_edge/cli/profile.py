"""`mllm-edge profile`: where the time and the memory of a bundle go on this machine."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mllm_edge.cli.options import POSITIVE, runtime_options, speculation_option
from mllm_edge.cli.output import note, print_json, write_answer
from mllm_edge.cli.profile_diff import diff
from mllm_edge.cli.progress import stages
from mllm_edge.errors import MllmEdgeError

if TYPE_CHECKING:
    from mllm_edge.runtime.machine.threads import Spin
    from mllm_edge.runtime.profiling.measure import Profile

__all__ = ["command", "diff"]

_STDOUT = "-"


class _Profile(click.Command):
    """The measurement, but for `profile diff …`, which is a command of its own."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["diff"]:
            return diff.make_context(f"{info_name} diff", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command("profile", cls=_Profile, short_help="Measure latency, throughput and memory.")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(), metavar="BUNDLE...")
@click.option(
    "--image", "images", multiple=True, metavar="FILE", help="An image; repeatable. Default: a synthetic one."
)
@click.option("--prompt", default="Describe the image.", show_default=True)
@click.option("-n", "--new-tokens", type=POSITIVE, default=128, show_default=True, help="Tokens of every answer.")
@click.option("--runs", type=POSITIVE, default=3, show_default=True, help="Loads that share the counted calls.")
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="The most calls of each run that are not counted; fewer where they settle.",
)
@click.option("--iterations", type=POSITIVE, default=10, show_default=True, help="Calls that are counted, in all runs.")
@click.option("--sweep", "sweeps", multiple=True, metavar="KEY=A,B", help="Measure for each value; repeatable.")
@click.option("--no-roofline", is_flag=True, help="Leave out what the stages reach of the CPU's limits.")
@click.option("--ops", "operators", is_flag=True, help="Show the longest operators, on the CPU or TensorRT.")
@click.option("--power", is_flag=True, help="Measure watts, joules and heat, where this machine has sensors.")
@speculation_option
@runtime_options
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value=_STDOUT,
    type=click.Path(),
    help="Write all measurements as JSON; without a file, to standard output instead of the tables.",
)
@click.option("--csv", "csv_file", type=click.Path(), help="Write the seconds of every stage and call.")
@click.option("--html", "html_file", type=click.Path(), help="Write tables and charts as a page that opens offline.")
@click.option("--trace", "trace_file", type=click.Path(), help="Write the spans for chrome://tracing and Perfetto.")
def command(
    bundles: tuple[str, ...],
    images: tuple[str, ...],
    prompt: str,
    new_tokens: int,
    runs: int,
    warmup: int,
    iterations: int,
    sweeps: tuple[str, ...],
    no_roofline: bool,
    operators: bool,
    power: bool,
    speculation: int,
    threads: int | None,
    spin: "Spin",
    affinity: str | None,
    max_context: int | None,
    max_image_tokens: int | None,
    min_image_tokens: int | None,
    fast_jpeg: bool,
    backend: str,
    json_file: str | None,
    csv_file: str | None,
    html_file: str | None,
    trace_file: str | None,
) -> None:
    """Repeat one greedy call on BUNDLE and show where its time and memory go.

    The answer always has as many tokens as asked for: the model's own end is ignored. The bundle is loaded several
    times, for what a load finds differs; the first load and the call after it are shown apart. Several bundles, or
    --sweep, measure one after the other; keys are prompt, images, size, new, threads, speculation and bundle.

    `mllm-edge profile diff A.json B.json` compares two measurements; a bundle in a folder called diff is ./diff.
    """
    from mllm_edge.runtime.profiling import files
    from mllm_edge.runtime.profiling.sweep import parse_sweep, points, run_sweep, sweep_dict

    try:
        sweep = parse_sweep(sweeps, bundles)
    except ValueError as e:
        raise click.BadParameter(str(e), param_hint="--sweep") from None
    wanted = [file for file in (json_file, csv_file, html_file, trace_file) if file and file != _STDOUT]
    files.check_places(wanted)
    if html_file:
        from mllm_edge.report.charts import require
        from mllm_edge.report.html import page

        require()
    with stages() as progress:
        # Most runs settle earlier.
        progress.stage("profiling", len(points(sweep)) * (min(runs, iterations) * (1 + warmup) + iterations))
        profiles = run_sweep(
            bundles[0],
            prompt,
            images,
            sweep,
            new_tokens=new_tokens,
            runs=runs,
            warmup=warmup,
            iterations=iterations,
            threads=threads,
            spin=spin,
            affinity=affinity,
            speculation=speculation,
            max_context=max_context,
            max_image_tokens=max_image_tokens,
            min_image_tokens=min_image_tokens,
            fast_jpeg=fast_jpeg,
            backend=backend,
            limits=not no_roofline,
            operators=operators,
            power=power,
            progress=progress.advance,
            notice=note,
        )
    data = sweep_dict(sweep, profiles) if sweep else profiles[0].as_dict()
    texts: list[tuple[str | None, Callable[[], str]]] = [
        (None if json_file == _STDOUT else json_file, lambda: json.dumps(data, indent=1, ensure_ascii=False) + "\n"),
        (csv_file, lambda: files.csv_text(profiles)),
        (trace_file, lambda: json.dumps(files.chrome_trace(profiles))),
        (html_file, lambda: page([p.as_dict() for p in profiles])),
    ]
    # What was measured for minutes is shown before, and whatever becomes of, a file that cannot be written.
    failed = [error for file, text in texts if file for error in _write(file, text)]
    if json_file == _STDOUT:
        print_json(data)
    else:
        write_answer(_answer(profiles) + "\n")
    if failed:
        raise failed[0]


def _write(file: str, text: Callable[[], str]) -> list[MllmEdgeError]:
    """Write a file; where it cannot be, a copy among the temporary files, and the error."""
    from mllm_edge.files import write_whole

    content = text()
    try:
        write_whole(file, content)
    except MllmEdgeError as e:
        with contextlib.suppress(MllmEdgeError, OSError):
            folder = Path(tempfile.mkdtemp(prefix="mllm-edge-"))
            write_whole(folder / Path(file).name, content)
            return [type(e)(f"{e.message}; it is in {folder / Path(file).name} instead", e.fix)]
        return [e]
    return []


def _answer(profiles: "Sequence[Profile]") -> str:
    from mllm_edge.cli.profile_report import report, sweep_report

    return sweep_report(profiles) if profiles[0].point else report(profiles[0])
