"""`mllm-edge run`: answers to standard output, everything else to standard error."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from mllm_edge import VLM

Cli = Callable[..., Result]
SHORT = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path, image_file: Path) -> str:
    """The greedy answer to "Hi" about the picture."""
    with VLM.load(tiny_bundle) as vlm:
        return vlm.generate("Hi", images=[image_file], max_new_tokens=6).text


def test_streams_the_answer(cli: Cli, tiny_bundle: Path, image_file: Path, expected: str) -> None:
    result = cli("run", tiny_bundle, "Hi", "--image", image_file, *SHORT)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected + "\n"
    for word in ("TTFT", "preprocess", "vision encoder", "connector", "prefill", "TPOT", "tok/s", "6 new"):
        assert word in result.stderr


def test_quiet_says_only_the_answer(cli: Cli, tiny_bundle: Path, image_file: Path, expected: str) -> None:
    result = cli("run", tiny_bundle, "Hi", "--image", image_file, "--quiet", *SHORT)
    assert (result.stdout, result.stderr) == (expected + "\n", "")


def test_json(cli: Cli, tiny_bundle: Path, image_file: Path, expected: str) -> None:
    result = cli("run", tiny_bundle, "Hi", "--image", image_file, "--json", *SHORT)
    data = json.loads(result.stdout)
    assert set(data) == {"text", "token_ids", "finish_reason", "metrics"}
    assert data["text"] == expected
    assert len(data["token_ids"]) == data["metrics"]["new_tokens"] == 6
    assert data["finish_reason"] == "length"
    assert data["metrics"]["image_tokens"] > 0
    assert result.stderr == ""
    assert data["metrics"]["load"] > 0


def test_the_load_is_told(cli: Cli, tiny_bundle: Path) -> None:
    assert re.match(r"load \d+(\.\d+)? ms\nTTFT ", cli("run", tiny_bundle, "Hi", "-n", "2").stderr)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--top-p", "0.5"], "--top-p does nothing at --temperature 0"),
        (["--top-k", "5", "--seed", "0"], "--top-k and --seed do nothing at --temperature 0"),
        (["--min-p", "0.1"], "--min-p does nothing"),
        (["--max-context", "4096"], "--max-context 4096 is more than this bundle holds: 1024 tokens"),
    ],
)
def test_options_without_effect_are_told(cli: Cli, tiny_bundle: Path, given: list[str], told: str) -> None:
    for verb in (["run", tiny_bundle, "Hi"], ["chat", tiny_bundle]):
        result = cli(*verb, *given, *SHORT, "--quiet", input="Hi\n")
        assert result.exit_code == 0, result.stderr
        notices = [line for line in result.stderr.splitlines() if not line.startswith("cut short")]
        assert len(notices) == 1
        assert notices[0].startswith(told)
    if "--max-context" not in given:
        assert cli("run", tiny_bundle, "Hi", *given, "--temperature", "1", *SHORT, "--quiet").stderr == ""


def test_threads_where_and_how(cli: Cli, tiny_bundle: Path) -> None:
    assert cli("run", tiny_bundle, "Hi", "--spin", "off", "--threads", "1", *SHORT, "--quiet").exit_code == 0
    for given in (["--affinity", "x"], ["--spin", "never"], ["--threads", "100000"]):
        result = cli("run", tiny_bundle, "Hi", *given)
        assert result.exit_code == 2
        assert given[0][2:] in result.stderr


def test_speculation_says_the_same(cli: Cli, tiny_bundle: Path) -> None:
    command = ("run", tiny_bundle, "abcabcabcabc " * 3, "--max-new-tokens", "40", "--frequency-penalty", "-1")
    plain = cli(*command)
    guessed = cli(*command, "--speculation", "8")
    assert guessed.exit_code == 0, guessed.stderr
    assert guessed.stdout == plain.stdout
    assert re.search(r"tok/s, \d+ of \d+ guesses accepted, \d+ prompt tokens", guessed.stderr)
    assert "guesses" not in plain.stderr
    metrics = json.loads(cli(*command, "--speculation", "8", "--json").stdout)["metrics"]
    assert 0 < metrics["accepted"] <= metrics["guessed"]
    refused = cli(*command, "--speculation", "16")
    assert refused.exit_code == 2
    assert "0<=x<=15" in refused.stderr


def test_text_alone_has_no_vision_stages(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("run", tiny_bundle, "Hi", *SHORT)
    assert result.exit_code == 0
    assert "vision" not in result.stderr
    assert "prefill" in result.stderr


def test_prompt_from_standard_input(cli: Cli, tiny_bundle: Path, image_file: Path, expected: str) -> None:
    result = cli("run", tiny_bundle, "-", "--image", image_file, *SHORT, input="Hi\n")
    assert result.stdout == expected + "\n"


def test_image_from_standard_input(cli: Cli, tiny_bundle: Path, image_file: Path, expected: str) -> None:
    result = cli("run", tiny_bundle, "Hi", "--image", "-", *SHORT, input=image_file.read_bytes())
    assert result.stdout == expected + "\n"


def test_standard_input_is_read_once(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("run", tiny_bundle, "-", "--image", "-", input="Hi")
    assert result.exit_code == 2
    assert "only one of PROMPT, --image and --video" in result.stderr


def test_a_prompt_that_is_not_utf8(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("run", tiny_bundle, "-", input=b"\xff\xfe")
    assert result.exit_code == 2
    assert "not UTF-8" in result.stderr


def test_several_images(cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    one, two = (
        json.loads(cli("run", tiny_bundle, "Hi", *["--image", image_file] * n, "--json", *SHORT).stdout) for n in (1, 2)
    )
    assert two["metrics"]["image_tokens"] == 2 * one["metrics"]["image_tokens"]


def test_system_message_reaches_the_template(cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    plain, told = (
        json.loads(cli("run", tiny_bundle, "Hi", "--image", image_file, "--json", *SHORT, *extra).stdout)
        for extra in ([], ["--system", "Be brief."])
    )
    # The tiny tokenizer has one token a byte: "System: Be brief.", the end token and a line break.
    assert told["metrics"]["prompt_tokens"] == plain["metrics"]["prompt_tokens"] + len("System: Be brief.") + 2


def test_raw_prompt(cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    result = cli("run", tiny_bundle, "<image>Hi", "--raw", "--image", image_file, "--json", *SHORT)
    assert result.exit_code == 0, result.stderr
    excluded = cli("run", tiny_bundle, "<image>Hi", "--raw", "--system", "Be brief.")
    assert excluded.exit_code == 2
    assert "exclude each other" in excluded.stderr


def test_sampling_is_repeatable(cli: Cli, tiny_bundle: Path) -> None:
    options = ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.01", "--repetition-penalty"]
    options += ["1.1", "--frequency-penalty", "0.1", "--presence-penalty", "0.1", "--json", *SHORT]
    ids = [
        json.loads(cli("run", tiny_bundle, "Hi", *options, "--seed", seed).stdout)["token_ids"] for seed in (1, 1, 2)
    ]
    assert ids[0] == ids[1] != ids[2]


def test_stop_string(cli: Cli, tiny_bundle: Path, image_file: Path, expected: str) -> None:
    stop = expected[2:4]
    arguments = ("run", tiny_bundle, "Hi", "--image", image_file, "--stop", stop, *SHORT)
    assert cli(*arguments).stdout == expected[: expected.index(stop)] + "\n"
    assert json.loads(cli(*arguments, "--json").stdout)["finish_reason"] == "stop_string"


@pytest.mark.parametrize(
    "option",
    [
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-p", "0"],
        ["--min-p", "2"],
        ["--top-k", "-1"],
        ["--repetition-penalty", "0"],
        ["--max-new-tokens", "0"],
        ["--threads", "0"],
        ["--max-context", "0"],
        ["--backend", "none"],
        ["--stop", ""],
    ],
)
def test_options_out_of_range_are_usage_errors(cli: Cli, tiny_bundle: Path, option: list[str]) -> None:
    result = cli("run", tiny_bundle, "Hi", *option)
    assert result.exit_code == 2
    assert option[0].lstrip("-").replace("-", "_") in result.stderr.replace("-", "_")
    assert result.stdout == ""


def test_bad_image(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    for path in (broken, tmp_path / "absent.png"):
        result = cli("run", tiny_bundle, "Hi", "--image", path)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert path.name in result.stderr


def test_too_long_a_prompt(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("run", tiny_bundle, "x" * 200, "--max-context", "100")
    assert result.exit_code == 1
    assert "fix: raise --max-context" in result.stderr


def test_not_a_bundle(cli: Cli, tmp_path: Path) -> None:
    result = cli("run", tmp_path, "Hi")
    assert result.exit_code == 1
    assert "not a bundle" in result.stderr


def test_an_interruption_is_one_line(cli: Cli, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VLM, "load", load)
    result = cli("run", tiny_bundle, "Hi")
    assert result.exit_code == 130
    assert result.stderr == "interrupted: the command was stopped\n"


def test_a_closed_pipe_ends_quietly(environment: dict[str, str], tiny_bundle: Path) -> None:
    command = [sys.executable, "-m", "mllm_edge", "run", str(tiny_bundle), "Hi", "--quiet"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        stderr = running.stderr.read()
    assert running.returncode == 1
    assert stderr == b""


def test_a_character_the_locale_cannot_write(environment: dict[str, str], tiny_bundle: Path) -> None:
    command = [sys.executable, "-m", "mllm_edge", "run", str(tiny_bundle), "Hi", "--quiet", *SHORT]
    ascii_only = {**environment, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_space_before_an_answer_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    from mllm_edge.cli.run import _answer

    result = SimpleNamespace(text="  3 shapes")
    pieces = [SimpleNamespace(text=t, result=None) for t in (" ", " 3", " shapes")]
    pieces.append(SimpleNamespace(text="", result=result))
    vlm: Any = SimpleNamespace(stream=lambda *_, **__: iter(pieces))
    assert _answer(vlm, "How many?", [], show=True) is result
    assert capsys.readouterr().out == "3 shapes\n"


def test_verify_reads_every_file_first(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    assert cli("run", copy, "Hi", "--max-new-tokens", "1", "--verify").exit_code == 0
    path = copy / "embed_tokens.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    result = cli("run", copy, "Hi", "--max-new-tokens", "1", "--verify")
    assert result.exit_code == 1
    assert "embed_tokens.npy differs from what was exported" in result.stderr
    assert "copy the bundle again" in result.stderr


def test_choices_are_told_by_their_shares(cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    command = ("run", tiny_bundle, "Is there a cat?", "--image", image_file, "--choices", "yes", "--choices", "no")
    with VLM.load(tiny_bundle) as vlm:
        scores = vlm.score_answers("Is there a cat?", str(image_file), answers=["yes", "no"])
    result = cli(*command)
    assert result.exit_code == 0, result.stderr
    ranked = sorted(scores, key=lambda score: -score.share)
    assert result.stdout == "".join(f"{score.share:.3f}  {score.answer}\n" for score in ranked)
    found = json.loads(cli(*command, "--json").stdout)["choices"]
    assert [entry["answer"] for entry in found] == ["yes", "no"]
    assert sum(entry["share"] for entry in found) == pytest.approx(1)
    wrong = cli(*command, "--choices", " ")
    assert wrong.exit_code != 0
    assert "an answer is ' '" in wrong.stderr


SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("option", "content", "pattern"),
    [
        ("--schema", json.dumps(SCHEMA), r'\{"n": [12]\}'),
        ("--schema", None, r'\{"n": [12]\}'),
        ("--regex", "[ab]{3}", "[ab]{3}"),
        ("--one-of", "yes", "yes"),
        ("--grammar", None, "left|right"),
    ],
)
def test_the_answer_is_what_is_asked_for(
    cli: Cli, tiny_bundle: Path, tmp_path: Path, option: str, content: str | None, pattern: str
) -> None:
    """`content` None: a file of it."""
    if content is None:
        content = str(tmp_path / "file")
        Path(content).write_text(json.dumps(SCHEMA) if option == "--schema" else 'start: "left" | "right"')
    result = cli("run", tiny_bundle, "Hi", option, content, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert re.fullmatch(pattern, result.stdout.strip())
    assert result.stderr == ""


def test_a_cut_answer_is_told(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("run", tiny_bundle, "Hi", "--regex", "[ab]{30}", "--quiet", "-n", "5")
    assert result.exit_code == 0
    assert result.stderr == "cut short: not yet all of what --regex asks for; raise --max-new-tokens\n"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--regex", "a", "--one-of", "b"), "--regex and --one-of exclude each other"),
        (("--regex", "a", "--choices", "b"), "--regex and --choices exclude each other"),
        (("--schema", "none.json"), "none.json: cannot be read (No such file or directory)"),
        (("--grammar", "."), ".: cannot be read (Is a directory)"),
        (("--regex", "("), "unclosed group"),
        (("--max-thinking-tokens", "5"), "no token that ends a thinking part"),
        (("--stop-token-id", "9999"), "from 0 to 319"),
    ],
)
def test_what_cannot_be_asked_for(cli: Cli, tiny_bundle: Path, options: tuple[str, ...], told: str) -> None:
    result = cli("run", tiny_bundle, "Hi", *options)
    assert result.exit_code == 2
    assert told in result.stderr
