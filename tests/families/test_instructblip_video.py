"""InstructBLIP for video: a video is its frames, each of which becomes as many tokens as an image."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import InstructBlipVideoProcessor

from mllm_edge import VLM, Video
from mllm_edge.errors import PromptError
from tests.families.parity import FLOAT32_TARGETS, Exported, export_tiny, make_image
from tests.tiny_blip import save_tiny_instructblipvideo


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    with export_tiny(tmp_path_factory.mktemp("video"), save_tiny_instructblipvideo) as found:
        yield found


@pytest.fixture(scope="module")
def vlm(exported: Exported) -> VLM:
    return exported.vlm("cpu")


def frames(count: int) -> list[Any]:
    return [make_image(40, 30, i) for i in range(count)]


@pytest.mark.parametrize("text", ["What happens?", ""])
def test_tokens_of_four_frames_are_those_of_transformers_own_processor(exported: Exported, vlm: VLM, text: str) -> None:
    """Which knows four."""
    processor = exported.processor
    processor.video_processor = lambda images, return_tensors: {}
    made = InstructBlipVideoProcessor.__call__(processor, images=frames(4), text=text)
    prompt = vlm.processor.process(text, Video(frames(4)))
    assert prompt.token_ids.tolist() == made["input_ids"][0]
    assert prompt.texts["qformer_input_ids"].tolist() == made["qformer_input_ids"]


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("target", FLOAT32_TARGETS)
def test_features_and_answers_of_a_video(exported: Exported, target: str, count: int) -> None:
    vlm, model = exported.vlm(target), exported.model
    prompt = vlm.processor.process("What happens?", Video(frames(count)))
    assert vlm.count_tokens("What happens?", [(count, 40, 30)]) == len(prompt.token_ids)
    assert prompt.pixel_values is not None
    given = {"pixel_values": torch.from_numpy(prompt.pixel_values)[None]}
    words = torch.from_numpy(prompt.texts["qformer_input_ids"])
    given |= {"qformer_input_ids": words, "qformer_attention_mask": torch.ones_like(words)}
    with torch.no_grad():
        expected = model.get_video_features(**given).pooler_output[0].numpy()
        out = model(input_ids=torch.from_numpy(prompt.token_ids)[None], **given)
    found = vlm.image_features(prompt)
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    logits, reference = vlm.steps(vlm.encode(prompt), np.array([65]))[0], out.logits[0, -1].numpy()
    assert np.abs(logits - reference).max() <= 1e-3 * np.ptp(reference)


def test_frames_are_to_the_model_what_images_are(vlm: VLM) -> None:
    """But for the place of their tokens in a text."""
    as_video = vlm.processor.process("What?", Video(frames(3)))
    as_images = vlm.processor.process("What?", frames(3))
    assert as_video.text == "<video><s>What?"
    assert as_images.text == "<image><image><image><s>What?"
    np.testing.assert_array_equal(as_video.token_ids, as_images.token_ids)
    np.testing.assert_array_equal(as_video.pixel_values, as_images.pixel_values)


def test_images_and_videos_in_the_order_of_a_message(vlm: VLM) -> None:
    content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "Same?"}]
    prompt = vlm.processor.process([{"role": "user", "content": content}], [Video(frames(2)), make_image(9, 80, 5)])
    assert [layout.kind for layout in prompt.layouts] == ["video", "image"]
    assert len(prompt.image_positions) == 3 * 5


@pytest.mark.parametrize("word", ["<image>", "<video>"])
def test_a_text_that_spells_a_placeholder_stays_text(vlm: VLM, word: str) -> None:
    prompt = vlm.processor.process(f"Is {word} a word?", frames(1))
    assert len(prompt.image_positions) == 5
    assert vlm.tokenizer.decode(prompt.token_ids[5:], skip_special_tokens=False) == f"<s> Is {word} a word?"


def test_a_placeholder_without_its_picture(vlm: VLM) -> None:
    with pytest.raises(PromptError, match="1 video placeholders, and 0 videos were given"):
        vlm.processor.process_text("<video><s> What?")
