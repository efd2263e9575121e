"""`mllm-edge families`: what can be exported."""

from typing import Any

import click

from mllm_edge.cli.options import json_option
from mllm_edge.cli.output import print_json, table, write_answer
from mllm_edge.errors import MllmEdgeError
from mllm_edge.install import install_hint

__all__ = ["command"]

_LOSS = "what quantization cost is a fact of a bundle: export and quantize tell it, mllm-edge inspect BUNDLE shows it"


@click.command("families", short_help="List the models that can be exported.")
@json_option("Print the list as JSON.")
def command(as_json: bool) -> None:
    """List the supported families: model types of config.json, decoders, and checkpoints of the hub as examples."""
    families = _families()
    if as_json:
        print_json({"targets": list(_targets()), "families": families})
        return
    lines = [["family", "model types", "decoders"]]
    lines += [[f["family"], ", ".join(f["model_types"]), ", ".join(f["decoders"])] for f in families]
    examples = [f"  {name}" for f in families for name in f["examples"]]
    text = table(lines[0], lines[1:])
    write_answer(
        "\n".join([text, "", f"targets: {', '.join(_targets())}", "", "examples:", *examples, "", _LOSS]) + "\n"
    )


def _families() -> list[dict[str, Any]]:
    try:
        from mllm_edge.export.family import summaries
    except ModuleNotFoundError as e:
        raise MllmEdgeError(
            f"the families belong to the exporter, and {e.name} is not installed", install_hint("export")
        ) from e
    return summaries()


def _targets() -> tuple[str, ...]:
    from mllm_edge.cli.export import TARGETS

    return tuple(TARGETS)
