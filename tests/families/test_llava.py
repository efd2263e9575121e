"""LLaVA: parity over a table of tiny configurations, and the prompt of a checkpoint without a template."""

from pathlib import Path

import pytest

from mllm_edge import VLM
from mllm_edge.export.pipeline import export
from tests.families.parity import Exported, export_tiny, make_image
from tests.tiny import save_tiny_llava


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("bare"), save_tiny_llava, template=None)


def test_prompt_of_a_checkpoint_without_a_template(bare: Exported) -> None:
    with VLM.load(bare.bundle) as vlm:
        asked = vlm.processor.process("What is it?", [make_image(40, 50, 0)])
        assert asked.text == "USER: <image>\nWhat is it? ASSISTANT:"
        assert vlm.processor.process("Hello.").text == "USER: Hello. ASSISTANT:"
        messages = [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
            {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        ]
        text = vlm.processor.process(messages, [make_image(40, 50, 0)]).text
        assert text == "Be brief. USER: <image>\nWhat? ASSISTANT: A cup. USER: Sure? ASSISTANT:"


def test_one_placeholder_per_feature(bare: Exported) -> None:
    with VLM.load(bare.bundle) as vlm:
        image = make_image(30, 90, 0)
        assert len(vlm.processor.process("Hi", [image, image]).image_positions) == 2 * (48 // 8) ** 2
        assert vlm.count_tokens("Hi", [(30, 90)]) == len(vlm.processor.process("Hi", [image]).token_ids)


def test_layers_behind_the_last_tap_are_left_out(tmp_path: Path) -> None:
    sizes = {}
    for layer in (1, -1):
        save_tiny_llava(tmp_path / str(layer), config={"vision_feature_layer": layer})
        report = export(str(tmp_path / str(layer)), tmp_path / "out", dry_run=True)
        sizes[layer] = report.components["vision_encoder"]
    assert sizes[1] < 0.6 * sizes[-1]  # one layer of three, and what the layers share
