"""The README is run: every block of bash and Python, in order, in one empty directory that has the examples."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# The reasons a block may give for not being run.
EXCUSES = {"installs packages", "sets up an environment of its own", "downloads a model"}
_BLOCK = re.compile(r"(?:<!-- not-run: (?P<excuse>[^\n]*?) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)```", re.S)
_SETS_UP = ("git clone", "make ", "pip install")
_ANSWERS = ("mllm-edge run", "mllm-edge inspect", "mllm-edge profile", "print(")


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is where its code begins."""

    language: str
    code: str
    line: int
    excuse: str | None


def blocks() -> list[Block]:
    """All blocks of bash and Python in the README, in order."""
    text = README.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["code"], text.count("\n", 0, m.start("code")) + 1, m["excuse"])
        for m in _BLOCK.finditer(text)
    ]


def test_only_set_up_is_not_run() -> None:
    found = blocks()
    assert any(b.excuse is None and b.language == "bash" for b in found)
    assert any(b.excuse is None and b.language == "python" for b in found)
    for block in found:
        sets_up = any(word in block.code for word in _SETS_UP)
        assert (block.excuse is not None) == sets_up, f"README.md:{block.line}"
        assert block.excuse is None or block.excuse in EXCUSES, f"README.md:{block.line}"


def test_every_block_runs_and_answers_rightly(tmp_path: Path) -> None:
    environment = _environment(tmp_path)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    for block in blocks():
        if block.excuse is not None:
            continue
        shell = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*shell, block.code], cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        where = f"README.md:{block.line}"
        assert done.returncode == 0, f"{where}\n{done.stdout}\n{done.stderr}"
        if any(word in block.code for word in _ANSWERS):
            assert done.stdout.strip(), f"{where} prints nothing\n{done.stderr}"
        for answer in _expected(block.code):
            assert answer in done.stdout, f"{where} does not answer {answer!r}\n{done.stdout}"


def test_the_demo_shows_answers_and_latencies(tiny_bundle: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), str(tiny_bundle)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for word in ("images/circles.png", "(expected: ", "vision_encoder", "prefill", "ttft", "tok/s"):
        assert word in done.stdout


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def _environment(folder: Path) -> dict[str, str]:
    """`mllm-edge` and `python` of this interpreter, whether the package is installed or only checked out."""
    programs = folder / "bin"
    programs.mkdir()
    for name, arguments in (("mllm-edge", "-m mllm_edge "), ("python", "")):
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n', encoding="utf-8")
        script.chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def _expected(code: str) -> list[str]:
    """The known answers to the questions that a block asks about one image, greedily."""
    entries = json.loads((ROOT / "examples" / "images" / "questions.json").read_text(encoding="utf-8"))
    if "--temperature" in code:
        return []
    return [e["answer"] for e in entries if e["image"] in code and e["question"] in code]
