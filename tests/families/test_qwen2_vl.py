"""Qwen2-VL: parity over a table of tiny configurations, conversations, the prompt of a checkpoint without a
template, and images at the limits."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.cli import main
from mllm_edge.errors import ConfigError, ImageError, OptionError, PromptError
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.compare import compare_with_source
from mllm_edge.export.families.qwen2_vl import FAMILY
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.budget import image_cost
from mllm_edge.runtime.decode.positions import rope_tables
from tests.export.damage import assert_fails, edit_json
from tests.export.test_adapters import train
from tests.families.parity import FLOAT32_TARGETS, Exported, check_messages, export_tiny, make_image
from tests.tiny import QWEN_TEMPLATE, Names, save_tiny_qwen2_vl


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("plain"), save_tiny_qwen2_vl)


def says(role: str, *parts: str | None) -> dict[str, Any]:
    """A message; None is an image."""
    return {"role": role, "content": [{"type": "text", "text": p} if p else {"type": "image"} for p in parts]}


CONVERSATIONS = {
    "images_in_different_turns": (
        [
            says("system", "Be brief."),
            says("user", "What is this?", None),
            says("assistant", "A cup."),
            says("user", None, "And this, beside", None, "?"),
        ],
        [(40, 90), (131, 17), (64, 64)],
    ),
    "image_after_a_long_turn": (
        [says("user", "x" * 150), says("assistant", "y" * 90), says("user", None)],
        [(30, 200)],
    ),
    "images_side_by_side": ([says("user", None, None, None, None)], [(16, 16), (90, 20), (20, 90), (200, 201)]),
    "text_after_all": ([says("user", None, "z" * 200)], [(61, 77)]),
    "no_image": ([says("user", "Hello."), says("assistant", "Hello."), says("user", "Well?")], []),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(plain: Exported, name: str) -> None:
    messages, sizes = CONVERSATIONS[name]
    check_messages(plain, messages, sizes)


def test_a_prompt_fed_in_pieces_gives_the_same_answer(plain: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [make_image(100, 150, 0), make_image(70, 30, 1)]
    with VLM.load(plain.bundle) as vlm:
        whole = vlm.generate("Compare.", images, max_new_tokens=16)
        monkeypatch.setattr("mllm_edge.runtime.decode.generate.PREFILL_CHUNK", 7)  # cuts images in the middle
        assert vlm.generate("Compare.", images, max_new_tokens=16).token_ids == whole.token_ids


def test_text_alone_is_turned_as_by_a_plain_rope(plain: Exported) -> None:
    with VLM.load(plain.bundle) as vlm:
        rope = vlm.spec.positions.ropes[0]
        alone, asked = vlm.generate("Hello.", max_new_tokens=8), vlm.processor.process("Hello.")
        assert asked.positions is None
        # After an image the cache's rows are others; a prompt of text finds them as they were.
        vlm.generate("Hello.", make_image(90, 60, 0), max_new_tokens=8)
        assert vlm.generate("Hello.", max_new_tokens=8).token_ids == alone.token_ids
        places = np.arange(50)
        np.testing.assert_array_equal(rope_tables(rope, places), rope_tables(rope, np.stack([places] * 3)))


def test_image_markers_in_a_text_stay_text(plain: Exported) -> None:
    with VLM.load(plain.bundle) as vlm:
        image = make_image(40, 40, 0)
        plain = vlm.processor.process("What is this?", image)
        for marker in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>"):
            prompt = vlm.processor.process(f"What is {marker}?", image)
            assert f"What is {marker}?" in prompt.text
            assert len(prompt.image_positions) == len(plain.image_positions)
            number = vlm.tokenizer.token_id(marker)
            assert (prompt.token_ids == number).sum() == (plain.token_ids == number).sum()
        assert vlm.generate("What is <|image_pad|>?", image, max_new_tokens=2).token_ids


def test_raw_prompts_take_one_placeholder_per_image(plain: Exported) -> None:
    with VLM.load(plain.bundle) as vlm:
        images = [make_image(40, 40, 0), make_image(20, 60, 1)]
        prompt = vlm.processor.process_text("<|image_pad|><|image_pad|>?", images)  # nothing between them
        counts = [layout.rows * layout.cols for layout in prompt.layouts]
        assert len(prompt.image_positions) == sum(counts)
        rows, cols = prompt.layouts[0].rows, prompt.layouts[0].cols
        second = prompt.positions[:, counts[0]]
        np.testing.assert_array_equal(second, [max(rows, cols)] * 3)


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
def test_compare_with_the_checkpoint(plain: Exported, target: str) -> None:
    found = compare_with_source(plain.checkpoint, plain.bundle, target=target)
    assert found.greedy_agreement == 1
    assert set(found.errors) == {"vision_encoder", "connector", "prefill_logits", "decode_logits"}
    assert max(found.errors.values()) <= 1e-3


def test_cost_of_an_image_is_that_of_a_call(plain: Exported) -> None:
    image = make_image(50, 130, 0)
    cost = image_cost(Bundle.load(plain.bundle), image)
    with VLM.load(plain.bundle) as vlm:
        metrics = vlm.generate("", image, max_new_tokens=1).metrics
    assert (cost.tiles, cost.image_tokens, cost.prompt_tokens) == (1, metrics.image_tokens, metrics.prompt_tokens)
    assert (cost.tiles, cost.grid) == (metrics.tiles, (3, 8))
    result = CliRunner().invoke(main, ["inspect", str(plain.bundle), "--image-size", "50x130"])
    assert "an image of 50 x 130 px: 3 x 8 cells, 24 image tokens" in result.output


def test_prompt_of_a_checkpoint_without_a_template(tmp_path: Path) -> None:
    bare = export_tiny(tmp_path, save_tiny_qwen2_vl, template=None)
    with VLM.load(bare.bundle) as vlm:
        text = vlm.processor.process("What is it?", [make_image(40, 50, 0)]).text
        assert text == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
        )
    for messages, sizes in CONVERSATIONS.values():
        check_messages(bare, messages, sizes)


def test_own_template_renders_as_the_checkpoints(plain: Exported, tmp_path: Path) -> None:
    from mllm_edge.export.families.qwen_images import TEMPLATE
    from mllm_edge.runtime.prompt.tokenizer import ChatTemplate

    own, stored = (ChatTemplate(template, {}) for template in (TEMPLATE, QWEN_TEMPLATE))
    for messages, _ in CONVERSATIONS.values():
        for prompt in (messages, [{"role": "user", "content": "Hello."}]):
            for opens in (True, False):
                assert own.render(prompt, opens) == stored.render(prompt, opens)


@pytest.mark.parametrize("names", ["saved", "hub", "state_dict"])
def test_adapters_are_merged_on_the_way(tmp_path: Path, names: Names) -> None:
    model = save_tiny_qwen2_vl(tmp_path / "checkpoint", names=names)
    adapter = train(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj", "qkv", "fc1"], r=4)
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name="fp32", adapters=[adapter])
    assert report.parity["greedy_agreement"] == 1.0
    export(str(tmp_path / "checkpoint"), tmp_path / "plain", recipe_name="fp32", verify_mode="off")
    for graph in ("vision_encoder", "decoder"):
        assert _data(tmp_path / "out", graph) != _data(tmp_path / "plain", graph)


def _data(bundle: Path, graph: str) -> bytes:
    return (bundle / f"{graph}.onnx.data").read_bytes()


def test_image_processor_in_a_file_of_its_own(plain: Exported, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(plain.checkpoint, tmp_path / "checkpoint"))
    path = checkpoint / "processor_config.json"
    settings = json.loads(path.read_text())
    stated = settings.pop("image_processor")
    path.write_text(json.dumps(settings))
    (checkpoint / "preprocessor_config.json").write_text(json.dumps({**stated, "merge_size": 3}))
    assert_fails(checkpoint, ConfigError, "merge_size is 3, the vision tower's 2", "preprocessor_config.json")


# ---------------------------------------------------------------- images at the limits
def test_aspect_ratio_beyond_the_limit(plain: Exported) -> None:
    with VLM.load(plain.bundle) as vlm:
        assert vlm.count_tokens("Hi", [(1, 200)]) > 0
        for call in (
            lambda: vlm.generate("Hi", make_image(1, 201, 0)),
            lambda: vlm.generate("Hi", [make_image(40, 40, 0), make_image(402, 2, 0)]),
            lambda: vlm.count_tokens("Hi", [(201, 1)]),
        ):
            with pytest.raises(ImageError, match="more than 200 times") as error:
                call()
            assert "aspect ratio" in error.value.fix


def test_what_is_no_image(plain: Exported) -> None:
    with VLM.load(plain.bundle) as vlm:
        with pytest.raises(OptionError, match="height of an image size"):
            vlm.count_tokens("Hi", [(0, 5)])
        with pytest.raises(PromptError, match="video"):
            vlm.generate([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize("least", [1, 4 * 16**2])
def test_images_smaller_than_a_patch_are_what_the_reference_makes_of_them(
    plain: Exported, tmp_path: Path, least: int
) -> None:
    checkpoint = Path(shutil.copytree(plain.checkpoint, tmp_path / "checkpoint"))
    edit_json(checkpoint / "processor_config.json", lambda c: c["image_processor"].update(min_pixels=least))
    export(str(checkpoint), tmp_path / "out", recipe_name="fp32", verify_mode="off")
    reference = FAMILY.load_processor(open_source(str(checkpoint)))
    with VLM.load(tmp_path / "out") as vlm:
        for height, width in ((1, 1), (3, 5), (7, 1), (1, 150), (120, 1)):
            image = make_image(height, width, 0)
            ours = vlm.processor.process("Hi", image)
            expected = reference(text=ours.text, images=[image], return_tensors="np")
            assert ours.token_ids.tolist() == expected["input_ids"][0].tolist()
            assert [(1, 2 * layout.rows, 2 * layout.cols) for layout in ours.layouts] == [
                (*expected["image_grid_thw"][0],)
            ]
            theirs = expected["pixel_values"].reshape(ours.pixel_values.shape)
            np.testing.assert_allclose(ours.pixel_values, theirs, atol=4 / 255)
            assert vlm.generate("Hi", image, max_new_tokens=2, ignore_eos=True).metrics.new_tokens == 2
