"""Prompts of unequal length, with and without images, as one batch: each gets the logits that it gets alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.errors import OptionError
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.vlm import VLM
from tests.families.parity import FLOAT32_TARGETS
from tests.families.row import families_of, rows

STEPS = 4


@pytest.fixture(scope="module", params=families_of(""))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def bundle(family: str, floats: Callable[[str], Path]) -> Bundle:
    return Bundle.load(floats(family))


def prompts(vlm: VLM) -> list[Encoded]:
    """Three prompts: an odd image, text alone, two images of unequal size, or as many as the model takes."""
    assert vlm.spec.image is not None
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((50, 71), (64, 33), (40, 96))]
    two = images[1:][: vlm.spec.image.most_images]
    asked: list[tuple[str, list[Any]]] = [("What?", images[:1]), ("Hello there.", []), ("Same or not?", two)]
    return [vlm.encode(vlm.processor.process(text, shown)) for text, shown in asked]


def alone(vlm: VLM, prompt: Encoded) -> tuple[np.ndarray, list[int]]:
    """Logits [1 + STEPS, V] along the greedy tokens of one prompt, and these tokens."""
    vlm.decoder.start(prompt, STEPS)
    rows, tokens = [vlm.decoder.forward(prompt).copy()], []
    for _ in range(STEPS):
        tokens.append(int(rows[-1].argmax()))
        rows.append(vlm.decoder.forward(vlm.embed(np.array(tokens[-1:]))).copy())
    return np.stack(rows), tokens


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
def test_ragged_batch(bundle: Bundle, target: str) -> None:
    with VLM(bundle, OnnxRuntimeCpu(target=target)) as vlm:
        asked = prompts(vlm)
        lengths = [len(prompt.prompt) for prompt in asked]
        assert len(set(lengths)) == 3
        expected = [alone(vlm, prompt) for prompt in asked]
        vlm.decoder.reset(max(lengths) + STEPS, batch=3)
        rows = [vlm.decoder.forward_batch(asked).copy()]
        for step in range(STEPS):
            tokens = [vlm.embed(np.array([chosen[step]])) for _, chosen in expected]
            rows.append(vlm.decoder.forward_batch(tokens).copy())
    for i, (logits, _) in enumerate(expected):
        batched = np.stack([row[i] for row in rows])
        assert np.abs(batched - logits).max() <= 1e-4 * np.ptp(logits)


def test_guesses_change_no_answer(family: str, bundle: Bundle) -> None:
    """Where tokens can be forgotten again; else guessing is refused."""
    image, options = np.full((50, 71, 3), 99, np.uint8), {"max_new_tokens": 24, "ignore_eos": True}
    with VLM(bundle, OnnxRuntimeCpu()) as vlm:
        assert vlm.decoder.rewindable == rows()[family].rewindable
        if not vlm.decoder.rewindable:
            with pytest.raises(OptionError, match="speculation: this model has layers with a recurrent state"):
                vlm.generate("abcabc", image, speculation=3)
            return
        # A penalty below 0 rewards what was said, so that guesses come true.
        expected = vlm.generate("abcabc", image, frequency_penalty=-1.0, **options)
        found = vlm.generate("abcabc", image, frequency_penalty=-1.0, speculation=3, **options)
        assert found.token_ids == expected.token_ids
        assert found.metrics.accepted > 0
