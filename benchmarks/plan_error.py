"""Peak memory as it is planned from a bundle's graphs, beside what a process takes that loads it and answers.

python -m benchmarks.plan_error [--families NAME …] [--real NAME …] [--bundles DIR …] [--size WxH] [--images K]
                                [--new-tokens N] [--json F] [--folder DIR]

Families are at tiny sizes, in float32, where the process itself is most of it; `--real` has random weights at the sizes
of real models, int4. The base is a process that imports the same and loads nothing.
"""

import argparse
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import in_process
from benchmarks.report import Report

__all__ = ["main"]

_PERCENT, _MEGA = 10.0, 1e6
_PROMPT = "What is on the belt?"


def main() -> None:
    from benchmarks.vlm_checkpoints import GEOMETRIES  # not above: the processes that are measured read this file, too

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--families", nargs="*", metavar="NAME", help="none: every one")
    parser.add_argument("--real", nargs="+", choices=GEOMETRIES, default=[])
    parser.add_argument("--bundles", nargs="+", type=Path, default=[])
    parser.add_argument("--size", default="640x480", help="of the pictures, width first")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes (8 GB with --real)")
    options = parser.parse_args()
    size = re.fullmatch(r"(\d+)x(\d+)", options.size)
    if size is None:
        parser.error("write the size as 640x480")
    asked = int(size[2]), int(size[1]), options.images, options.new_tokens
    report = Report(f"Peak memory, planned and measured: {options.images} pictures of {options.size}, MB")
    base = in_process(_base).result
    for name, bundle in _bundles(options):
        row = _row(bundle, asked, base)
        report.rows.append({"bundle": name, **row})
        report.at_most(f"{name}: error of the total, %", abs(row["total %"]), _PERCENT)
    worst = max((abs(row["above %"]) for row in report.rows), default=0.0)
    report.at_most("largest error above the base, %", worst, _PERCENT)
    report.print()
    if options.json:
        report.write(options.json)


def _bundles(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Names and folders, each made when it is asked for and gone when the next one is."""
    from benchmarks.vlm_checkpoints import GEOMETRIES
    from tests.families.row import rows

    yield from ((path.name, path) for path in options.bundles)
    wanted = options.families
    names = [] if wanted is None else wanted or list(rows())
    if wanted is None and not options.real and not options.bundles:
        names = list(rows())
    for name in (*names, *options.real):
        with tempfile.TemporaryDirectory(prefix="mllm-edge-", dir=options.folder) as folder:
            in_process(_real if name in GEOMETRIES else _tiny, name, Path(folder))
            yield name, Path(folder) / "bundle"


def _tiny(family: str, folder: Path) -> None:
    from mllm_edge.export.pipeline import export
    from tests.families.row import rows
    from tests.timm_reference import stand_in_for_timm

    stand_in_for_timm()  # where timm is not installed
    row = rows()[family]
    row.save(folder / "checkpoint", **row.configs[row.first])
    export(str(folder / "checkpoint"), folder / "bundle", recipe_name="fp32", verify_mode="off")


def _real(name: str, folder: Path) -> None:
    from benchmarks.vlm_checkpoints import GEOMETRIES
    from mllm_edge.export.pipeline import export
    from tests.timm_reference import stand_in_for_timm

    stand_in_for_timm()
    GEOMETRIES[name](folder / "checkpoint")
    export(str(folder / "checkpoint"), folder / "bundle", recipe_name="int4", verify_mode="off")


def _row(bundle: Path, asked: tuple[int, int, int, int], base: int) -> dict[str, Any]:
    planned, parts = in_process(_planned, bundle, asked).result
    measured = in_process(_measured, bundle, asked).result
    return {
        "measured": measured / _MEGA,
        "planned": planned / _MEGA,
        "total %": 100 * (planned / measured - 1),
        "above, measured": (measured - base) / _MEGA,
        "above, planned": (planned - base) / _MEGA,
        "above %": 100 * ((planned - base) / (measured - base) - 1),
        **{name: nbytes / _MEGA for name, nbytes in parts.items()},
    }


def _base() -> int:
    """A process that imports what an answer needs."""
    import mllm_edge.runtime.vlm  # noqa: F401
    from mllm_edge.runtime.backends.onnxruntime_cpu import import_onnxruntime
    from mllm_edge.runtime.machine.cpu import resident

    import_onnxruntime()
    return resident()


def _planned(bundle: Path, asked: tuple[int, int, int, int]) -> tuple[int, dict[str, int]]:
    import mllm_edge.runtime.vlm  # noqa: F401
    from mllm_edge.bundle import Bundle
    from mllm_edge.json_form import to_json
    from mllm_edge.runtime.planning.plan import open_planner
    from mllm_edge.runtime.prompt.token_budget import FREE

    height, width, images, new = asked
    opened = Bundle.load(bundle)
    images = _fewer(opened, images)
    planner = open_planner(opened)
    context = opened.manifest.model.context_length
    memory = planner.plan(_PROMPT, [(height, width)] * images, [FREE] * images, new, context).memory
    return memory.peak, to_json(memory)


def _measured(bundle: Path, asked: tuple[int, int, int, int]) -> int:
    from mllm_edge.bundle import Bundle
    from mllm_edge.runtime.machine.cpu import peak_rss
    from mllm_edge.runtime.vlm import VLM

    height, width, images, new = asked
    images = _fewer(Bundle.load(bundle), images)
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(images)]
    with VLM.load(bundle) as vlm:
        vlm.generate(_PROMPT, pictures, max_new_tokens=new, ignore_eos=True)
        return peak_rss()


def _fewer(bundle: Any, images: int) -> int:
    most = bundle.manifest.model.image.most_images
    return images if most is None else min(images, int(most))


if __name__ == "__main__":
    main()
