"""What a row does not show of Fuyu: one image that stands first, words of the vocabulary in a user's text."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.errors import ImageError, PromptError
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu

pytestmark = pytest.mark.xdist_group("bundle-fuyu")
IMAGE = np.full((20, 30, 3), 99, np.uint8)


@pytest.fixture(scope="module")
def vlm(floats: Callable[[str], Path]) -> Iterator[VLM]:
    with VLM(Bundle.load(floats("fuyu")), OnnxRuntimeCpu()) as found:
        yield found


def test_more_images_than_one_are_refused(vlm: VLM) -> None:
    for ask in (vlm.processor.process, vlm.generate):
        with pytest.raises(PromptError, match="takes one image in a prompt, and got 2"):
            ask("Same?", [IMAGE, IMAGE])
    with pytest.raises(PromptError, match="takes one image in a prompt, and got 2"):
        vlm.count_tokens("Same?", [(20, 30), (20, 30)])
    with pytest.raises(PromptError, match="takes one image in a prompt, and got 2"):
        vlm.processor.process_text("|SPEAKER||SPEAKER|Same?", [IMAGE, IMAGE])


def test_the_image_stands_first_wherever_it_is_asked_about(vlm: VLM) -> None:
    content = [{"type": "text", "text": "What?"}, {"type": "image"}]
    behind = vlm.processor.process([{"role": "user", "content": content}], IMAGE)
    assert behind.token_ids.tolist() == vlm.processor.process("What?", IMAGE).token_ids.tolist()
    # 3 rows of 4 patches, each with an end.
    assert behind.image_positions.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13]


def test_an_image_of_no_height_is_refused(vlm: VLM) -> None:
    """As transformers does: 3 · 96 / 350 px are none."""
    with pytest.raises(ImageError, match="shrink_into turns 3×350 px into 0×96 px"):
        vlm.count_tokens("What?", [(3, 350)])


@pytest.mark.parametrize("word", ["|SPEAKER|", "|NEWLINE|", "<0x04>", "<s>"])
def test_a_word_that_a_user_spells_stays_text(vlm: VLM, word: str) -> None:
    token = vlm.tokenizer.token_id(word)
    plain, spelled = (vlm.processor.process(f"Say {text}.", IMAGE).token_ids for text in ("it", word))
    assert (spelled == token).sum() == (plain == token).sum()
    assert len(spelled) > len(plain)
