"""The answers that recording asks for: several prompts at once get what each gets alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.calibration import collect
from mllm_edge.calibration.collect import Feeds, record
from mllm_edge.calibration.data import Sample
from mllm_edge.errors import DataError
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.vlm import VLM
from mllm_edge.spec import CROSS_KV, DEEPSTACK
from tests.families.row import families_of

MOST = 64


@pytest.fixture(scope="module", params=families_of(""))
def bundle(request: pytest.FixtureRequest, floats: Callable[[str], Path]) -> Path:
    return floats(request.param)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of sequences that went through the decoder together, run by run."""
    found: list[int] = []
    forward_batch = Decoder.forward_batch

    def counted(self: Decoder, tokens: Any) -> np.ndarray:
        found.append(len(tokens))
        return forward_batch(self, tokens)

    monkeypatch.setattr(Decoder, "forward_batch", counted)
    return found


def samples(bundle: Path) -> list[Sample]:
    """Of unequal lengths, some with images, as many as the model takes, some with answers."""
    image = Bundle.load(bundle).manifest.model.image
    assert image is not None
    random = np.random.default_rng(0)
    found = []
    for i in range(19):
        shown = range(i % 3)[: image.most_images]
        images = tuple(random.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8) for _ in shown)
        answer = "a cat" if i % 5 == 1 or i in (12, 13, 14, 17) else None
        found.append(Sample("What? " * (1 + i % 4), images, answer, f"line {i}"))
    return found


def both_ways(vlm: VLM) -> str | None:
    return vlm.spec.image.both_ways if vlm.spec.image is not None else None


def by_itself(vlm: VLM) -> bool:
    """Whether padding would go into a recurrent state, or be seen by a prompt that sees itself in both directions, or
    change the rope of one that is shorter."""
    if any(rope.depends_on_length for rope in vlm.spec.positions.ropes):
        return True
    return not vlm.decoder.rewindable or both_ways(vlm) == "prompt" or vlm.spec.text_encoder is not None


def alone(vlm: VLM, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [S, H] of the prompt, and the model's own answer to it."""
    prompt = vlm.processor.process(sample.prompt, sample.images)
    encoded = vlm.encode(prompt)
    return encoded.embeds, vlm.greedy([encoded], MOST)[0]


def placed(vlm: VLM, embeds: np.ndarray) -> np.ndarray:
    """With their learned positions, where the model has such."""
    positions = vlm.spec.positions
    return embeds + vlm.bundle.array(positions.table)[: len(embeds)] if positions.kind == "learned" else embeds


# Without room for what is kept each goes by itself, whatever the family.
@pytest.mark.parametrize(
    ("bundle", "cache"),
    [
        pytest.param(*one.values, cache, id=f"{one.values[0]}-{cache}", marks=one.marks)
        for cache in (128 << 20, 1)
        for one in families_of("" if cache > 1 else "calibration")
    ],
    indirect=["bundle"],
    scope="module",
)
def test_recorded_answers_are_those_of_each_prompt_alone(
    bundle: Path, tmp_path: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch, cache: int
) -> None:
    monkeypatch.setattr(collect, "_CACHE_BYTES", cache)
    told: list[int] = []
    record(Bundle.load(bundle), OnnxRuntimeCpu(), samples(bundle), tmp_path, told.append)
    assert told == [1] * len(samples(bundle))
    feeds, together = Feeds(tmp_path / "decoder"), set(sizes)
    assert len(feeds) == len(samples(bundle))
    with VLM.load(bundle) as vlm:
        for i, sample in enumerate(samples(bundle)):
            embeds, answer = alone(vlm, sample)
            if sample.answer is not None:
                answer = collect.answer_tokens(vlm, sample)
            found = feeds.read(i, ["inputs_embeds"])["inputs_embeds"][0]
            np.testing.assert_array_equal(found, placed(vlm, np.concatenate([embeds, vlm.embed(answer)])))
        # Images have positions on axes, are looked at, see themselves in both directions, or add to layers' outputs.
        apart = any(rope.sections for rope in vlm.spec.positions.ropes)
        inputs = {tensor.name for tensor in vlm.bundle.variant("decoder", "cpu").inputs}
        apart = apart or any(s.component == CROSS_KV for s in vlm.spec.stages) or f"{DEEPSTACK}0" in inputs
        apart = apart or both_ways(vlm) == "image"
        alone_only = by_itself(vlm)
    # Without an answer are six of the first eight, four of the next, and the last.
    assert together == ({1} if cache == 1 or alone_only else {2, 1} if apart else {6, 4, 1})


def test_one_that_ends_waits_for_the_others(bundle: Path, sizes: list[int]) -> None:
    with VLM.load(bundle) as vlm:
        prompts = [vlm.encode(vlm.processor.process("Why? " * i)) for i in (5, 1, 3)]
        whole = [vlm.greedy([prompt], MOST)[0] for prompt in prompts]
        vlm.stop_ids = frozenset({int(whole[0][3]), int(whole[2][:10][-1])})
        expected = [vlm.greedy([prompt], MOST)[0].tolist() for prompt in prompts]
        assert len({len(answer) for answer in expected}) > 1
        sizes.clear()
        assert [answer.tolist() for answer in vlm.greedy(prompts, MOST)] == expected
        lengths, together = [len(answer) for answer in expected], not by_itself(vlm)
        assert sizes == ([3] * max(lengths) if together else [1] * sum(lengths))


def test_a_prompt_without_room_is_named(bundle: Path, tmp_path: Path) -> None:
    with VLM.load(bundle) as vlm:
        longest = vlm.context_length + 1
    asked = samples(bundle)
    asked[4] = Sample("x" * longest, (), None, "line 4")
    with pytest.raises(DataError, match=r"^line 4: "):
        record(Bundle.load(bundle), OnnxRuntimeCpu(), asked, tmp_path)
