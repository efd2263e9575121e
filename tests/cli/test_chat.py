"""`mllm-edge chat` by standard input: answers to standard output, everything else to standard error."""

import errno
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from click.testing import Result

from mllm_edge import VLM
from mllm_edge.cli.chat import _lines
from mllm_edge.runtime.conversation import Conversation

Cli = Callable[..., Result]
SHORT = ("--max-new-tokens", "6")


def test_a_conversation_is_what_the_library_answers(cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    result = cli("chat", tiny_bundle, *SHORT, input=f"/image {image_file}\nHi\n\nAnd?\n")
    assert result.exit_code == 0, result.stderr
    with VLM.load(tiny_bundle) as vlm:
        content = [{"type": "image", "path": str(image_file)}, {"type": "text", "text": "Hi"}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        first = vlm.generate(messages, max_new_tokens=6).text
        messages.append({"role": "assistant", "content": first.strip()})
        messages.append({"role": "user", "content": [{"type": "text", "text": "And?"}]})
        second = vlm.generate(messages, max_new_tokens=6).text
    assert result.stdout == f"{first.lstrip()}\n{second.lstrip()}\n"
    assert result.stderr.splitlines()[-1].startswith("2 answers, 12 tokens, ")
    assert result.stderr.splitlines()[-1].endswith(" tok/s")


def test_speculation_says_the_same(cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    lines = f"/image {image_file}\nHi\nAnd?\n"
    plain = cli("chat", tiny_bundle, "--max-new-tokens", "30", input=lines)
    guessed = cli("chat", tiny_bundle, "--max-new-tokens", "30", "--speculation", "8", input=lines)
    assert (guessed.exit_code, guessed.stdout) == (0, plain.stdout)


def test_a_terminal_without_readline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nHo\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert list(_lines()) == ["Hi\n", "Ho\n"]


def test_quit_ends_and_quiet_is_silent(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("chat", tiny_bundle, "--quiet", *SHORT, input="/quit\nHi\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_reset_forgets_all_but_the_system_message(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    result = cli("chat", tiny_bundle, "--system", "Be brief.", *SHORT, input=f"Hi\n/reset\n/save {file}\n/help\n")
    assert result.exit_code == 0, result.stderr
    assert json.loads(file.read_text(encoding="utf-8")) == [{"role": "system", "content": "Be brief."}]
    for name in ("/image", "/reset", "/save", "/load", "/quit"):
        assert name in result.stderr


def test_a_wrong_image_loses_nothing(cli: Cli, tiny_bundle: Path, image_file: Path, tmp_path: Path) -> None:
    lines = f"/image {image_file}\n/image {tmp_path / 'absent.png'}\nHi\n"
    result = cli("chat", tiny_bundle, *SHORT, input=lines)
    good = cli("chat", tiny_bundle, *SHORT, input=f"/image {image_file}\nHi\n")
    assert result.stdout == good.stdout
    assert (result.exit_code, good.exit_code) == (1, 0)
    assert "absent.png: no such file" in result.stderr


def test_a_message_that_is_too_long_loses_nothing(cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    lines = f"Hi\n/image {image_file}\n{'x' * 400}\nOk?\n"
    result = cli("chat", tiny_bundle, "--max-context", "300", *SHORT, input=lines)
    good = cli("chat", tiny_bundle, "--max-context", "300", *SHORT, input=f"Hi\n/image {image_file}\nOk?\n")
    assert result.stdout == good.stdout
    assert result.exit_code == 1
    assert "too many" in result.stderr
    assert "/reset" in result.stderr


@pytest.mark.parametrize(
    ("line", "word"), [("/imagine", "no command /imagine"), ("/image", "needs a file"), ("/load /nowhere", "/nowhere")]
)
def test_wrong_commands(cli: Cli, tiny_bundle: Path, line: str, word: str) -> None:
    result = cli("chat", tiny_bundle, input=line + "\n")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert word in result.stderr


def test_saved_messages_can_be_loaded_and_answered(
    cli: Cli, tiny_bundle: Path, image_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    whole = cli("chat", tiny_bundle, *SHORT, input=f"/image '{image_file}'\nHi\n/save {file}\nAnd?\n")
    rest = cli("chat", tiny_bundle, *SHORT, input=f"/load {file}\nAnd?\n")
    assert rest.exit_code == 0, rest.stderr
    assert whole.stdout.endswith(rest.stdout)
    with VLM.load(tiny_bundle) as vlm:
        assert vlm.generate(json.loads(file.read_text(encoding="utf-8"))[:1], max_new_tokens=6).text


@pytest.mark.parametrize("text", ["no json", "{}", "[1]", '[{"role": "user", "content": [{"type": "sound"}]}]'])
def test_files_that_hold_no_conversation(cli: Cli, tiny_bundle: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(text, encoding="utf-8")
    result = cli("chat", tiny_bundle, *SHORT, input=f"/load {file}\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def test_an_interruption_stops_the_answer_and_keeps_the_conversation(
    cli: Cli, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, interrupted = VLM.stream, []

    def interrupting(vlm: VLM, *arguments: Any, **options: Any) -> Iterator[Any]:
        for i, chunk in enumerate(stream(vlm, *arguments, **options)):
            if i == 2 and not interrupted:
                interrupted.append(True)
                signal.raise_signal(signal.SIGINT)
            yield chunk

    monkeypatch.setattr(VLM, "stream", interrupting)
    before = signal.getsignal(signal.SIGINT)
    file = tmp_path / "talk.json"
    result = cli("chat", tiny_bundle, "--max-new-tokens", "30", input=f"Hi\n/save {file}\nAnd?\n")
    assert result.exit_code == 0, result.stderr
    assert "stopped" in result.stderr
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert result.stdout.splitlines()[0].strip() == saved[1]["content"].splitlines()[0]
    assert "1 answers, 30 tokens" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before


def test_images_stay_attached_when_nothing_was_said(tiny_bundle: Path, image_file: Path) -> None:
    with VLM.load(tiny_bundle) as vlm:
        conversation = Conversation(vlm)
        conversation.attach(str(image_file))
        with pytest.raises(ValueError, match="max_new_tokens"):
            list(conversation.ask("Hi", max_new_tokens=0))
        assert (conversation.waiting, conversation.messages()) == (1, [])


@pytest.mark.parametrize("option", [["--temperature", "-1"], ["--top-p", "0"], ["--max-new-tokens", "0"]])
def test_options_out_of_range(cli: Cli, tiny_bundle: Path, option: list[str]) -> None:
    assert cli("chat", tiny_bundle, *option, input="Hi\n").exit_code == 2


def test_not_a_bundle(cli: Cli, tmp_path: Path) -> None:
    result = cli("chat", tmp_path, input="Hi\n")
    assert result.exit_code == 1
    assert "not a bundle" in result.stderr


def test_a_conversation_that_cannot_be_saved_keeps_the_file(
    cli: Cli, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "talk.json"
    file.write_text("precious")
    monkeypatch.setattr("mllm_edge.files.os.fsync", full)
    result = cli("chat", tiny_bundle, *SHORT, input=f"Hi\n/save {file}\n/help\n")
    assert f"error: {file}: No space left on device" in result.stderr
    assert "MB free, 0.0 MB wanted" in result.stderr
    assert "free some space" in result.stderr
    assert "/reset" in result.stderr  # the conversation goes on
    assert file.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_every_answer_is_guided(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("chat", tiny_bundle, "--one-of", "yes", "--one-of", "no", input="Hi\nAnd?\n")
    assert result.exit_code == 0, result.stderr
    assert set(result.stdout.split()) <= {"yes", "no"}
    assert len(result.stdout.split()) == 2
    assert cli("chat", tiny_bundle, "--one-of", "a", "--regex", "a", input="").exit_code == 2


def test_of_some_choices_the_likeliest_is_the_answer(
    cli: Cli, tiny_bundle: Path, image_file: Path, tmp_path: Path
) -> None:
    file, choices = tmp_path / "talk.json", ("--choices", "yes", "--choices", "not at all")
    result = cli("chat", tiny_bundle, *choices, input=f"/image {image_file}\nIs it red?\nAnd blue?\n/save {file}\n")
    assert result.exit_code == 0, result.stderr
    messages, lines = json.loads(file.read_text(encoding="utf-8")), result.stdout.splitlines()
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    with VLM.load(tiny_bundle) as vlm:
        for end in (1, 3):
            found = vlm.score_answers(messages[:end], answers=["yes", "not at all"])
            ranked = sorted(found, key=lambda score: -score.share)
            assert lines[end - 1 : end + 1] == [f"{score.share:.3f}  {score.answer}" for score in ranked]
            assert messages[end]["content"] == ranked[0].answer
    assert result.stderr.splitlines()[-1] == "2 answers, 0 tokens"


def test_choices_that_cannot_be(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("chat", tiny_bundle, "--choices", " ", input="Hi\n")
    assert result.exit_code == 1
    assert "an answer is ' '" in result.stderr
    both = cli("chat", tiny_bundle, "--choices", "yes", "--regex", "a", input="Hi\n")
    assert both.exit_code == 2
    assert "--regex and --choices exclude each other" in both.stderr


def test_an_interruption_stops_the_scores(cli: Cli, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score, calls = VLM.score_answers, []

    def interrupting(vlm: VLM, *arguments: Any, cancel: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            stopped = Event()
            with cancel.waking(stopped.set):
                signal.raise_signal(signal.SIGINT)
                assert stopped.wait(30)
        return score(vlm, *arguments, cancel=cancel, **options)

    monkeypatch.setattr(VLM, "score_answers", interrupting)
    result = cli("chat", tiny_bundle, "--choices", "yes", "--choices", "no", input="Hi\nAnd?\n")
    assert result.exit_code == 0, result.stderr
    assert "stopped; the question is forgotten" in result.stderr
    assert len(result.stdout.splitlines()) == 2
