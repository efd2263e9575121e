"""Writes docs/families.md: every system, what the tests prove of it, and why others are not exported.

python scripts/families.py
"""

from pathlib import Path

from mllm_edge.export.systems import System, systems

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
_HEAD = """# Families

Written by `python scripts/families.py`, from what the tests themselves write down
(`mllm_edge/export/proven.json`); `mllm-edge families` says the same.

Every line of the first table is compared with transformers in float32 through the whole path: tokens, pixels,
features, prefill, 32 decode steps and greedy text, on images of odd sizes and several images, in each dialect; and
exported in each precision for each target beside its source. The graphs of other targets run on the processor for
that (ONNX Runtime has all their operators); [gpu.md](gpu.md) says what ran on a GPU. `int4`: what the weights of the
smallest public checkpoint take at most in the recipe int4, without the table of embeddings, which stays on disk.
"""


def page() -> str:
    """The page's text."""
    found = systems()
    supported = [system for system in found if system.status == "supported"]
    rows = [_row(s) for s in supported]
    planned = [f"| {s.name} | `{s.model_type}` | {s.why} |" for s in found if s.status == "planned"]
    impossible = [f"| {s.name} | {s.why} |" for s in found if s.status == "impossible"]
    return "\n".join(
        [
            _HEAD,
            "| model type | name | decoders | components | precisions | targets | smallest public checkpoint | int4 |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "\n## Planned\n",
            "| name | model type | what stands in the way |",
            "|---|---|---|",
            *planned,
            "\n## Not to be exported\n",
            "| name | why |",
            "|---|---|",
            *impossible,
            "",
        ]
    )


def _row(system: System) -> str:
    size = "" if system.int4_bytes is None else f"{system.int4_bytes / 1e9:.2f} GB"
    lists = (system.decoders, system.components, system.precisions, system.targets)
    cells = [f"`{system.model_type}`", system.name, *map(", ".join, lists), system.checkpoint, size]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
