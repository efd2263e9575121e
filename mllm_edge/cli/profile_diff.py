"""`mllm-edge profile diff`: two measurements beside each other."""

import re
from typing import TYPE_CHECKING, Any

import click

from mllm_edge.cli.options import json_option
from mllm_edge.cli.output import bytes_text, milliseconds, note, print_json, table, write_answer

if TYPE_CHECKING:
    from mllm_edge.runtime.profiling.diff import Change, Difference

__all__ = ["diff"]


class _Percent(click.ParamType):
    """10% or 10, as the share 0.1."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)%?", str(value))
        if match is None:
            self.fail(f"{value!r} is not a percentage such as 10%", param, ctx)
        return float(match[1]) / 100


@click.command("diff")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--fail-above", type=_Percent(), metavar="PERCENT", help="Fail when a figure grew by more than this.")
@json_option("Print the differences as JSON.")
@click.pass_context
def diff(ctx: click.Context, a: str, b: str, fail_above: float | None, as_json: bool) -> None:
    """Show what changed from profile A to profile B, JSON files, beyond the noise that both report.

    A figure changed when its medians differ by more than the spreads of both between their runs together. With
    --fail-above the exit code is 1 when one grew by more than that, beyond the noise. Sweeps are compared point by
    point.
    """
    from mllm_edge.runtime.profiling.diff import differences, read_profiles

    found = differences(read_profiles(a), read_profiles(b))
    if as_json:
        print_json([difference.as_dict() for difference in found])
    else:
        write_answer("\n\n".join(_report(difference) for difference in found) + "\n")
    for difference in found:
        for warning in difference.warnings:
            note(f"warning: {_point(difference)}{warning}")
    if fail_above is None:
        return
    failed = [f"{_point(d)}{c.name} ({c.growth:+.1%})" for d in found for c in d.changes if c.grew_above(fail_above)]
    if failed:
        note(f"error: grew by more than {fail_above:.0%}: {', '.join(failed)}")
        ctx.exit(1)


def _point(difference: "Difference") -> str:
    words = ", ".join(f"{key} {value}" for key, value in difference.point.items())
    return f"{words}: " if words else ""


def _report(difference: "Difference") -> str:
    rows = [_row(change) for change in difference.changes]
    text = table(["", "A", "B", "change", "noise", ""], rows)
    return f"{_point(difference)}\n{text}" if difference.point else text


def _row(change: "Change") -> list[str]:
    from mllm_edge.cli.profile_report import named

    def show(value: float) -> str:
        return bytes_text(int(value)) if change.name == "peak memory" else f"{milliseconds(value)} ms"

    verdict = ("more" if change.growth > 0 else "less") if change.beyond_noise else ""
    noise = "?" if change.noise is None else f"±{change.noise / change.before:.1%}" if change.before else ""
    name = named(change.name)
    return [name, show(change.before), show(change.after), f"{change.growth:+.1%}", noise, verdict]
