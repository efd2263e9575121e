"""Videos as frames: LLaVA-NeXT-Video and Video-LLaVA beside transformers, whose video processors need torchvision."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm_edge import VLM, Video
from mllm_edge.bundle import Bundle
from mllm_edge.calibration.collect import Feeds, record
from mllm_edge.calibration.data import Sample
from mllm_edge.errors import BundleError, ConfigError, PromptError
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.family import family_for, open_weights, understand
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.spec import ResizeShortestEdge
from tests.families.parity import FLOAT32_TARGETS
from tests.tiny_llava_line import VIDEO_TOKEN, save_tiny_llava_next_video, save_tiny_video_llava

OTHER = "<fake_token_around_image>"
ODD = {"video_settings": {"resample": 2, "size": {"shortest_edge": 57}, "image_std": [0.2, 0.3, 0.4]}}
MODELS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llava_next_video": (save_tiny_llava_next_video, {}),
    "llava_next_video_odd": (save_tiny_llava_next_video, {**ODD, "config": {"vision_feature_layer": [-2, 1]}}),
    "video_llava": (save_tiny_video_llava, {}),
    "video_llava_odd": (save_tiny_video_llava, {**ODD, "config": {"vision_feature_select_strategy": "full"}}),
}
# What is shown: a number of frames, or the size of an image.
CASES: dict[str, list[int | tuple[int, int]]] = {
    "one_frame": [1],
    "many_frames": [9],  # more than one run takes
    "two_videos": [2, 3],
    "video_before_image": [3, (70, 40)],
    "images_and_videos": [(30, 50), 2, (50, 30), 1],
}


class Pair(NamedTuple):
    model: Any
    folder: Path
    bundle: Path


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The source model, its folder and its bundle."""
    folder, (save, settings) = tmp_path_factory.mktemp(request.param), MODELS[request.param]
    model = save(folder / "model", **settings)
    export(str(folder / "model"), folder / "bundle", recipe_name="fp32", targets=FLOAT32_TARGETS)
    return Pair(model, folder / "model", folder / "bundle")


def shown(case: list[int | tuple[int, int]]) -> list[Any]:
    """Videos whose frames are of unequal sizes, and images."""
    random = np.random.default_rng(len(case))

    def picture(height: int, width: int) -> np.ndarray:
        return random.integers(0, 256, (height, width, 3), dtype=np.uint8)

    return [
        Video([picture(40 + 7 * i, 99 - 6 * i) for i in range(item)]) if isinstance(item, int) else picture(*item)
        for item in case
    ]


def reference_inputs(pair: Pair, question: str, given: list[Any]) -> dict[str, Any]:
    """transformers' inputs, those of videos by CLIP's image processor, which does the same with each frame."""
    source, config = open_source(str(pair.folder)), pair.model.config
    processor = family_for(source).load_processor(source)
    images = [item for item in given if not isinstance(item, Video)]
    entries = [{"type": "video" if isinstance(item, Video) else "image"} for item in given]
    message = {"role": "user", "content": [*entries, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    # The processor wants the videos of a text that has their placeholders: another token goes through it.
    text = text.replace(VIDEO_TOKEN, OTHER)
    inputs = dict(processor(text=[text], images=[images] if images else None, return_tensors="pt"))
    frames = CLIPImageProcessorPil(**source.json("video_preprocessor_config.json"))
    pixels = [frames(list(item.frames), return_tensors="pt").pixel_values for item in given if isinstance(item, Video)]
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    of_frame = patches // 4 if config.model_type == "llava_next_video" else patches + 1
    counts = iter([len(video) * of_frame for video in pixels])
    ids = inputs.pop("input_ids")[0]
    ids[ids == processor.tokenizer.convert_tokens_to_ids(OTHER)] = config.video_token_id
    repeats = [next(counts) if token == config.video_token_id else 1 for token in ids.tolist()]
    ids = torch.repeat_interleave(ids, torch.tensor(repeats))[None]
    return {**inputs, "input_ids": ids, "videos": pixels}


def reference_logits(model: Any, inputs: dict[str, Any], answer: np.ndarray) -> np.ndarray:
    """Logits [n, V] of each of the tokens of `answer`. The videos' features are placed here: transformers takes one
    number of frames for all."""
    ids = torch.cat([inputs["input_ids"], torch.tensor(answer[None, :-1])], dim=1)
    given = {key: value for key, value in inputs.items() if key.startswith(("pixel_values", "image_sizes"))}
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        width = embeds.shape[-1]
        found = [model.model.get_video_features(video[None]).pooler_output for video in inputs["videos"]]
        embeds[ids == model.config.video_token_id] = torch.cat([video.reshape(-1, width) for video in found])
        if given:
            images = model.model.get_image_features(**given, return_dict=True).pooler_output
            embeds[ids == model.config.image_token_id] = torch.cat([image.reshape(-1, width) for image in images])
        logits = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
    return logits[0, -len(answer) :].numpy()


@pytest.mark.parametrize("case", CASES)
def test_whole_path_agrees(pair: Pair, case: str) -> None:
    given, question = shown(CASES[case]), "What happens?"
    inputs = reference_inputs(pair, question, given)
    for target in FLOAT32_TARGETS:
        with VLM(Bundle.load(pair.bundle), OnnxRuntimeCpu(target=target)) as vlm:
            prompt = vlm.processor.process(question, given)
            np.testing.assert_array_equal(prompt.token_ids, inputs["input_ids"][0].numpy())
            encoded = vlm.encode(prompt)
            (answer,) = vlm.greedy([encoded], 12, stop_ids=())
            expected = reference_logits(pair.model, inputs, answer)
            np.testing.assert_array_equal(answer, expected.argmax(axis=1))
            np.testing.assert_allclose(vlm.steps(encoded, answer), expected, atol=1e-4 * np.ptp(expected))
            sizes = [(len(i.frames), *i.frames[0].shape[:2]) if isinstance(i, Video) else i.shape[:2] for i in given]
            assert vlm.count_tokens(question, sizes) == len(prompt.token_ids)


def test_one_video_is_what_the_whole_source_model_makes_of_it(pair: Pair) -> None:
    (video,), question = shown([4]), "What happens?"
    inputs = reference_inputs(pair, question, [video])
    with torch.no_grad():
        ids, frames = inputs["input_ids"], inputs["videos"][0][None]
        expected = pair.model(input_ids=ids, pixel_values_videos=frames).logits[0, -1].numpy()
    with VLM.load(pair.bundle, backend="cpu") as vlm:
        encoded = vlm.encode(vlm.processor.process(question, video))
        found = vlm.steps(encoded, np.zeros(1, np.int64))[0]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.ptp(expected))


def test_each_component_runs_for_what_it_is_for(pair: Pair) -> None:
    stages = {stage.component: stage for stage in Bundle.load(pair.bundle).manifest.model.stages}
    with VLM.load(pair.bundle, backend="cpu") as vlm:
        for kind, case in (("image", [(30, 40)]), ("video", [2])):
            ran = vlm.stage_outputs(vlm.processor.process("What?", shown(case)))
            assert set(ran) == {name for name, stage in stages.items() if stage.shows in (None, kind)}


def test_the_export_compares_what_runs_for_videos(pair: Pair) -> None:
    manifest = Bundle.load(pair.bundle).manifest
    alone = [stage.component for stage in manifest.model.stages if stage.shows == "video"]
    assert alone
    for name in alone:
        assert 0 < manifest.parity["errors"][name] <= manifest.parity["limits"][name]
    assert any("torchvision" in note for note in manifest.parity["notes"])


def test_calibration_shows_its_pictures_as_frames(pair: Pair, tmp_path: Path) -> None:
    bundle = Bundle.load(pair.bundle)
    samples = [Sample("Which?", tuple(shown([(40, 30), (50, 60)])), "Yes.", "1"), Sample("Hi.", (), "Ho.", "2")]
    record(bundle, OnnxRuntimeCpu(), samples, tmp_path)
    alone = [stage.component for stage in bundle.manifest.model.stages if stage.shows == "video"]
    for name in alone:
        (tensor,), feeds = bundle.variant(name, "cpu").inputs, Feeds(tmp_path / name)
        assert len(feeds) == 1
        assert len(feeds.read(0, [tensor.name])[tensor.name]) == 2


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("runs for videos, and the model takes none", lambda m: m["image"].update(video=None)),
        ("no stage has the output image_features", lambda m: m["stages"][-1].update(shows="image")),
        ("something stands behind them", lambda m: m["image"]["video"].update(end="embed_tokens.npy")),
        (r"video\.features is 0", lambda m: m["image"]["video"].update(features=0)),
    ],
)
def test_a_contradiction_is_named(pair: Pair, tmp_path: Path, words: str, change: Callable[[Any], Any]) -> None:
    bundle = Path(shutil.copytree(pair.bundle, tmp_path / "bundle"))
    data = json.loads((bundle / "manifest.json").read_text())
    del data["checksum"]
    change(data["model"])
    (bundle / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=words):
        Bundle.load(bundle)


def test_an_odd_number_of_patches_is_refused(tmp_path: Path) -> None:
    """The reference's processor counts a quarter of all, its model pools what is left of whole pairs."""
    config = {"image_grid_pinpoints": [[56, 56], [112, 56]]}
    save_tiny_llava_next_video(tmp_path / "model", vision={"image_size": 56}, config=config)
    with pytest.raises(ConfigError, match="spatial_pool_stride = 2, and the tower has 7 patches a side"):
        export(str(tmp_path / "model"), tmp_path / "bundle", recipe_name="fp32")


@pytest.mark.parametrize("save", [save_tiny_llava_next_video, save_tiny_video_llava])
def test_without_settings_of_a_video_processor_there_are_no_videos(tmp_path: Path, save: Callable[..., Any]) -> None:
    save(tmp_path / "model", video_settings=None)
    export(str(tmp_path / "model"), tmp_path / "bundle", recipe_name="fp32", verify_mode="off")
    manifest = Bundle.load(tmp_path / "bundle").manifest
    assert list(manifest.components) == ["vision_encoder", "connector", "decoder"]
    with VLM.load(tmp_path / "bundle", backend="cpu") as vlm:
        with pytest.raises(PromptError, match="this bundle takes no videos, and got 1"):
            vlm.generate("What?", Video(np.zeros((2, 9, 9, 3), np.uint8)))
        # A text that spells the placeholder shows nothing.
        assert VIDEO_TOKEN in vlm.tokenizer.decode(vlm.processor.process(f"What is {VIDEO_TOKEN}?").token_ids.tolist())


@pytest.mark.parametrize("save", [save_tiny_llava_next_video, save_tiny_video_llava])
def test_older_folders_have_settings_for_images_and_videos_in_one_file(
    tmp_path: Path, save: Callable[..., Any]
) -> None:
    save(tmp_path, names="hub", image_settings={"image_std": [0.2, 0.3, 0.4]})
    source = open_source(str(tmp_path))
    image = understand(source, open_weights(source)).model.image
    assert image is not None
    assert image.video is not None
    assert image.video.transforms[-2:] == image.transforms[-2:]
    assert isinstance(image.video.transforms[0], ResizeShortestEdge)
