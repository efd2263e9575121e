"""Videos as frames: LLaVA-OneVision beside transformers, whose own video processor needs torchvision."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm_edge import VLM, Video
from mllm_edge.bundle import Bundle
from mllm_edge.errors import ConfigError, ImageError, MllmEdgeError, PromptError
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.family import family_for
from mllm_edge.export.pipeline import export
from tests.tiny_onevision import save_tiny_onevision

VIDEO, OTHER = "<global-img>", "<fake_token_around_image>"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd_side": {
        "vision": {"image_size": 56},
        "config": {"image_grid_pinpoints": [[56, 56], [112, 56]]},
        "video_settings": {"resample": 2, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
    },
}
# What is shown: a number of frames, or the size of an image.
CASES: dict[str, list[int | tuple[int, int]]] = {
    "one_frame": [1],
    "several_frames": [5],
    "two_videos": [2, 3],
    "video_before_image": [3, (70, 40)],
    "images_and_videos": [(30, 50), 2, (50, 30), 1],
}


@pytest.fixture(scope="module", params=SETTINGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """The source model, its folder and its bundle."""
    folder, settings = tmp_path_factory.mktemp(request.param), {"video_settings": {}, **SETTINGS[request.param]}
    model = save_tiny_onevision(folder / "model", **settings)
    export(str(folder / "model"), folder / "bundle", recipe_name="fp32")
    return model, folder / "model", folder / "bundle"


def shown(case: list[int | tuple[int, int]]) -> list[Any]:
    """Videos whose frames are of unequal sizes, and images."""
    random = np.random.default_rng(len(case))

    def picture(height: int, width: int) -> np.ndarray:
        return random.integers(0, 256, (height, width, 3), dtype=np.uint8)

    return [
        Video([picture(40 + 7 * i, 90 - 11 * i) for i in range(item)]) if isinstance(item, int) else picture(*item)
        for item in case
    ]


def reference_inputs(model: Any, folder: Path, question: str, given: list[Any]) -> dict[str, Any]:
    """transformers' inputs, those of videos by its image processor for frames that are stretched alike."""
    source = open_source(str(folder))
    processor = family_for(source).load_processor(source)
    images = [item for item in given if not isinstance(item, Video)]
    entries = [{"type": "video" if isinstance(item, Video) else "image"} for item in given]
    message = {"role": "user", "content": [*entries, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    # The processor wants the videos of a text that has their placeholders: another token goes through it.
    text = text.replace(VIDEO, OTHER)
    inputs = dict(processor(text=[text], images=[images] if images else None, return_tensors="pt"))
    settings = dict(source.json("video_preprocessor_config.json"))
    frames = CLIPImageProcessorPil(**{"do_center_crop": False, "resample": 3, **settings})
    pixels = [frames(list(item.frames), return_tensors="pt").pixel_values for item in given if isinstance(item, Video)]
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    counts = iter([len(video) * ((side + 1) // 2) ** 2 + 1 for video in pixels])
    ids = inputs["input_ids"][0]
    ids[ids == processor.tokenizer.convert_tokens_to_ids(OTHER)] = model.config.video_token_id
    repeats = [next(counts) if token == model.config.video_token_id else 1 for token in ids.tolist()]
    ids = torch.repeat_interleave(ids, torch.tensor(repeats))[None]
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "videos": pixels}


def reference_logits(model: Any, inputs: dict[str, Any], answer: np.ndarray) -> np.ndarray:
    """Logits [n, V] of each of the tokens of `answer`. The videos' features are placed here: transformers takes one
    number of frames for all."""
    ids = torch.cat([inputs["input_ids"], torch.tensor(answer[None, :-1])], dim=1)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        found = [model.model.get_video_features(video[None]).pooler_output.flatten(0, 1) for video in inputs["videos"]]
        embeds[ids == model.config.video_token_id] = torch.cat(found)
        if "pixel_values" in inputs:
            given = {key: inputs[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
            images = model.model.get_image_features(**given, return_dict=True).pooler_output
            embeds[ids == model.config.image_token_id] = torch.cat(list(images))
        logits = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
    return logits[0, -len(answer) :].numpy()


@pytest.mark.parametrize("case", CASES)
def test_whole_path_agrees(pair: tuple[Any, Path, Path], case: str) -> None:
    (model, folder, bundle), given, question = pair, shown(CASES[case]), "What happens?"
    inputs = reference_inputs(model, folder, question, given)
    with VLM.load(bundle, backend="cpu") as vlm:
        prompt = vlm.processor.process(question, given)
        np.testing.assert_array_equal(prompt.token_ids, inputs["input_ids"][0].numpy())
        encoded = vlm.encode(prompt)
        (answer,) = vlm.greedy([encoded], 12, stop_ids=())
        expected = reference_logits(model, inputs, answer)
        np.testing.assert_array_equal(answer, expected.argmax(axis=1))
        np.testing.assert_allclose(vlm.steps(encoded, answer), expected, atol=1e-4 * np.ptp(expected))
        sizes = [(len(i.frames), *i.frames[0].shape[:2]) if isinstance(i, Video) else i.shape[:2] for i in given]
        assert vlm.count_tokens(question, sizes) == len(prompt.token_ids)


def test_entries_of_messages_hold_frames_or_take_those_given(pair: tuple[Any, Path, Path]) -> None:
    first, image, second = shown([2, (30, 50), 3])
    text = {"type": "text", "text": "Compare."}
    with VLM.load(pair[2], backend="cpu") as vlm:
        whole = vlm.processor.process("Compare.", [first, image, second])
        entries = [{"type": "video", "video": first.frames}, {"type": "image"}, {"type": "video"}, text]
        parted = vlm.processor.process([{"role": "user", "content": entries}], [second, image])
        raw = vlm.processor.process_text(whole.text, [image, first, second])
    for other in (parted, raw):
        np.testing.assert_array_equal(other.token_ids, whole.token_ids)
        np.testing.assert_array_equal(other.pixel_values, whole.pixel_values)
    assert whole.text.count("<image>") == 1
    assert whole.text.count(VIDEO) == 2


@pytest.mark.parametrize(
    ("prompt", "given", "error", "word"),
    [
        ("What?", lambda: [Video([])], ImageError, "without frames"),
        ("What?", lambda: [Video([np.zeros((4, 4, 3), np.uint8), b"none"])], ImageError, "frame 2 of 2"),
        ([{"role": "user", "content": [{"type": "video"}]}], lambda: [np.zeros((4, 4, 3), np.uint8)], PromptError,
         "0 image entries without an image, and 1 images"),
        ([{"role": "user", "content": [{"type": "image"}]}], lambda: [Video(np.zeros((2, 4, 4, 3), np.uint8))],
         PromptError, "1 image entries without an image, and 0 images"),
    ],
)  # fmt: skip
def test_bad_input_is_named(pair: tuple[Any, Path, Path], prompt: Any, given: Any, error: Any, word: str) -> None:
    with VLM.load(pair[2], backend="cpu") as vlm, pytest.raises(error, match=word):
        vlm.processor.process(prompt, given())


def test_without_settings_of_a_video_processor_there_are_no_videos(tmp_path: Path) -> None:
    save_tiny_onevision(tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "bundle", recipe_name="fp32", verify_mode="off")
    image = Bundle.load(tmp_path / "bundle").manifest.model.image
    assert image is not None
    assert image.video is None
    with VLM.load(tmp_path / "bundle", backend="cpu") as vlm:
        with pytest.raises(PromptError, match="this bundle takes no videos, and got 1"):
            vlm.generate("What?", Video(np.zeros((2, 9, 9, 3), np.uint8)))
        # A text that spells the placeholder shows nothing.
        assert VIDEO in vlm.tokenizer.decode(vlm.processor.process(f"What is {VIDEO}?").token_ids.tolist())


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"size": {"height": 40, "width": 40}}, "size is {'height': 40"),
        ({"do_rescale": False}, "do_rescale"),
        ({"do_resize": False}, "do_resize"),
        ({"resample": 17}, "resample"),
        ({"size": "large"}, "size is large"),
        ({"video_processor_type": "Qwen2VLVideoProcessor"}, "Qwen2VLVideoProcessor"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict[str, Any], word: str) -> None:
    save_tiny_onevision(tmp_path / "model", video_settings=settings)
    with pytest.raises(ConfigError, match=word) as caught:
        export(str(tmp_path / "model"), tmp_path / "bundle", recipe_name="fp32")
    assert isinstance(caught.value, MllmEdgeError)
    assert caught.value.fix
    assert not (tmp_path / "bundle").exists()
