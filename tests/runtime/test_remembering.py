"""Conversations that fork, go back and are saved; images and beginnings of prompts that are kept within a budget."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.errors import ClosedError, ContextError, ImageError, OptionError, PromptError
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.conversation import Conversation
from mllm_edge.runtime.trace import Trace
from tests.families.row import rows

SHORT: dict[str, Any] = {"max_new_tokens": 5, "ignore_eos": True}
# One whose state can be rewound, and one whose cannot.
FAMILIES = ("idefics3", "lfm2_vl")


def frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture(
    scope="module", params=[pytest.param(f, marks=pytest.mark.xdist_group(f"bundle-{f}")) for f in FAMILIES]
)
def bundle(request: pytest.FixtureRequest, floats: Callable[[str], Path]) -> Bundle:
    assert request.param in rows()
    return Bundle.load(floats(request.param))


@pytest.fixture
def vlm(bundle: Bundle) -> Iterator[VLM]:
    with VLM(bundle, OnnxRuntimeCpu()) as vlm:
        yield vlm


def say(chat: Conversation, question: str, **options: Any) -> Any:
    """The finished answer."""
    return list(chat.ask(question, **{**SHORT, **options}))[-1].result


def fresh(vlm: VLM, chat: Conversation) -> tuple[int, ...]:
    """What a fresh prompt is answered that has all of a conversation but its last answer."""
    return vlm.generate(chat.messages()[:-1], **SHORT).token_ids


def test_forks_go_on_by_themselves_and_share_what_was_run(vlm: VLM) -> None:
    chat = vlm.chat("Be brief.")
    chat.attach(frame(1))
    say(chat, "What is this?")
    other = chat.fork()
    first, second = say(chat, "And its colour?"), say(other, "And its size, and where does it stand?")
    assert second.metrics.reused >= second.metrics.image_tokens > 0
    back = say(chat, "Sure?")  # the other one has the decoder; this one was kept
    assert back.metrics.reused > back.metrics.image_tokens
    assert (chat.turns, other.turns) == (3, 2)
    assert back.token_ids == fresh(vlm, chat)
    assert second.token_ids == fresh(vlm, other)
    assert first.token_ids != second.token_ids


def test_a_conversation_goes_back(vlm: VLM) -> None:
    chat = vlm.chat("Be brief.")
    for question in ("One?", "Two?", "Three?"):
        say(chat, question)
    chat.truncate(1)
    assert [m["role"] for m in chat.messages()] == ["system", "user", "assistant"]
    result = say(chat, "Two, then?")
    assert result.token_ids == fresh(vlm, chat)
    chat.truncate(0)
    assert chat.messages() == [{"role": "system", "content": "Be brief."}]
    with pytest.raises(OptionError, match="turns"):
        chat.truncate(1)


def test_a_saved_conversation_runs_nothing_again(bundle: Bundle, vlm: VLM, tmp_path: Path) -> None:
    chat = vlm.chat()
    chat.attach(frame(2))
    say(chat, "What is this?")
    chat.save_state(tmp_path / "talk.npz")
    expected = say(chat, "And why?")
    with VLM(bundle, OnnxRuntimeCpu()) as again:
        loaded, trace = again.chat(), Trace()
        loaded.load_state(tmp_path / "talk.npz")
        found = say(loaded, "And why?", trace=trace)
        assert found.token_ids == expected.token_ids
        assert found.metrics.reused >= found.metrics.image_tokens
        assert trace.runs("vision_encoder") == 0
        assert loaded.messages()[1:] == chat.messages()[1:]


def test_saved_conversations_of_others_are_refused(vlm: VLM, tmp_path: Path, tiny_bundle: Path) -> None:
    chat = vlm.chat()
    say(chat, "Hello?")
    chat.save_state(tmp_path / "talk.npz")
    (tmp_path / "none.npz").write_bytes(b"nothing")
    with VLM.load(tiny_bundle) as other:
        for name, word in (("talk.npz", "another bundle"), ("none.npz", "not a saved"), ("gone.npz", "cannot be read")):
            talk = other.chat()
            with pytest.raises(PromptError, match=word):
                talk.load_state(tmp_path / name)
            assert talk.messages() == []
        with pytest.raises(ImageError, match="not an encoded image"):
            other.load_image(tmp_path / "none.npz")


def test_pictures_without_a_path_are_saved_as_data(vlm: VLM, tmp_path: Path) -> None:
    chat = vlm.chat()
    chat.attach(frame(3))
    said = say(chat, "What is this?")
    chat.save(str(tmp_path / "talk.json"))
    (entry, _) = json.loads((tmp_path / "talk.json").read_text())[0]["content"]
    assert entry["url"].startswith("data:image/png;base64,")
    again = vlm.chat()
    again.load(str(tmp_path / "talk.json"))
    assert vlm.generate(again.messages()[:-1], **SHORT).token_ids == said.token_ids


def test_images_that_come_again_are_not_looked_at_again(bundle: Bundle) -> None:
    with VLM(bundle, OnnxRuntimeCpu(), image_cache=1 << 20) as vlm:
        runs = []
        for seed in (1, 2, 1):
            trace = Trace()
            result = vlm.generate("What?", frame(seed), trace=trace, **SHORT)
            runs.append(trace.runs("vision_encoder"))
            with VLM(bundle, OnnxRuntimeCpu()) as plain:
                assert result.token_ids == plain.generate("What?", frame(seed), **SHORT).token_ids
    assert runs[0] == runs[1] > 0 == runs[2]


def test_caches_keep_to_their_budget(bundle: Bundle) -> None:
    with VLM(bundle, OnnxRuntimeCpu(), image_cache=1, prefix_cache=0) as vlm:
        for _ in range(2):
            trace = Trace()
            vlm.generate("What?", frame(1), trace=trace, **SHORT)
            assert trace.runs("vision_encoder") > 0
        first, second = vlm.chat("Be brief, and speak of nothing else."), vlm.chat("Tell me all there is to know.")
        say(first, "One?")
        say(second, "Two?")
        assert say(first, "Three?").token_ids == fresh(vlm, first)


def test_a_longer_prompt_finds_room(vlm: VLM) -> None:
    chat = vlm.chat()
    say(chat, "Hello?")
    long = say(chat, "word " * 80, max_new_tokens=300)
    assert long.metrics.reused > 0
    assert long.token_ids[:5] == fresh(vlm, chat)
    with pytest.raises(ContextError):
        say(chat, "word " * 800)
    assert chat.turns == 2
    assert say(chat, "And now?").token_ids == fresh(vlm, chat)


def test_an_answer_given_up_leaves_what_was_run(vlm: VLM) -> None:
    chat = vlm.chat()
    for piece in chat.ask("Hello?", max_new_tokens=50, ignore_eos=True):
        if piece.text:
            break
    result = say(chat, "Go on.")
    assert result.metrics.reused > 0
    assert result.token_ids == fresh(vlm, chat)


def test_after_an_error_everything_is_run_again(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = vlm.chat()
    say(chat, "Hello?")
    with monkeypatch.context() as patch:
        patch.setattr(vlm.decoder, "forward", _failing)
        patch.setattr(vlm.decoder, "top_logits", _failing)
        with pytest.raises(RuntimeError, match="in the midst"):
            say(chat, "And now?")
    assert chat.turns == 1
    result = say(chat, "And now?")
    assert result.token_ids == fresh(vlm, chat)


def test_guesses_come_true_in_conversations(vlm: VLM) -> None:
    if not vlm.decoder.rewindable:
        return
    plain, guessed = vlm.chat(), vlm.chat()
    for question in ("abcabc", "abcabcabc"):
        options = {"max_new_tokens": 20, "frequency_penalty": -1.0}
        assert say(plain, question, **options).token_ids == say(guessed, question, speculation=3, **options).token_ids


def test_a_closed_model_encodes_nothing(bundle: Bundle) -> None:
    vlm = VLM(bundle, OnnxRuntimeCpu())
    vlm.close()
    for call in (lambda: vlm.encode_image(frame(1)), lambda: vlm.score_answers("?", answers=["yes"])):
        with pytest.raises(ClosedError):
            call()


def _failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("in the midst")


def test_encoded_images_are_saved_with_a_conversation(bundle: Bundle, vlm: VLM, tmp_path: Path) -> None:
    chat = vlm.chat()
    chat.attach(vlm.encode_image(frame(4)))
    say(chat, "What is this?")
    chat.save_state(tmp_path / "talk.npz")
    with pytest.raises(PromptError, match="save_state"):
        chat.save(str(tmp_path / "talk.json"))
    with VLM(bundle, OnnxRuntimeCpu()) as again:
        loaded = again.chat()
        loaded.load_state(tmp_path / "talk.npz")
        assert say(loaded, "And why?").token_ids == say(chat, "And why?").token_ids


def test_pictures_that_are_gone_are_not_taken_for_others(vlm: VLM) -> None:
    """A new picture may lie where one lay that was forgotten."""
    chat = vlm.chat()
    for seed in range(8):
        chat.reset()
        chat.attach(frame(seed))
        assert say(chat, "What is this?").token_ids == fresh(vlm, chat)
