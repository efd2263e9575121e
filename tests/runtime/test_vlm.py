"""The public API on a tiny model: streaming, stopping, limits, metrics."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_edge import VLM, Result
from mllm_edge.errors import BackendError, ContextError, MllmEdgeError, PromptError

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def vlm(tiny_bundle: Path) -> VLM:
    return VLM.load(tiny_bundle)


def test_chunks_join_to_the_answer(vlm: VLM) -> None:
    chunks = list(vlm.stream("Tell me.", IMAGE, max_new_tokens=40))
    result = chunks[-1].result
    assert result is not None
    assert all(chunk.result is None for chunk in chunks[:-1])
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert result.text == vlm.tokenizer.decode(result.token_ids)
    assert result == vlm_equal(result, vlm.generate("Tell me.", IMAGE, max_new_tokens=40))


def vlm_equal(first: Result, second: Result) -> Result:
    """`first` when both have the same answer (timings differ)."""
    assert (first.text, first.token_ids, first.finish_reason) == (second.text, second.token_ids, second.finish_reason)
    return first


def test_image_sources_give_the_same_answer(vlm: VLM, tmp_path: Path) -> None:
    picture = Image.fromarray(IMAGE)
    picture.save(tmp_path / "image.png")
    sources = [
        IMAGE,
        picture,
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        (tmp_path / "image.png").read_bytes(),
    ]
    answers = {vlm.generate("Tell me.", [source], max_new_tokens=8).token_ids for source in sources}
    assert len(answers) == 1


def test_image_matters(vlm: VLM) -> None:
    first = vlm.generate("Tell me.", IMAGE, max_new_tokens=8)
    second = vlm.generate("Tell me.", 255 - IMAGE, max_new_tokens=8)
    assert first.token_ids != second.token_ids


def test_metrics(vlm: VLM) -> None:
    metrics = vlm.generate("Tell me.", IMAGE, max_new_tokens=8).metrics
    assert metrics.prompt_tokens == vlm.count_tokens("Tell me.", [IMAGE.shape[:2]])
    assert (metrics.tiles, metrics.image_tokens, metrics.new_tokens) == (5, 5 * 16, 8)
    assert len(metrics.token_seconds) == 7
    stages = sum(metrics.stages[n] for n in ("preprocess", "vision_encoder", "connector", "embed", "prefill"))
    assert 0 < stages <= metrics.ttft <= metrics.total
    assert metrics.tpot == pytest.approx(sum(metrics.token_seconds) / 7)
    assert metrics.tokens_per_second == pytest.approx(1 / metrics.tpot)
    assert metrics.kv_cache_bytes == 2 * 2 * 256 * 2 * 16 * 4
    text_only = vlm.generate("Tell me.", max_new_tokens=1).metrics
    assert (text_only.tiles, text_only.tpot) == (0, 0)
    assert not {"vision_encoder", "connector"} & set(text_only.stages)


def test_length_limit(vlm: VLM) -> None:
    result = vlm.generate("Tell me.", max_new_tokens=5)
    assert (len(result.token_ids), result.finish_reason) == (5, "length")


def test_stop_token_ends_the_answer_and_is_not_part_of_it(tiny_bundle: Path) -> None:
    with VLM.load(tiny_bundle) as vlm:
        free = vlm.generate("Tell me.", max_new_tokens=10)
        stop = free.token_ids[4]
        vlm.stop_ids = frozenset([stop])
        result = vlm.generate("Tell me.", max_new_tokens=10)
    assert result.finish_reason == "stop"
    assert result.token_ids == free.token_ids[: free.token_ids.index(stop)]


def test_stop_string(vlm: VLM) -> None:
    free = vlm.generate("Tell me.", max_new_tokens=30)
    stop = free.text[8:10]
    result = vlm.generate("Tell me.", max_new_tokens=30, stop=stop)
    assert result.finish_reason == "stop_string"
    assert result.text == free.text[: free.text.index(stop)]
    assert "".join(c.text for c in vlm.stream("Tell me.", max_new_tokens=30, stop=[stop])) == result.text


def test_seed_decides_sampling(vlm: VLM) -> None:
    def sample(seed: int) -> tuple[int, ...]:
        return vlm.generate("Tell me.", max_new_tokens=20, temperature=1.5, seed=seed).token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_repetition_penalty_reaches_the_sampler(vlm: VLM) -> None:
    ids = vlm.generate("Tell me.", max_new_tokens=40, presence_penalty=1e6).token_ids
    assert len(set(ids)) == len(ids)


def test_messages_and_raw_prompts(vlm: VLM) -> None:
    question = vlm.generate("Tell me.", IMAGE, max_new_tokens=8)
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "Tell me."}]
    messages = vlm.generate([{"role": "user", "content": content}], max_new_tokens=8)
    text = vlm.processor.process("Tell me.", IMAGE).text
    raw = vlm.generate(text, IMAGE, raw=True, max_new_tokens=8)
    assert question.token_ids == messages.token_ids == raw.token_ids
    with pytest.raises(PromptError, match="raw=True"):
        vlm.generate([{"role": "user", "content": "x"}], raw=True)


def test_prompt_over_the_context(vlm: VLM, tiny_bundle: Path) -> None:
    with pytest.raises(ContextError, match=r"the context holds 1024: \d+ too many") as caught:
        vlm.generate("x" * 2000)
    assert "shorter prompt" in caught.value.fix
    with VLM.load(tiny_bundle, max_context=60) as small:
        with pytest.raises(ContextError) as caught:
            small.generate("Tell me.", IMAGE)
        tokens = small.count_tokens("Tell me.", [IMAGE.shape[:2]])
        assert f"{tokens} tokens (80 of them for images)" in str(caught.value)
        assert f"{tokens + 1 - 60} too many" in str(caught.value)
        assert "--max-context" in caught.value.fix


def test_answer_ends_with_the_context(tiny_bundle: Path) -> None:
    with VLM.load(tiny_bundle, max_context=40) as vlm:
        result = vlm.generate("Tell me.", max_new_tokens=1000)
        assert result.finish_reason == "length"
        assert vlm.count_tokens("Tell me.") + len(result.token_ids) == 40


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_k", -2), ("min_p", 2.0), ("stop", [""])],
)
def test_options_out_of_range(vlm: VLM, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        vlm.stream("Tell me.", **{option: value})  # type: ignore[arg-type]


def test_errors_come_before_the_first_piece_is_asked_for(vlm: VLM) -> None:
    with pytest.raises(PromptError):
        vlm.stream("An <image> of mine.", raw=True)


def test_second_call_gives_up_the_first(vlm: VLM) -> None:
    first = vlm.stream("Tell me.", max_new_tokens=20)
    next(first)
    assert vlm.generate("Another.", max_new_tokens=4).token_ids
    with pytest.raises(MllmEdgeError, match="another call began"):
        list(first)


def test_abandoned_stream_does_no_harm(vlm: VLM) -> None:
    expected = vlm.generate("Tell me.", IMAGE, max_new_tokens=8).token_ids
    stream = vlm.stream("Other.", max_new_tokens=20)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert vlm.generate("Tell me.", IMAGE, max_new_tokens=8).token_ids == expected


def test_answers_do_not_depend_on_what_was_asked_before(vlm: VLM) -> None:
    short = vlm.generate("Hi.", max_new_tokens=12).token_ids
    vlm.generate("A much longer question than before. " * 8, IMAGE, max_new_tokens=30)
    assert vlm.generate("Hi.", max_new_tokens=12).token_ids == short


def test_closed_model_gives_up_its_answer(tiny_bundle: Path) -> None:
    vlm = VLM.load(tiny_bundle)
    stream = vlm.stream("Tell me.", max_new_tokens=20)
    next(stream)
    vlm.close()
    with pytest.raises(MllmEdgeError, match="the model was closed"):
        next(stream)


def test_wrong_backend_and_context(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        VLM.load(tiny_bundle, backend="gpu")
    with pytest.raises(ValueError, match="max_context"):
        VLM.load(tiny_bundle, max_context=0)


def test_threads_are_passed_on(tiny_bundle: Path) -> None:
    with VLM.load(tiny_bundle, threads=1) as vlm:
        assert vlm.backend.threads == 1  # type: ignore[attr-defined]
        assert vlm.generate("Hi.", max_new_tokens=2).token_ids


@pytest.mark.parametrize("blanks", [" ", "\n", "  ", "\n\n ", ""])
def test_text_begins_with_no_blank(vlm: VLM, blanks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"{blanks}3  red\n shapes "
    ids = iter([*(vlm.tokenizer.encode(c)[-1] for c in text), 0])
    monkeypatch.setattr("mllm_edge.runtime.decode.sampling.Sampler.sample", lambda self, logits: next(ids))
    chunks = list(vlm.stream("Hi", max_new_tokens=len(text)))
    result = chunks[-1].result
    assert result is not None
    assert result.text == "".join(chunk.text for chunk in chunks) == "3  red\n shapes "
    assert vlm.tokenizer.decode(result.token_ids) == text
    ids = iter([vlm.tokenizer.encode(c)[-1] for c in text])
    assert vlm.generate("Hi", raw=True, max_new_tokens=len(text)).text == text


def test_only_blanks_are_an_empty_text(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = iter(vlm.tokenizer.encode(" \n "))
    monkeypatch.setattr("mllm_edge.runtime.decode.sampling.Sampler.sample", lambda self, logits: next(ids))
    assert vlm.generate("Hi", max_new_tokens=3).text == ""


def test_a_model_says_what_it_is(tiny_bundle: Path) -> None:
    with VLM.load(tiny_bundle, threads=1, max_context=100) as vlm:
        assert repr(vlm) == f"VLM('{tiny_bundle}', idefics3, cpu (1 threads), context 100)"
    assert repr(vlm).endswith("context 100, closed)")


def test_the_options_as_a_type_are_those_a_call_is_made_of() -> None:
    import inspect

    from mllm_edge.runtime.asking import Asking
    from mllm_edge.runtime.options import CallOptions

    taken = {n: p for n, p in inspect.signature(Asking.call).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert list(taken) == list(CallOptions.__annotations__)
    source = inspect.getsource(CallOptions)
    for name, parameter in taken.items():
        assert f"    {name}: {parameter.annotation}\n" in source


def test_loads_and_answers_are_logged(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "mllm_edge"), VLM.load(tiny_bundle) as vlm:
        vlm.generate("Hi", max_new_tokens=3)
    assert [record.levelname for record in caplog.records] == ["INFO", "DEBUG"]
    assert "opened in" in caplog.text
    assert "3 new, ended by length: TTFT" in caplog.text


def test_what_an_engine_writes_by_itself_is_not_shown(tiny_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with VLM.load(tiny_bundle) as vlm, pytest.raises(BackendError):
        vlm.component("connector", {"vision_hidden": np.zeros((1, 1, 1), np.float32)})
    assert capfd.readouterr().err == ""
