"""BLIP-2 and InstructBLIP: where transformers itself takes a prompt, ours for any number of images is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2Processor,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.family import family_for
from tests.families.parity import make_image
from tests.tiny_blip import save_tiny_blip_2, save_tiny_instructblip

MODELS: list[tuple[Any, Any, Any, dict[str, str]]] = [
    (save_tiny_blip_2, Blip2ForConditionalGeneration, Blip2Processor, {}),
    (save_tiny_instructblip, InstructBlipForConditionalGeneration, InstructBlipProcessor, {}),
    (save_tiny_instructblip, InstructBlipForConditionalGeneration, InstructBlipProcessor, {"prepends": "first"}),
]


@pytest.mark.parametrize("text", ["a photo of", "Question: What is it? Answer:", ""])
@pytest.mark.parametrize("parts", MODELS, ids=["blip_2", "instructblip", "instructblip_first"])
def test_one_image(tmp_path: Path, parts: tuple[Any, Any, Any, dict[str, str]], text: str) -> None:
    save, architecture, processor_class, settings = parts
    model, image = save(tmp_path / "checkpoint", **settings), make_image(40, 30, 0)
    source = open_source(str(tmp_path / "checkpoint"))
    processor = family_for(source).load_processor(source)
    start = processor.text_start if text else ""
    asked = processor(
        images=[[image]], text=f"<image>{processor.tokenizer.bos_token}{start}{text}", return_tensors="pt"
    )
    expected = processor_class.__call__(processor, images=image, text=text, return_tensors="pt")
    assert set(asked) == set(expected)
    for name, value in expected.items():
        assert torch.equal(asked[name], value)
    with torch.no_grad():
        torch.testing.assert_close(model(**asked).logits, architecture.forward(model, **expected).logits)
