"""PaliGemma: the form of a prompt is what transformers' own processor gives it; prompts come in one piece."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.backends.tensorrt_engines import Limits
from tests.families.parity import FLOAT32_TARGETS, make_image

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def bundle(floats: Callable[[str], Path]) -> Path:
    return floats("paligemma")


@pytest.mark.parametrize("images", [1, 2])
def test_the_form_of_a_prompt_is_transformers_own(saved: Callable[..., Path], bundle: Path, images: int) -> None:
    folder = saved("paligemma")
    tokenizer, pixels = AutoTokenizer.from_pretrained(folder), SiglipImageProcessorPil.from_pretrained(folder)
    processor, pictures = PaliGemmaProcessor(pixels, tokenizer), [make_image(40, 50, i) for i in range(images)]
    expected = processor(text="<image>" * images + QUESTION, images=[pictures], return_tensors="np")
    with VLM.load(bundle) as vlm:
        found = vlm.processor.process(QUESTION, pictures)
        assert found.text == "<image>" * images + f"<bos>{QUESTION}\n"
        assert found.token_ids.tolist() == expected["input_ids"][0].tolist()
        np.testing.assert_allclose(found.pixel_values, expected["pixel_values"], atol=1e-6)
        assert vlm.encode(found).spans.tolist() == [1] * len(found.token_ids)
        text = vlm.processor.process("Hello.")
        assert text.text == "<bos>Hello.\n"
        assert vlm.encode(text).spans.tolist() == [1] * len(text.token_ids)


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
def test_a_long_prompt_is_not_cut(bundle: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with VLM(Bundle.load(bundle), OnnxRuntimeCpu(target=target)) as vlm:
        image = make_image(40, 50, 0)
        expected = vlm.generate(QUESTION, image, max_new_tokens=8, ignore_eos=True).token_ids
        monkeypatch.setattr("mllm_edge.runtime.decode.generate.PREFILL_CHUNK", 7)
        assert vlm.generate(QUESTION, image, max_new_tokens=8, ignore_eos=True).token_ids == expected


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-10.3"])
def test_engines_take_prompts_in_one_piece(bundle: Path, target: str) -> None:
    variant, limits = Bundle.load(bundle).variant("decoder", target), Limits(5000)
    assert limits.ranges(variant)["sequence"] == (1, 256, 5000)
    assert limits.ranges(variant, decode=True)["sequence"][2] < 100
