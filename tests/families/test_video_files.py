"""Video files through a model: SmolVLM's, which reads times and takes one frame a second."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mllm_edge import VLM, FrameWindow, Video
from mllm_edge.cli import main
from mllm_edge.errors import ContextError, ImageError, OptionError, PromptError
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.prompt import shown, video_file
from tests.families.test_videos import save
from tests.video_files import even, numbered, save_video

SHORT = ("--max-new-tokens", "4")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smolvlm")
    save("smolvlm", folder / "source")
    export(str(folder / "source"), folder / "bundle", recipe_name="fp32", verify_mode="off")
    return folder / "bundle"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds."""
    return save_video(tmp_path_factory.mktemp("clip") / "clip.mp4", even(120), size=(64, 96))


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Any:
    with VLM.load(bundle, backend="cpu") as opened:
        yield opened


def run(*arguments: Any, **options: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="mllm-edge", **options)


def ids(vlm: VLM, messages: Any, shown: Any = ()) -> list[int]:
    found: list[int] = vlm.processor.process(messages, shown).token_ids.tolist()
    return found


def times(vlm: VLM, source: Any) -> list[float]:
    timing = vlm.processor.show(source).timing
    assert timing is not None
    return [round(time, 2) for time in timing.times]


def test_a_file_is_shown_as_its_frames_are(vlm: VLM, clip: Path) -> None:
    file = Video.open(clip, fps=1)
    assert times(vlm, file) == [0, 1, 2, 3]
    read = vlm.processor.process("What?", file.read())
    shown = vlm.processor.process("What?", file)
    assert shown.text == read.text
    np.testing.assert_array_equal(shown.token_ids, read.token_ids)
    np.testing.assert_array_equal(shown.pixel_values, read.pixel_values)  # type: ignore[arg-type]


def test_where_nothing_is_said_the_models_own_rule_counts(vlm: VLM, clip: Path) -> None:
    """transformers' SmolVLM: one a second, from the first frame to the last."""
    assert times(vlm, Video.open(clip)) == [0, 1.3, 2.63, 3.97]
    assert times(vlm, Video.open(clip, frames=2)) == [0, 2]


def test_messages_name_files(vlm: VLM, clip: Path) -> None:
    def asked(**entry: Any) -> list[int]:
        return ids(vlm, [{"role": "user", "content": [{"type": "video", **entry}, {"type": "text", "text": "What?"}]}])

    own, two = ids(vlm, "What?", Video.open(clip)), ids(vlm, "What?", Video.open(clip, fps=0.5, end=3.5))
    for given in ({"video": str(clip)}, {"video": clip}, {"path": str(clip)}, {"url": f"file://{clip}"}):
        assert asked(**given) == own
        assert asked(**given, fps=0.5, end=3.5) == two != own
    assert asked(video=Video.open(clip)) == own
    with pytest.raises(OptionError, match="fps"):
        asked(video=str(clip), fps=0)
    with pytest.raises(ImageError, match=r"absent\.mp4: no such file"):
        asked(video="absent.mp4")


def test_one_frame_is_in_memory_at_a_time(vlm: VLM, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is transformed before the next one is decoded."""
    happened: list[str] = []
    decode, transform = video_file._pixels_and_matrix, shown.apply_transforms
    monkeypatch.setattr(video_file, "_pixels_and_matrix", lambda *a: happened.append("decoded") or decode(*a))
    monkeypatch.setattr(shown, "apply_transforms", lambda *a: happened.append("transformed") or transform(*a))
    vlm.processor.show(Video.open(clip, frames=3))
    assert happened == ["decoded", "transformed"] * 3


def test_an_encoded_file_and_a_conversation_with_one(vlm: VLM, clip: Path, tmp_path: Path) -> None:
    expected = vlm.generate("What?", Video.open(clip, fps=1), max_new_tokens=4, ignore_eos=True).token_ids
    seen = vlm.encode_image(Video.open(clip, fps=1))
    assert vlm.generate("What?", seen, max_new_tokens=4, ignore_eos=True).token_ids == expected
    chat = vlm.chat()
    chat.attach(Video.open(clip, fps=1))
    said = [chunk.text for chunk in chat.ask("What?", max_new_tokens=4)]
    chat.save(str(tmp_path / "talk.json"))
    entry = json.loads((tmp_path / "talk.json").read_text())[0]["content"][0]
    assert entry == {"type": "video", "path": str(clip), "fps": 1.0}
    again = vlm.chat()
    again.load(str(tmp_path / "talk.json"))
    assert again.messages() == chat.messages()
    assert [chunk.text for chunk in again.ask("And?", max_new_tokens=4)] == [
        c.text for c in chat.ask("And?", max_new_tokens=4)
    ]
    assert said


def test_a_window_is_a_video(vlm: VLM) -> None:
    window = FrameWindow(seconds=3, fps=1)
    for i in range(50):
        window.add(numbered(i), 100 + i / 10)
    assert times(vlm, window.video()) == [0, 1, 2, 3]


# ---------------------------------------------------------------- the command line
def test_run_takes_videos(bundle: Path, clip: Path) -> None:
    with VLM.load(bundle) as vlm:
        expected = vlm.generate("What?", Video.open(clip, fps=1, frames=3), max_new_tokens=4)
    options = ("--video", clip, "--fps", "1", "--frames", "3", "--json", *SHORT)
    done = run("run", bundle, "What?", *options)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == list(expected.token_ids)
    assert json.loads(done.stdout)["metrics"]["image_tokens"] == expected.metrics.image_tokens
    piped = run("run", bundle, "What?", "--video", "-", *options[2:], input=clip.read_bytes())
    assert json.loads(piped.stdout)["token_ids"] == list(expected.token_ids)
    several = run("run", bundle, "What?", "--system", "Look.", "--video", clip, "--video", clip, "--frames", 1, *SHORT)
    assert several.exit_code == 0, several.stderr


def test_chat_takes_videos(bundle: Path, clip: Path) -> None:
    begun = run("chat", bundle, "--video", clip, "--fps", "1", *SHORT, input="What?\n")
    asked = run("chat", bundle, "--fps", "1", *SHORT, input=f"/video {clip}\nWhat?\n")
    assert begun.exit_code == asked.exit_code == 0, asked.stderr
    assert begun.stdout == asked.stdout != ""
    assert "1 video with the next message" in asked.stderr
    wrong = run("chat", bundle, *SHORT, input=f"/video\n/video {clip.parent / 'absent.mp4'}\n")
    assert "/video needs a file" in wrong.stderr
    assert "absent.mp4: no such file" in wrong.stderr


def test_inspect_plans_videos(bundle: Path, clip: Path, vlm: VLM) -> None:
    def planned(*options: Any) -> dict[str, Any]:
        done = run("inspect", bundle, "--plan", *options, "--json")
        assert done.exit_code == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)["plan"]
        return found

    taken = vlm.plan("Describe the image.", Video.open(clip, fps=1))
    assert planned("--video", clip, "--fps", 1)["prompt_tokens"] == taken.prompt_tokens
    (video,) = planned("--video-size", "64x96", "--frames", 4, "--fps", 1)["images"]
    assert (video["size"], video["tokens"]) == ([4, 64, 96], taken.image_tokens)
    both = planned("--video", clip, "--video", clip, "--images", 1, "--image-size", "48x64")
    assert [len(shown["size"]) for shown in both["images"]] == [2, 3, 3]
    told = run("inspect", bundle, "--plan", "--video-size", "64x96", "--frames", 4, "--fps", 1).stdout
    assert f"a video of 4 frames of 64 x 96 px: {taken.image_tokens} tokens, 4 times 1 x 1 tiles, 64 x 64 px" in told


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--video-size", "64x96"], 2, "are of a --plan"),
        (["--plan", "--video-size", "64x96"], 2, "--video-size wants --frames"),
        (["--plan", "--fps", "2"], 2, "there is no --video"),
        (["--plan", "--video-size", "64x96", "--video", "clip.mp4"], 2, "exclude each other"),
        (["--plan", "--video-size", "64x96", "--frames", "4"], 1, "--fps 2"),
    ],
)
def test_plans_of_videos_that_cannot_be(
    bundle: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, word: str
) -> None:
    monkeypatch.chdir(clip.parent)
    done = run("inspect", bundle, *options)
    assert done.exit_code == code
    assert word in done.stderr


def test_a_plan_for_a_model_without_videos(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "clip.mp4"
    broken.write_bytes(b"no video")
    monkeypatch.setattr(video_file, "_import_av", lambda: pytest.fail("it was decoded"))
    with VLM.load(tiny_bundle) as vlm, pytest.raises(PromptError, match="its model is idefics3"):
        vlm.plan("What?", Video.open(broken))
    for options in (["--video", broken], ["--video-size", "48x64", "--frames", 4]):
        done = run("inspect", tiny_bundle, "--plan", *options)
        assert done.exit_code == 1
        assert "this bundle takes no videos, and got 1; its model is idefics3" in done.stderr


def test_frames_of_a_file_are_planned_one_at_a_time(vlm: VLM, clip: Path) -> None:
    file = Video.open(clip, fps=1)
    held, read = (vlm.plan("What?", video).memory.images for video in (file, file.read()))
    assert read - held == 3 * 64 * 96 * 3


def test_options_without_a_video(bundle: Path) -> None:
    done = run("run", bundle, "What?", "--fps", "2")
    assert done.exit_code == 2
    assert "there is no --video" in done.stderr


@pytest.mark.parametrize("verb", ["run", "chat", "chat --video"])
def test_a_model_without_videos_refuses_before_anything_is_decoded(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    broken = tmp_path / "clip.mp4"
    broken.write_bytes(b"no video")
    monkeypatch.setattr(video_file, "_import_av", lambda: pytest.fail("it was decoded"))
    if verb == "run":
        done = run("run", tiny_bundle, "What?", "--video", broken)
    elif verb == "chat":
        done = run("chat", tiny_bundle, input=f"/video {broken}\n")
    else:
        done = run("chat", tiny_bundle, "--video", broken, input="Hi\n")
    assert done.exit_code == 1
    assert "this bundle takes no videos, and got 1; its model is idefics3" in done.stderr


def test_a_message_to_a_model_without_videos(tiny_bundle: Path) -> None:
    with VLM.load(tiny_bundle) as vlm, pytest.raises(PromptError, match="its model is idefics3"):
        vlm.generate([{"role": "user", "content": [{"type": "video", "video": "absent.mp4"}]}])


def test_where_a_video_is_too_long_fewer_frames_are_named(bundle: Path, clip: Path) -> None:
    with VLM.load(bundle, backend="cpu", max_context=256) as small:
        with pytest.raises(ContextError, match=r"the context holds 256: \d+ too many") as caught:
            small.generate("What?", Video.open(clip, frames="all"))
        assert "Video.open(path, frames=N), or fps=R (--frames N, --fps R); or raise --max-context" in caught.value.fix
        with pytest.raises(ContextError) as caught:
            small.generate("What? " * 400)
        assert caught.value.fix == "raise --max-context"
        assert small.generate("What?", Video.open(clip, frames=1), max_new_tokens=2, ignore_eos=True).token_ids
    done = run("run", bundle, "What?", "--video", clip, "--fps", 30, "--max-context", 256)
    assert done.exit_code == 1
    assert "fix: show fewer frames" in done.stderr


def test_a_broken_file_is_named_and_the_next_call_works(vlm: VLM, clip: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:500])
    with pytest.raises(ImageError, match=r"video 2 of 2: .*broken\.mp4: no video"):
        vlm.generate("What?", [Video.open(clip, frames=1), Video.open(broken)])
    assert vlm.generate("What?", Video.open(clip, frames=1), max_new_tokens=2, ignore_eos=True).token_ids
