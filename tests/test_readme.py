"""README and reference are run: every block of bash and Python, in order, each document in an empty directory that has
the examples."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from mllm_edge.cli import VERBS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "cli.md"
GUIDES = tuple(ROOT / "docs" / name for name in ("first-model.md", "python.md", "embedding.md"))
# The reasons a block may give for not being run.
EXCUSES = {"installs packages", "sets up an environment of its own", "downloads a model"}
_BLOCK = re.compile(r"(?:<!-- not-run: (?P<excuse>[^\n]*?) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)```", re.S)
_SETS_UP = ("git clone", "make ", "pip install")
_ANSWERS = (*(f"mllm-edge {verb}" for verb in ("run", "chat", "inspect", "profile", "compare", "doctor")), "print(")


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is where its code begins."""

    language: str
    code: str
    line: int
    excuse: str | None


def blocks(document: Path) -> list[Block]:
    """All blocks of bash and Python in a document, in order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["code"], text.count("\n", 0, m.start("code")) + 1, m["excuse"])
        for m in _BLOCK.finditer(text)
    ]


def test_only_set_up_is_not_run() -> None:
    found = blocks(README)
    assert any(b.excuse is None and b.language == "bash" for b in found)
    assert any(b.excuse is None and b.language == "python" for b in found)
    for block in found:
        sets_up = any(word in block.code for word in _SETS_UP)
        assert (block.excuse is not None) == sets_up, f"README.md:{block.line}"
        assert block.excuse is None or block.excuse in EXCUSES, f"README.md:{block.line}"


@pytest.mark.parametrize(
    "document",
    # Each takes long, and what the others leave is of no use to it.
    [pytest.param(p, marks=pytest.mark.xdist_group(p.name), id=p.name) for p in (README, REFERENCE, *GUIDES)],
)
def test_every_block_runs_and_answers_rightly(document: Path, tmp_path: Path) -> None:
    environment = _environment(tmp_path)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    for block in blocks(document):
        if block.excuse is not None:
            continue
        shell = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*shell, block.code], cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        where = f"{document.name}:{block.line}"
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


@pytest.mark.parametrize(
    ("example", "shown", "words"),
    [
        ("many_questions.py", "images/circles.png", ("prompt tokens were there", "Is there a circle? no: ")),
        ("camera_loop.py", "images", (" ms  ", "frames were dropped")),
        ("robot_node.py", "images", ("watch: ", "answer: ", "calls were done")),
        ("two_threads.py", "images/circles.png", ("How many circles are there? ", "the watch looked ")),
    ],
)
def test_examples_run(tiny_bundle: Path, example: str, shown: str, words: tuple[str, ...]) -> None:
    command = [sys.executable, str(ROOT / "examples" / example), str(tiny_bundle), str(ROOT / "examples" / shown)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for word in words:
        assert word in done.stdout


def test_the_folder_watcher_goes_on_where_it_was_interrupted(tiny_bundle: Path, tmp_path: Path) -> None:
    folder, lines = tmp_path / "in", tmp_path / "lines.jsonl"
    folder.mkdir()
    for name in ("circles.png", "pair.png"):
        shutil.copy(ROOT / "examples" / "images" / name, folder)
    (folder / "broken.png").write_bytes(b"no picture")
    lines.write_text('{"image": "pair.png", "answer": "was there"}\n{"image": "circ', encoding="utf-8")
    example = ROOT / "examples" / "folder_watcher.py"
    command = [sys.executable, str(example), str(tiny_bundle), str(folder), str(lines), "--once"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    found = {line["image"]: line for line in map(json.loads, lines.read_text(encoding="utf-8").splitlines())}
    assert found.keys() == {"pair.png", "circles.png", "broken.png"}
    assert found["pair.png"]["answer"] == "was there"
    assert "seconds" in found["circles.png"]
    assert "broken.png" in found["broken.png"]["error"]


@pytest.mark.parametrize("document", [README, REFERENCE, *GUIDES], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    headings = {f"#{title.lower()}" for title in re.findall(r"^#+ (.+)$", text, re.M)}
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        assert target in headings or (document.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("verb", VERBS)
def test_the_reference_has_every_verb_and_option(verb: str) -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    shared = text[: text.index("\n## export\n")] + text[text.index("How tokens are chosen") : text.index("\n## chat\n")]
    own = text.split(f"\n## {verb}\n")[1].split("\n## ")[0]
    command = importlib.import_module(f"mllm_edge.cli.{verb}").command
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[-1] in shared + own, f"{verb} {parameter.opts[-1]}"


def test_the_reference_has_no_option_that_is_none() -> None:
    commands = [importlib.import_module(f"mllm_edge.cli.{verb}").command for verb in VERBS]
    commands.append(importlib.import_module("mllm_edge.cli.profile").diff)
    options = {flag for command in commands for p in command.params for flag in p.opts} | {"--help", "--debug"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", REFERENCE.read_text(encoding="utf-8")))
    assert named - options == set()


def _environment(folder: Path) -> dict[str, str]:
    """`mllm-edge` and `python` of this interpreter, whether the package is installed or only checked out."""
    programs = folder / "bin"
    programs.mkdir()
    modules = {"mllm-edge": "-m mllm_edge ", "optimum-cli": "-m optimum.commands.optimum_cli ", "python": ""}
    for name, arguments in modules.items():
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n', encoding="utf-8")
        script.chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def _expected(code: str) -> list[str]:
    """The known answers to the questions that a block asks about one image, greedily."""
    entries = json.loads((ROOT / "examples" / "images" / "questions.json").read_text(encoding="utf-8"))
    answers = any(word in code for word in ("mllm-edge run", "mllm-edge chat", "print("))
    if "--temperature" in code or not answers:
        return []
    return [e["answer"] for e in entries if e["image"] in code and e["question"] in code]
