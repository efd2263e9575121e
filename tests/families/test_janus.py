"""What is special about Janus: a system prompt that its processor puts before every prompt."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, JanusProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from mllm_edge import VLM
from mllm_edge.export.pipeline import export
from tests.families.parity import make_image
from tests.tiny_janus import save_tiny_janus


def _processor(folder: Path, **settings: Any) -> JanusProcessor:
    """transformers' own, as it is."""
    parts = JanusImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    stated = {"num_image_tokens": 36, "chat_template": (folder / "chat_template.jinja").read_text(), **settings}
    return JanusProcessor(*parts, **stated)


@pytest.mark.parametrize("stated", [True, False])
def test_the_system_prompt_stands_before_a_prompt_where_the_files_ask_for_it(tmp_path: Path, stated: bool) -> None:
    save_tiny_janus(tmp_path / "checkpoint", system_prompt=stated)
    export(str(tmp_path / "checkpoint"), tmp_path / "bundle", recipe_name="fp32", verify_mode="off")
    processor = _processor(tmp_path / "checkpoint", use_default_system_prompt=stated)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    image, rendered = make_image(53, 211, 0), processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = processor(text=rendered, images=[image], return_tensors="np")["input_ids"][0].tolist()
    with VLM.load(tmp_path / "bundle") as vlm:
        assert vlm.processor.process(messages, [image]).token_ids.tolist() == expected
    assert ("You are a helpful language" in processor.tokenizer.decode(expected)) == stated
