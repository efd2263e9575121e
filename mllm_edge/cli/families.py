"""`mllm-edge families`: what can be exported, and what cannot."""

from typing import TYPE_CHECKING

import click

from mllm_edge.cli.options import json_option
from mllm_edge.cli.output import bytes_text, print_json, table, write_answer
from mllm_edge.errors import MllmEdgeError
from mllm_edge.install import install_hint

if TYPE_CHECKING:
    from mllm_edge.export.systems import System

__all__ = ["command"]

_LOSS = "what quantization cost is a fact of a bundle: export and quantize tell it, mllm-edge inspect BUNDLE shows it"


@click.command("families", short_help="List the models that can be exported, and those that cannot.")
@json_option("Print the list as JSON.")
def command(as_json: bool) -> None:
    """List model types of config.json: those that are exported, with decoders, the smallest public checkpoint, and the
    most that its weights take in the recipe int4; those that are planned; and why others cannot be exported."""
    from mllm_edge.json_form import to_json

    found = _systems()
    if as_json:
        print_json([to_json(system) for system in found])
        return
    supported = [system for system in found if system.status == "supported"]
    rows = [
        [s.model_type, s.name, ", ".join(s.decoders), "" if s.int4_bytes is None else bytes_text(s.int4_bytes)]
        for s in supported
    ]
    others = {status: [s for s in found if s.status == status] for status in ("planned", "impossible")}
    parts = [
        table(["model type", "name", "decoders", "int4"], rows),
        f"targets: {', '.join(_targets())}",
        "\n".join(["examples:", *dict.fromkeys(f"  {name}" for s in supported for name in s.examples)]),
        "\n".join(["planned:", *(f"  {s.model_type}: {s.name}" for s in others["planned"])]),
        "\n".join(["cannot be exported:", *(f"  {s.name}: {s.why}" for s in others["impossible"])]),
        _LOSS,
    ]
    write_answer("\n\n".join(parts) + "\n")


def _systems() -> "list[System]":
    try:
        from mllm_edge.export.systems import systems
    except ModuleNotFoundError as e:
        raise MllmEdgeError(
            f"the families belong to the exporter, and {e.name} is not installed", install_hint("export")
        ) from e
    return systems()


def _targets() -> tuple[str, ...]:
    from mllm_edge.cli.export import TARGETS

    return tuple(TARGETS)
