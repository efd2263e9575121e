"""What happens to a conversation when the context is full."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.cli import main
from mllm_edge.errors import ContextError, OptionError
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.trace import Trace

SHORT: dict[str, Any] = {"max_new_tokens": 5, "ignore_eos": True}
LONG = "word " * 30


def frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


# One whose state can be rewound, and one whose cannot.
@pytest.fixture(params=[pytest.param(f, marks=pytest.mark.xdist_group(f"bundle-{f}")) for f in ("idefics3", "lfm2_vl")])
def vlm(request: pytest.FixtureRequest, floats: Callable[[str], Path]) -> Iterator[VLM]:
    with VLM(Bundle.load(floats(request.param)), OnnxRuntimeCpu()) as vlm:
        yield vlm


def say(chat: Any, text: str, **options: Any) -> Any:
    return list(chat.ask(text, **{**SHORT, **options}))[-1].result


def test_the_oldest_turns_go_and_the_system_message_stays(vlm: VLM) -> None:
    chat = vlm.chat("Be brief.", when_full="drop_oldest")
    dropped, asked = [], 0
    while not sum(dropped[:-1]):
        asked += 1
        if asked == 1:
            chat.attach(frame(1))
        result = say(chat, f"{asked} {LONG}")
        dropped.append(result.dropped_turns)
        assert asked < 20
    messages = chat.messages()
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * (asked - sum(dropped))]
    assert messages[0]["content"] == "Be brief."
    first = messages[1]["content"]
    assert [entry["type"] for entry in first] == ["text"], "the picture went with its turn"
    assert first[0]["text"].startswith(f"{1 + sum(dropped)} ")
    # What is left is not run again, and the answers are its own.
    again = say(chat, "And now?")
    assert again.dropped_turns == 0
    assert again.metrics.reused > 0.8 * result.metrics.prompt_tokens
    assert result.token_ids == vlm.generate(messages[:-1], **SHORT).token_ids
    assert vlm.room(chat.messages()) >= 0


def test_a_quarter_of_the_context_is_freed_at_once(vlm: VLM) -> None:
    chat = vlm.chat(when_full="drop_oldest")
    while not (result := say(chat, LONG)).dropped_turns:
        pass
    left = vlm.context_length - result.metrics.prompt_tokens
    assert left >= vlm.context_length // 4
    # One turn fewer would not have freed so much.
    assert left < vlm.context_length // 4 + 250


def test_by_default_the_prompt_is_too_long(vlm: VLM) -> None:
    chat = vlm.chat()
    while vlm.room([*chat.messages(), {"role": "user", "content": LONG}]) > 0:
        assert say(chat, LONG).dropped_turns == 0
    before = chat.messages()
    with pytest.raises(ContextError):
        say(chat, LONG)
    assert chat.messages() == before
    chat.truncate(chat.turns - 1)
    before = chat.messages()
    assert say(chat, "Hi", max_new_tokens=1).dropped_turns == 0
    assert chat.messages()[:-2] == before


def test_a_question_that_is_too_long_alone_changes_nothing(vlm: VLM) -> None:
    chat = vlm.chat(when_full="drop_oldest")
    say(chat, "Hello?")
    chat.attach(frame(2))
    before = chat.messages()
    with pytest.raises(ContextError):
        say(chat, LONG * 20)
    assert (chat.messages(), chat.waiting) == (before, 1)
    assert say(chat, "And this?").dropped_turns == 0


def test_forks_keep_what_the_other_one_forgot(vlm: VLM) -> None:
    chat = vlm.chat(when_full="drop_oldest")
    chat.attach(frame(3))
    say(chat, "What is this?")
    other = chat.fork()
    while not say(chat, LONG).dropped_turns:
        pass
    trace = Trace()
    result = say(other, "And why?", trace=trace)
    assert result.dropped_turns == 0
    assert result.metrics.image_tokens > 0
    assert trace.runs("vision_encoder") == 0, "what was made of the picture is still there"


def test_scores_are_those_of_the_whole_messages(vlm: VLM) -> None:
    """Of the turns before nothing is run again, and the conversation is as it was."""
    chat, answers, question = vlm.chat("Be brief."), ["yes", "not at all"], {"type": "text", "text": "Is it?"}
    chat.attach(frame(1))
    say(chat, "What is this?")
    before = chat.messages()
    expected = vlm.score_answers([*before, {"role": "user", "content": [question]}], answers=answers)
    say(chat.fork(), "And now?")  # the decoder holds another's
    for _ in range(2):
        found = chat.score_answers("Is it?", answers=answers, trace=(trace := Trace()))
        np.testing.assert_allclose([score.logprob for score in found], [s.logprob for s in expected], atol=1e-4)
        np.testing.assert_allclose([score.share for score in found], [s.share for s in expected], atol=1e-4)
        assert not trace.runs("vision_encoder")
    assert chat.messages() == before
    fork = chat.fork()
    kept = fork.score_answers("Is it?", answers=answers, keep=True)
    likeliest = max(kept, key=lambda score: score.share).answer
    assert fork.messages()[len(before) :] == [
        {"role": "user", "content": [question]},
        {"role": "assistant", "content": likeliest},
    ]
    asked = say(chat, "Is it?")
    assert asked.token_ids == vlm.generate(chat.messages()[:-1], **SHORT).token_ids
    assert asked.metrics.reused > 0


def test_scores_of_a_new_picture_leave_it_waiting(vlm: VLM) -> None:
    chat = vlm.chat()
    chat.attach(frame(1))
    with pytest.raises(OptionError, match="no answers"):
        chat.score_answers("Is it?", answers=[])
    chat.score_answers("Is it?", answers=["yes"])
    assert (chat.waiting, chat.messages()) == (1, [])
    chat.score_answers("Is it?", answers=["yes"], keep=True)
    assert chat.waiting == 0
    assert chat.turns == 1


def test_another_word_is_refused(vlm: VLM) -> None:
    with pytest.raises(OptionError, match="drop_oldest"):
        vlm.chat(when_full="drop")  # type: ignore[arg-type]


def test_the_terminal_tells_it(tiny_bundle: Path) -> None:
    lines = "\n".join([LONG] * 8) + "\n"
    options = ["--max-new-tokens", "5", "--max-context", "700"]
    plain = CliRunner().invoke(main, ["chat", str(tiny_bundle), *options], input=lines)
    assert plain.exit_code == 1
    assert "--when-full drop-oldest" in plain.stderr
    found = CliRunner().invoke(main, ["chat", str(tiny_bundle), *options, "--when-full", "drop-oldest"], input=lines)
    assert found.exit_code == 0, found.stderr
    assert "the context was full: the " in found.stderr
    assert "8 answers" in found.stderr
