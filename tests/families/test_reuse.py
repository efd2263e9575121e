"""Images that are looked at once, and beginnings of prompts that are run once: answers are those of a fresh prompt."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM, Video
from mllm_edge.bundle import CHAT_TEMPLATE, Bundle
from mllm_edge.errors import ImageError, PromptError
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.prompt.sources import EncodedImage
from mllm_edge.runtime.trace import Trace
from tests.families.row import families_of

SHORT: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=families_of(""))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def vlm(family: str, floats: Callable[[str], Path]) -> Iterator[VLM]:
    with VLM(Bundle.load(floats(family)), OnnxRuntimeCpu()) as vlm:
        yield vlm


def goes_on(vlm: VLM) -> bool:
    """Whether what stands behind a token, or beside an image, changes nothing about it."""
    image = vlm.spec.image
    assert image is not None
    return vlm.spec.text_encoder is None and image.both_ways != "prompt" and image.text is None


def looks(trace: Trace) -> int:
    """Runs of the stages for images."""
    return sum(trace.runs(name) for name in ("vision_encoder", "connector", "cross_kv"))


def test_an_encoded_image_is_the_image(vlm: VLM, tmp_path: Path) -> None:
    frame = picture(50, 71)
    seen = vlm.encode_image(frame)
    vlm.save_image(seen, tmp_path / "image.npz")
    expected = vlm.encode(vlm.processor.process("What?", frame))
    for image in (seen, vlm.load_image(tmp_path / "image.npz")):
        trace = Trace()
        prompt = vlm.processor.process("What?", image)
        found = vlm.encode(prompt, trace)
        np.testing.assert_array_equal(found.embeds, expected.embeds)
        np.testing.assert_array_equal(found.prompt, expected.prompt)
        assert set(found.per_token) == set(expected.per_token)
        for name, rows in expected.per_token.items():
            np.testing.assert_array_equal(found.per_token[name], rows)
        for name, rows in expected.cross.items():
            np.testing.assert_allclose(found.cross[name], rows, atol=1e-5)
        assert vlm.spec.image is not None
        assert (trace.runs("vision_encoder") == 0) == (vlm.spec.image.text is None)


def test_a_plan_of_a_video_is_what_it_takes(vlm: VLM) -> None:
    assert vlm.spec.image is not None
    video = Video([picture(50, 71)] * 3, fps=2)
    if vlm.spec.image.video is None:
        for given in ({"images": video}, {"image_sizes": [(3, 50, 71, 2.0)]}):
            with pytest.raises(PromptError, match="takes no videos, and got 1; its model is"):
                vlm.plan("What?", **given)
        return
    expected = vlm.processor.process("What?", video)
    for plan in (vlm.plan("What?", video), vlm.plan("What?", image_sizes=[(3, 50, 71, 2.0)])):
        assert plan.prompt_tokens == len(expected.token_ids)
        assert plan.image_tokens == len(expected.image_positions)
        assert plan.images[0].tiles == expected.layouts[0].tiles


def test_a_second_question_runs_what_is_new(vlm: VLM) -> None:
    frame = picture(50, 71)
    seen = vlm.encode_image(frame)
    vlm.generate("What is this?", seen, **SHORT)
    for question in ("What is that?", "What is this? Tell me."):
        trace = Trace()
        found, expected = vlm.generate(question, seen, trace=trace, **SHORT), vlm.generate(question, frame, **SHORT)
        assert found.token_ids == expected.token_ids
        again = vlm.generate(question, seen, reuse=True, **SHORT)
        assert again.token_ids == expected.token_ids
    if goes_on(vlm):
        trace = Trace()
        last = vlm.generate(question, seen, trace=trace, **SHORT)
        assert last.token_ids == expected.token_ids
        assert last.metrics.reused >= last.metrics.image_tokens
        assert looks(trace) == 0
    elif vlm.spec.image is not None and vlm.spec.image.text is None:
        assert again.metrics.reused == 0


def test_a_conversation_says_what_fresh_prompts_say(vlm: VLM) -> None:
    if CHAT_TEMPLATE not in vlm.bundle.manifest.files:
        with pytest.raises(PromptError, match="no chat template"):
            vlm.chat()
        return
    chat, reused = vlm.chat(), []
    chat.attach(picture(40, 60))
    for question in ("What is this?", "And why?", "Go on.")[: 1 if vlm.spec.text_encoder is not None else None]:
        pieces = list(chat.ask(question, **SHORT))
        result = pieces[-1].result
        assert result is not None
        reused.append(result.metrics.reused)
        messages = [*chat.messages()[:-1]]
        fresh = vlm.generate(messages, **SHORT)
        assert result.token_ids == fresh.token_ids
        vlm.generate(messages, reuse=True, **SHORT)  # the decoder holds the conversation again
    if goes_on(vlm):
        assert reused[1] > 0
        assert reused[2] > reused[1]


def test_encoded_images_of_others_are_refused(vlm: VLM, tmp_path: Path) -> None:
    seen = vlm.encode_image(picture(30, 40))
    other = EncodedImage(seen.source, seen.shown, "another")
    vlm.save_image(other, tmp_path / "other.npz")
    with pytest.raises(ImageError, match="another bundle"):
        vlm.generate("What?", other)
    with pytest.raises(ImageError, match="another bundle"):
        vlm.load_image(tmp_path / "other.npz")
