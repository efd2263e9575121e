"""Videos whose prompts tell frames apart: the whole path beside transformers, which needs torchvision for them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM, Video
from mllm_edge.bundle import Bundle
from mllm_edge.errors import ConfigError, ImageError, OptionError, PromptError
from mllm_edge.export.pipeline import export
from mllm_edge.json_form import from_json, to_json
from mllm_edge.runtime.prompt import video_file
from mllm_edge.runtime.prompt.frame_sampling import positions as taken
from mllm_edge.runtime.prompt.layout import Layout, grid_positions
from mllm_edge.runtime.prompt.timing import in_words
from mllm_edge.spec import ImageSpec
from tests.tiny import save_tiny_idefics3, save_tiny_qwen2_vl
from tests.tiny_glm4v import save_tiny_glm4v
from tests.tiny_internvl import save_tiny_internvl
from tests.tiny_qwen3 import save_tiny_qwen3_vl
from tests.tiny_qwen25 import save_tiny_qwen25_vl
from tests.video_files import even, save_video

ROOT = Path(__file__).parents[2]
TORCHVISION = ROOT / "build" / "torchvision"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@dataclass(frozen=True)
class Asked:
    """A checkpoint, the settings of its video processor, and what it is asked: each case has what is shown, a video as
    [frames, height, width] and an image as [height, width]; `fps`, `duration`, the `question`, and what is `replaced`
    in the rendered text before the reference gets it. `exact`: the size (height, width) of frames that are not
    resized. `mixes`: whether the reference runs a prompt with images and videos."""

    save: Callable[..., Any]
    settings: dict[str, Any]
    exact: tuple[int, int]
    config: dict[str, Any] = field(default_factory=dict)
    replaced: tuple[tuple[str, str], ...] = ()
    mixes: bool = True
    fps: float = 0.6

    def cases(self) -> list[dict[str, Any]]:
        size = list(self.exact)
        kinds: list[tuple[list[list[int]], float, float]] = [
            ([[4, *size]], 2.0, 2.0),
            ([[5, *size]], self.fps, 64.5),  # an odd number, and more than a minute
            ([[2, *size], size], 3.0, 2.0),
            ([size, [3, *size], [3, *size]], 4.0, 1.0),
            ([[3, 45, 70]], 3.0, 1.0),  # resized
            ([[6, 170, 90]], 1.5, 4.0),
        ]
        return [
            {"shown": shown, "fps": fps, "duration": duration, "question": f"What happens in {i}?",
             "replaced": self.replaced, "runs": self.mixes or all(len(one) == 3 for one in shown)}
            for i, (shown, fps, duration) in enumerate(kinds)
        ]  # fmt: skip


_CELLS = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
_BOUNDS = {"size": {"shortest_edge": 4 * 16**2, "longest_edge": 64 * 16**2}}
_SHARED = {"size": {"shortest_edge": 16 * 16**2, "longest_edge": 96 * 16**2}}
ASKED: dict[str, Asked] = {
    "smolvlm": Asked(
        save_tiny_idefics3,
        {
            "video_sampling": {"fps": 1, "max_frames": 24, "video_size": {"longest_edge": 64}},
            "max_image_size": {"longest_edge": 64},
        },
        (64, 64),
        {"model_type": "smolvlm"},
        mixes=False,  # in transformers 5.24 the pixels of videos take the place of those of images
    ),
    "internvl": Asked(save_tiny_internvl, {"size": {"height": 32, "width": 32}, "num_frames": 5}, (32, 32)),
    "qwen2_vl": Asked(save_tiny_qwen2_vl, {**_CELLS, **_BOUNDS, "fps": 2}, (48, 64)),
    # So slowly that frames stay within the places of a frame's own cells: see `test_text_is_behind_the_last_frame`.
    "qwen2_5_vl": Asked(
        save_tiny_qwen25_vl,
        {**_CELLS, **_BOUNDS, "num_frames": 6},
        (48, 64),
        {"vision": {"tokens_per_second": 1}},
        fps=1.9,
    ),
    "qwen3_vl": Asked(save_tiny_qwen3_vl, {**_CELLS, **_SHARED}, (48, 64), replaced=((QWEN_VIDEO, "<|video_pad|>"),)),
    # transformers 5.24 counts the tokens of GLM-4V's videos as those of images, too.
    "glm4v": Asked(save_tiny_glm4v, {**_CELLS, **_SHARED, "max_duration": 60}, (48, 64), mixes=False),
}


# Frames in all and in a second.
RECORDINGS = [
    (total, fps)
    for total in (6, 7, 8, 31, 64, 90, 241, 899, 900, 1800, 5400, 16_567, 17_982, 54_000, 108_000)
    for fps in (8.0, 12.5, 23.976, 24000 / 1001, 25.0, 30000 / 1001, 30.0, 120.0)
]


def shown(case: dict[str, Any]) -> list[Any]:
    """Frames in a list, images alone."""
    random = np.random.default_rng(len(case["shown"]))

    def picture(height: int, width: int) -> np.ndarray:
        return random.integers(0, 256, (height, width, 3), dtype=np.uint8)

    return [[picture(*one[1:]) for _ in range(one[0])] if len(one) == 3 else picture(*one) for one in case["shown"]]


def given(case: dict[str, Any]) -> list[Any]:
    """The same for a `VLM`."""
    return [
        Video(one, fps=case["fps"], duration=max(case["duration"], (len(one) - 1) / case["fps"]))
        if isinstance(one, list)
        else one
        for one in shown(case)
    ]


def save(name: str, folder: Path) -> None:
    asked = ASKED[name]
    asked.save(folder, **asked.config)
    if name == "smolvlm":
        stated = json.loads((folder / "processor_config.json").read_text())
        (folder / "processor_config.json").write_text(json.dumps({**stated, "processor_class": "SmolVLMProcessor"}))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(asked.settings))
    (folder / "recordings.json").write_text(json.dumps(RECORDINGS))
    cases = [
        {**case, "duration": max(case["duration"], (max(s[0] for s in case["shown"] if len(s) == 3) - 1) / case["fps"])}
        for case in asked.cases()
    ]
    (folder / "asked.json").write_text(json.dumps(cases))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for each of `ASKED` and, beside it, what transformers makes of its cases."""
    if not (TORCHVISION / "num2words").is_dir():
        pytest.fail(
            "transformers' video processors need torchvision and num2words: python -m pip install --no-deps --target "
            "build/torchvision torchvision==0.28.0 num2words==0.5.14"
        )
    folder = tmp_path_factory.mktemp("compared")
    (folder / "out").mkdir()
    for name in ASKED:
        save(name, folder / "in" / name)
    save_video(folder / "clip.mp4", even(120), size=(64, 96))
    path = os.pathsep.join([str(ROOT), str(TORCHVISION)])
    command = [sys.executable, "-m", "tests.families.video_reference", str(folder / "in"), str(folder / "out")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def of_transformers(compared: Path, name: str, case: int | str) -> dict[str, np.ndarray]:
    found = np.load(compared / "out" / f"{name}.npz")
    return {key.split(".", 1)[1]: found[key] for key in found.files if key.startswith(f"{case}.")}


@pytest.mark.parametrize("name", ASKED)
def test_whole_path_agrees(compared: Path, tmp_path: Path, name: str) -> None:
    """Prompts are equal, and where no frame is resized every step's logits; of others a pixel is off by one level of
    255 at most."""
    asked = ASKED[name]
    export(str(compared / "in" / name), tmp_path / "bundle", recipe_name="fp32", verify_mode="off")
    cases = json.loads((compared / "in" / name / "asked.json").read_text())
    with VLM.load(tmp_path / "bundle", backend="cpu") as vlm:
        for i, case in enumerate(cases):
            expected = of_transformers(compared, name, i)
            prompt = vlm.processor.process(case["question"], given(case))
            np.testing.assert_array_equal(prompt.token_ids, expected["input_ids"][0])
            sizes = [(*one, case["fps"]) if len(one) == 3 else one for one in case["shown"]]
            if len({one[0] for one in case["shown"] if len(one) == 3}) == 1 and "duration" not in _words(vlm):
                assert vlm.count_tokens(case["question"], sizes) == len(prompt.token_ids)
            encoded = vlm.encode(prompt)
            if case["runs"] and all(one[-2:] == list(asked.exact) for one in case["shown"] if len(one) == 3):
                answer, scale = expected["answer"], np.ptp(expected["logits"])
                (own,) = vlm.greedy([encoded], len(answer), stop_ids=())
                np.testing.assert_array_equal(own, answer)
                found = vlm.steps(encoded, answer)
                np.testing.assert_allclose(found, expected["logits"], atol=2e-4 * scale)
            if len(case["shown"]) == 1:
                pixels = expected.get("pixel_values_videos", expected.get("pixel_values"))
                _require_close(prompt.pixel_values, pixels)
        expected = of_transformers(compared, name, "file")
        entry = {"type": "video", "video": str(compared / "clip.mp4")}
        prompt = vlm.processor.process([{"role": "user", "content": [entry, {"type": "text", "text": "What?"}]}])
        np.testing.assert_array_equal(prompt.token_ids, expected["input_ids"][0])
        _require_close(prompt.pixel_values, expected.get("pixel_values_videos", expected.get("pixel_values")))


def _require_close(ours: np.ndarray | None, pixels: np.ndarray | None) -> None:
    assert ours is not None
    assert pixels is not None
    np.testing.assert_allclose(ours.reshape(-1), pixels.reshape(-1), atol=1.0 / 255 / 0.22 + 1e-5)


@pytest.mark.parametrize("name", ASKED)
def test_frames_of_a_recording_are_taken_as_by_transformers(
    compared: Path, bundles: Callable[[str], Path], name: str
) -> None:
    image = Bundle.load(bundles(name)).manifest.model.image
    assert image is not None
    assert image.video is not None
    assert image.video.sampling is not None
    reference = np.load(compared / "out" / f"{name}.npz")
    for i, (total, fps) in enumerate(RECORDINGS):
        expected = reference[f"taken.{i}"]
        # By rounding, Qwen2-VL's processor asks for a frame behind the last one of some recordings.
        assert taken(image.video.sampling, total, fps) == expected[expected < total].tolist(), (total, fps)


@pytest.mark.parametrize("name", ASKED)
def test_a_plan_of_a_file_is_what_the_call_takes(
    bundles: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of which one frame is decoded."""
    file, decode = save_video(tmp_path / "clip.mp4", even(50), size=(45, 70)), video_file._pixels_and_matrix
    decoded: list[int] = []
    with VLM.load(bundles(name), backend="cpu") as vlm:
        for clip in (Video.open(file), Video.open(file, fps=5, start=0.5), Video.open(file, frames=4)):
            expected = vlm.processor.process("What?", clip)
            monkeypatch.setattr(video_file, "_pixels_and_matrix", lambda *a: (decoded.append(1), decode(*a))[1])
            plan = vlm.plan("What?", clip)
            monkeypatch.undo()
            assert plan.prompt_tokens == len(expected.token_ids)
            assert plan.image_tokens == len(expected.image_positions)
            (planned,), (shown,) = plan.images, expected.shown
            assert planned.size == shown.size
            assert planned.grid == (shown.layout.rows, shown.layout.cols)
            timing = () if shown.timing is None else (shown.timing.rate,)
            if "duration" not in _words(vlm):
                assert vlm.plan("What?", image_sizes=[(*shown.size, *timing)]).prompt_tokens == plan.prompt_tokens
    assert len(decoded) == 3


def test_a_bundle_without_a_rule_is_read(bundles: Callable[[str], Path]) -> None:
    """As older versions wrote it."""
    image = Bundle.load(bundles("qwen2_vl")).manifest.model.image
    assert image is not None
    written = to_json(image)
    del written["video"]["sampling"]
    video = from_json(ImageSpec, written).video
    assert video is not None
    assert video.sampling is None


def _words(vlm: VLM) -> str:
    image = vlm.spec.image
    assert image is not None
    assert image.video is not None
    return image.video.begin


# ---------------------------------------------------------------- what no reference of today says
def positions(steps: tuple[int, ...], rows: int, cols: int, text: int) -> np.ndarray:
    """Of a video of such places on the first axis between `text` tokens on both sides."""
    tokens = len(steps) * rows * cols
    layout = Layout(rows, cols, tokens, len(steps), tokens, "", None, ((rows, cols),) * len(steps), "video", (steps,))
    return grid_positions(text + tokens + text, np.arange(text, text + tokens), [layout])


@pytest.mark.parametrize("steps", [(0, 1), (0, 1, 2, 3, 4, 5, 6, 7), (0, 13, 26)], ids=["short", "long", "slow"])
def test_text_is_behind_the_last_frame(steps: tuple[int, ...]) -> None:
    """As the model's own code and transformers up to 4.57 have it; 5.24 lets the text begin behind one frame's cells,
    at places that later frames have."""
    found = positions(steps, 2, 3, 5)
    assert found[:, 5:-5].max(axis=1).tolist() == [5 + steps[-1], 6, 7]
    behind = 5 + max(steps[-1] + 1, 3)
    np.testing.assert_array_equal(found[:, -5:], np.tile(np.arange(behind, behind + 5), (3, 1)))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bundles")

    def made(name: str) -> Path:
        if not (folder / name).is_dir():
            save(name, folder / f"{name}-source")
            export(str(folder / f"{name}-source"), folder / name, recipe_name="fp32", verify_mode="off")
        return folder / name

    return made


def frames(*sizes: tuple[int, int]) -> list[np.ndarray]:
    return [np.full((height, width, 3), 90, np.uint8) for height, width in sizes]


@pytest.mark.parametrize(
    ("name", "video", "error", "word"),
    [
        ("qwen3_vl", lambda: Video(frames((48, 64), (48, 64))), PromptError, "reads when a video's frames were taken"),
        ("smolvlm", lambda: Video(frames((64, 64))), PromptError, "reads when a video's frames were taken"),
        ("qwen2_5_vl", lambda: Video(frames((48, 64))), PromptError, "reads when a video's frames were taken"),
        ("glm4v", lambda: Video(frames((48, 64)), fps=2), ImageError, "a video of 1 frames"),
        ("qwen2_vl", lambda: Video(frames((48, 64), (64, 48))), ImageError, "frame 2 of 2: 64×48 px, and the first is"),
    ],
)
def test_bad_videos_are_named(
    bundles: Callable[[str], Path], name: str, video: Callable[[], Video], error: type[Exception], word: str
) -> None:
    with VLM.load(bundles(name), backend="cpu") as vlm, pytest.raises(error, match=word) as caught:
        vlm.processor.process("What?", video())
    assert caught.value.fix  # type: ignore[attr-defined]


def test_times_may_be_uneven(bundles: Callable[[str], Path]) -> None:
    with VLM.load(bundles("qwen3_vl"), backend="cpu") as vlm:
        prompt = vlm.processor.process("What?", Video(frames(*[(48, 64)] * 5), times=[0.5, 1.0, 7.25, 9.75, 61.5]))
        text = vlm.tokenizer.decode(prompt.token_ids.tolist(), skip_special_tokens=True)
    assert [part.split(" seconds>")[0] for part in text.split("<")[1:]] == ["0.8", "8.5", "61.5"]


def test_text_that_spells_a_videos_words_shows_nothing(bundles: Callable[[str], Path]) -> None:
    with VLM.load(bundles("glm4v"), backend="cpu") as vlm:
        prompt = vlm.processor.process("What is <|begin_of_image|> or <|video|>?")
        assert not {vlm.tokenizer.decode([i]) for i in prompt.token_ids} & {"<|begin_of_image|>", "<|video|>"}


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("qwen2_vl", {"patch_size": 14}, "the video processor's patch_size is 14, the vision tower's 8"),
        ("qwen3_vl", {"temporal_patch_size": 3}, "the video processor's temporal_patch_size is 3"),
        (
            "qwen2_vl",
            {"size": {"shortest_edge": 64, "longest_edge": 32}},
            "at least 64 pixels of a video and at most 32",
        ),
        ("glm4v", {"cap_pixels_per_frame": True}, "cap_pixels_per_frame"),
        ("qwen2_5_vl", {"do_resize": False}, "do_resize"),
        ("smolvlm", {"max_image_size": {"longest_edge": 32}}, "tiles of 32×32 px"),
        ("internvl", {"size": {"height": 64, "width": 64}}, "size is {'height': 64"),
        ("qwen2_vl", {"fps": 0}, "fps = 0 of the frames of a video"),
        ("qwen3_vl", {"min_frames": 9, "max_frames": 8}, "9 frames of a video at least, and 8 at most"),
        ("internvl", {"num_frames": "8"}, "num_frames|frames = '8'"),
        ("internvl", {"video_processor_type": "SmolVLMVideoProcessor"}, "SmolVLMVideoProcessor"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, name: str, settings: dict[str, Any], word: str) -> None:
    save(name, tmp_path / "source")
    file = tmp_path / "source" / "video_preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(ConfigError, match=word):
        export(str(tmp_path / "source"), tmp_path / "bundle", recipe_name="fp32")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"times": [1.0]}, "2 frames and 1 times"),
        ({"times": [1.0, 0.5]}, r"times\[1\] of a video must be a number from 1"),
        ({"times": [0.0, "1"]}, r"times\[1\]"),
        ({"times": [0.0, 1.0], "fps": 1}, "times and fps"),
        ({"fps": 1, "duration": 0.5}, "duration must be a number from 1"),
        ({"duration": 3}, "frames have no times"),
    ],
)
def test_times_that_cannot_be(options: dict[str, Any], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        Video(frames((4, 4), (4, 4)), **options)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (64, "sixty-four"),
        (100, "one hundred"),
        (317, "three hundred and seventeen"),
        (1005, "one thousand and five"),
        (12_345, "twelve thousand, three hundred and forty-five"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words
