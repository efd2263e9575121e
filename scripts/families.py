"""Writes docs/families.md: every system, what the tests prove of it, and why others are not exported.

python scripts/families.py
"""

import ast
from collections import Counter
from pathlib import Path
from statistics import median

from mllm_edge.export.systems import System, systems

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
FAMILIES = ROOT / "mllm_edge" / "export" / "families"
_HEAD = """# Families

Written by `python scripts/families.py`, from what the tests themselves write down
(`mllm_edge/export/proven.json`); `mllm-edge families` says the same.

Every line of the first table is compared with transformers in float32 through the whole path: tokens, pixels,
features, prefill, 32 decode steps and greedy text, on images of odd sizes and several images (where a model takes more
than one), in each dialect; and exported in each precision for each target beside its source. The graphs of other
targets run on the processor for that (ONNX Runtime has all their operators); [gpu.md](gpu.md) says what ran on a GPU.
`int4`: what the weights of the smallest public checkpoint take at most in the recipe int4, without the table of
embeddings, which stays on disk.
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
            "\n## What a family takes\n",
            *_sizes(),
            "",
        ]
    )


def _sizes() -> list[str]:
    """The lines of code of each family: of its file, and of those in `families/` and `vision/` that no other reads."""
    files = {path: _read_by(path) for path in sorted(FAMILIES.glob("*.py"))}
    own = [path for path in files if "FAMILY = " in path.read_text(encoding="utf-8")]
    readers = Counter(part for path in own for part in files[path])
    sizes = {}
    for path in own:
        alone = [part for part in files[path] if readers[part] == 1 and part not in own]
        sizes[path.stem] = (_lines(path), sum(map(_lines, alone)))
    found = sorted(sizes.items(), key=lambda size: sum(size[1]))
    middle = median(sum(both) for _, both in found)
    return [
        "Lines of code, without blank lines, imports and docstrings: of a family's file, and of the files for images",
        f"and towers that no other family reads. The median of both together is {middle:g}.",
        "",
        "| family | its file | files of its own beside it |",
        "|---|---|---|",
        *(f"| `{name}` | {file} | {beside} |" for name, (file, beside) in found),
    ]


def _read_by(path: Path) -> set[Path]:
    """The files of `families/` and `vision/` that a family's file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            files = (ROOT / f"{name.replace('.', '/')}.py" for name in names)
            found |= {file for file in files if file.is_file() and file.parent.name in ("families", "vision")}
    return found - {path}


def _lines(path: Path) -> int:
    """Lines that hold code."""
    text = path.read_text(encoding="utf-8")
    left: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node)
        skipped = node if isinstance(node, ast.Import | ast.ImportFrom) else node.body[0] if documented else None
        if skipped is not None:
            left |= set(range(skipped.lineno, (skipped.end_lineno or skipped.lineno) + 1))
    return sum(bool(line.strip()) for i, line in enumerate(text.splitlines(), 1) if i not in left)


def _row(system: System) -> str:
    size = "" if system.int4_bytes is None else f"{system.int4_bytes / 1e9:.2f} GB"
    lists = (system.decoders, system.components, system.precisions, system.targets)
    cells = [f"`{system.model_type}`", system.name, *map(", ".join, lists), system.checkpoint, size]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
