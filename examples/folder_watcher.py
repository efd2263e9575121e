"""Pictures that come into a folder, a line of JSON for each: python examples/folder_watcher.py BUNDLE FOLDER FILE

Goes on where it was interrupted: what has its line in FILE is not asked about again. A picture that cannot be read is a
line with an error. `--once` answers about what is there and leaves; without it the folder is looked at every second.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_edge import VLM
from mllm_edge.errors import ImageError

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
QUESTION = "What is in the picture?"


def told(file: Path) -> set[str]:
    """The pictures that have their line; a line that was cut off while it was written is none."""
    if not file.exists():
        return set()
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        file.write_text("".join(whole), encoding="utf-8")
    return {json.loads(line)["image"] for line in whole}


def new(folder: Path, known: set[str]) -> Iterator[Path]:
    """Pictures that have no line yet, the oldest first."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.name not in known]
    yield from sorted(found, key=lambda path: (path.stat().st_mtime, path.name))


def line(vlm: VLM, path: Path) -> dict[str, Any]:
    try:
        yes, _ = vlm.score_answers("Is there a circle?", path, answers=["yes", "no"])
        result = vlm.generate(QUESTION, path, max_new_tokens=24)
    except ImageError as error:
        return {"image": path.name, "error": error.message}
    seconds = round(result.metrics.total, 3)
    return {"image": path.name, "answer": result.text, "circle": round(yes.share, 3), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--once", action="store_true")
    options = parser.parse_args()
    known = told(options.file)
    with VLM.load(options.bundle, image_cache=16 << 20) as vlm, options.file.open("a", encoding="utf-8") as out:
        while True:
            for path in new(options.folder, known):
                out.write(json.dumps(line(vlm, path)) + "\n")
                out.flush()
                known.add(path.name)
                print(path.name, "done")
            if options.once:
                return
            time.sleep(1)


if __name__ == "__main__":
    main()
