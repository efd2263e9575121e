"""Plans of calls: what the call then takes; and bounds on image tokens in everything that shows images."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mllm_edge import VLM, Video
from mllm_edge.bundle import Bundle
from mllm_edge.cli import main
from mllm_edge.errors import OptionError, PromptError
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.planning.cache import cache_bytes
from mllm_edge.runtime.trace import Trace

SHORT: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True}
# The tiny model's pictures: five tiles of 16 tokens, one of 16 within a bound below that.
TILES, FEW = 80, 16


def frame(seed: int = 1, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def vlm(tiny_bundle: Path) -> Iterator[VLM]:
    with VLM.load(tiny_bundle, image_cache=1 << 20) as vlm:
        yield vlm


def test_a_plan_is_what_the_call_takes(vlm: VLM) -> None:
    for images, bounds in (([], {}), ([frame()], {}), ([frame(), frame(2, 30, 90)], {"max_image_tokens": 50})):
        plan = vlm.plan("What?", images, max_new_tokens=4, **bounds)
        found = vlm.generate("What?", images, **SHORT, **bounds).metrics
        assert plan.prompt_tokens == found.prompt_tokens
        assert plan.image_tokens == found.image_tokens == sum(image.tokens for image in plan.images)
        assert sum(image.tiles for image in plan.images) == found.tiles
        assert plan.kv_cache_bytes == found.kv_cache_bytes
        assert (
            plan.room
            == vlm.context_length - found.prompt_tokens
            == vlm.room("What?", images)
            - (0 if not bounds else plan.prompt_tokens - vlm.count_tokens("What?", [i.shape[:2] for i in images]))
        )
        assert plan == vlm.plan("What?", image_sizes=[i.shape[:2] for i in images], max_new_tokens=4, **bounds)
        assert (plan.fits, plan.max_new_tokens) == (True, 4)


def test_a_plan_tells_what_is_left_of_a_picture(vlm: VLM) -> None:
    (own,) = vlm.plan("What?", frame()).images
    assert (own.tokens, own.tiles, own.grid, own.pixels, own.settings) == (TILES, 5, (2, 2), (128, 128), {})
    (less,) = vlm.plan("What?", frame(), max_image_tokens=TILES - 1).images
    assert (less.tokens, less.tiles, less.pixels) == (FEW, 1, (64, 64))
    assert less.settings == {"longest_edge": 64}
    with pytest.raises(FrozenInstanceError):
        less.tokens = 1  # type: ignore[misc]


def test_a_plan_of_what_does_not_fit(vlm: VLM) -> None:
    plan = vlm.plan("What?", image_sizes=[(48, 64)] * 20)
    assert not plan.fits
    assert plan.room < 0
    assert plan.max_new_tokens == 0
    assert plan.memory.peak > plan.memory.base
    long = vlm.plan("What?", max_new_tokens=10**6)
    assert long.max_new_tokens == long.room == vlm.room("What?")
    messages = [{"role": "user", "content": [{"type": "image", "image": frame()}, {"type": "text", "text": "What?"}]}]
    assert vlm.plan(messages).image_tokens == TILES
    with pytest.raises(PromptError, match="1 image sizes"):
        vlm.plan([{"role": "user", "content": "What?"}], image_sizes=[(48, 64)])
    with pytest.raises(PromptError, match="takes no videos"):
        vlm.plan("What?", Video([frame()]))
    with pytest.raises(OptionError, match="max_new_tokens"):
        vlm.plan("What?", max_new_tokens=0)


def test_more_of_anything_is_planned_to_take_more(vlm: VLM) -> None:
    def peak(sizes: list[tuple[int, int]], new: int = 4, **bounds: int) -> int:
        return vlm.plan("What?", image_sizes=sizes, max_new_tokens=new, **bounds).memory.peak

    one = [(48, 64)]
    assert peak([]) < peak(one, max_image_tokens=FEW) < peak(one) < peak(one * 3) < peak(one * 3, 700)


def test_huge_pages_come_whole(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of 4 MB and more are written page by page, of 2 MB where the system gives such."""
    decoder, capacity = vlm.bundle.variant("decoder", "cpu"), 1 << 17
    whole, resident = [], []
    for huge in (False, True):
        monkeypatch.setattr("mllm_edge.runtime.planning.cache._huge_pages", lambda huge=huge: huge)
        allocated, written = cache_bytes(vlm.spec, decoder, capacity, 10)
        whole.append(allocated)
        resident.append(written)
    assert whole[0] == whole[1] == cache_bytes(vlm.spec, decoder, capacity, capacity)[1]
    assert resident[0] < resident[1] / 100
    assert cache_bytes(vlm.spec, decoder, 256, 256)[0] == vlm.generate("Hi", **SHORT).metrics.kv_cache_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from Linux's /proc")
def test_the_plan_of_a_fresh_process_is_near_its_peak(tiny_bundle: Path) -> None:
    code = (
        "import sys, numpy; from mllm_edge import VLM; from mllm_edge.runtime.machine.cpu import peak_rss\n"
        "vlm, image = VLM.load(sys.argv[1]), numpy.zeros((400, 600, 3), numpy.uint8)\n"
        "vlm.generate('What?', image, max_new_tokens=8, ignore_eos=True); peak = peak_rss()\n"
        "print(peak, vlm.plan('What?', image, max_new_tokens=8).memory.peak)"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_bundle], capture_output=True, text=True, check=True)
    measured, planned = map(int, done.stdout.split())
    assert planned == pytest.approx(measured, rel=0.1)


# ---------------------------------------------------------------- bounds in calls
def test_every_call_keeps_the_bound(vlm: VLM) -> None:
    bound = {"max_image_tokens": 50}
    assert vlm.generate("What?", frame(), **SHORT).metrics.image_tokens == TILES
    assert vlm.generate("What?", frame(), **SHORT, **bound).metrics.image_tokens == FEW
    assert vlm.count_tokens("What?", [(48, 64)]) - vlm.count_tokens("What?", [(48, 64)], **bound) > TILES - FEW - 1
    assert vlm.encode_image(frame(), **bound).shown.layout.tokens == FEW
    scored, trace = vlm.score_answers("What?", frame(), answers=["yes"], **bound), Trace()
    assert vlm.score_answers("What?", frame(), answers=["yes"], trace=trace)[0].logprob != scored[0].logprob
    text = vlm.processor.process("What?", frame()).text
    assert vlm.generate(text, frame(), raw=True, **SHORT, **bound).metrics.image_tokens == FEW


def test_a_bound_for_all_calls(tiny_bundle: Path) -> None:
    with VLM.load(tiny_bundle, max_image_tokens=50) as vlm:
        assert vlm.generate("What?", frame(), **SHORT).metrics.image_tokens == FEW
        assert vlm.generate("What?", frame(), max_image_tokens=TILES, **SHORT).metrics.image_tokens == TILES
        seen = vlm.encode_image(frame(), max_image_tokens=TILES)
        assert vlm.generate("What?", seen, **SHORT).metrics.image_tokens == TILES, "as it was encoded"


def test_one_picture_within_two_bounds_is_two(vlm: VLM) -> None:
    """Neither its features nor what the decoder holds of one are taken for the other's."""
    bound, reuse = {"max_image_tokens": 50}, {"reuse": True}
    with VLM(vlm.bundle, OnnxRuntimeCpu()) as plain:
        expected = [plain.generate("What?", frame(), **SHORT, **b).token_ids for b in ({}, bound)]
        assert expected[0] != expected[1]
    for i in (0, 1, 0, 1):
        found = vlm.generate("What?", frame(), **SHORT, **reuse, **(bound if i else {}))
        assert found.token_ids == expected[i]
    trace = Trace()
    vlm.generate("What?", frame(), trace=trace, **SHORT, **bound)
    assert trace.runs("vision_encoder") == 0, "its features are kept"
    looser = vlm.processor.process("What?", frame()).keys, vlm.processor.process("What?", frame()).keys
    np.testing.assert_array_equal(*looser)


def test_an_encoded_picture_keeps_its_bound(vlm: VLM, tmp_path: Path) -> None:
    seen = vlm.encode_image(frame(), max_image_tokens=50)
    vlm.save_image(seen, tmp_path / "image.npz")
    loaded = vlm.load_image(tmp_path / "image.npz")
    assert loaded.shown.layout.tokens == FEW
    assert vlm.plan("What?", loaded).image_tokens == FEW
    expected = vlm.generate("What?", frame(), **SHORT, max_image_tokens=50).token_ids
    assert vlm.generate("What?", loaded, **SHORT).token_ids == expected
    whole = vlm.encode_image(frame())
    with pytest.raises(OptionError, match=f"has {TILES} tokens, and max_image_tokens is 50"):
        vlm.generate("What?", whole, max_image_tokens=50)
    assert vlm.generate("What?", whole, **SHORT).metrics.image_tokens == TILES


@pytest.mark.xdist_group("bundle-emu3")
def test_several_together_keep_the_bound_they_were_encoded_with(floats: Callable[[str], Path]) -> None:
    """Emu3 sees pictures of one prompt on one canvas, so encoded ones are looked at again."""
    with VLM(Bundle.load(floats("emu3")), OnnxRuntimeCpu()) as vlm:
        small = [vlm.encode_image(frame(seed, 200, 300), max_image_tokens=30) for seed in (1, 2)]
        assert all(image.shown.layout.tokens <= 30 for image in small)
        assert vlm.processor.process("Which?", small).layouts[0].tokens <= 30


def test_a_turns_bound_is_for_its_own_pictures(vlm: VLM) -> None:
    chat = vlm.chat()
    chat.attach(frame())
    (*_, first) = chat.ask("What?", **SHORT)
    chat.attach(frame(2))
    (*_, second) = chat.ask("And this?", max_image_tokens=50, **SHORT)
    (*_, third) = chat.ask("Sure?", **SHORT)
    counts = [chunk.result.metrics.image_tokens for chunk in (first, second, third)]
    assert counts == [TILES, TILES + FEW, TILES + FEW]
    assert third.result is not None
    assert third.result.metrics.reused > TILES + FEW


@pytest.mark.parametrize(
    ("bounds", "word"),
    [
        ({"max_image_tokens": 15}, "16 tokens at least"),
        ({"max_image_tokens": 0}, "a whole number from 1"),
        ({"max_image_tokens": 2.0}, "a whole number from 1"),
        ({"min_image_tokens": 81}, "80 tokens at most"),
        ({"max_image_tokens": 50, "min_image_tokens": 51}, "from 1 to 50"),
        ({"min_image_tokens": "16"}, "a whole number"),
    ],
)
def test_bounds_that_cannot_be(vlm: VLM, bounds: dict[str, Any], word: str) -> None:
    for call in (vlm.generate, vlm.plan):
        with pytest.raises(OptionError, match=word):
            call("What?", frame(), **bounds)
    with pytest.raises(OptionError, match=word):
        vlm.encode_image(frame(), **bounds)
    assert vlm.generate("What?", frame(), **SHORT).metrics.image_tokens == TILES


def test_of_several_pictures_the_one_that_is_too_large_is_named(vlm: VLM) -> None:
    small = vlm.encode_image(frame(), max_image_tokens=FEW)
    with pytest.raises(OptionError, match=r"image 2 of 2: .* 16 tokens at least"):
        vlm.generate("What?", [small, frame()], max_image_tokens=15)


def test_a_large_jpeg_is_decoded_for_what_is_left(tiny_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    file = tmp_path / "photo.jpg"
    Image.fromarray(np.full((600, 800, 3), 90, np.uint8)).save(file, quality=95)
    with VLM.load(tiny_bundle, fast_jpeg=True) as vlm:
        (shown,) = vlm.processor.process("What?", file).shown
        (less,) = vlm.processor.process(
            "What?", file, budget=vlm.encode_image(file, max_image_tokens=FEW).shown.budget
        ).shown
        assert shown.size == less.size == (600, 800)
        assert (shown.layout.tokens, less.layout.tokens) == (TILES, FEW)


# ---------------------------------------------------------------- the command line
def test_inspect_plans_without_opening(tiny_bundle: Path, vlm: VLM) -> None:
    def run(*options: str) -> Any:
        result = CliRunner().invoke(main, ["inspect", str(tiny_bundle), "--plan", *options])
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)["plan"] if "--json" in options else result.stdout

    plan = run("--image-size", "48x64", "--images", "2", "--max-image-tokens", "50", "--json")
    own = vlm.plan("Describe the image.", image_sizes=[(48, 64)] * 2, max_image_tokens=50)
    assert plan["prompt_tokens"] == own.prompt_tokens
    assert [image["tokens"] for image in plan["images"]] == [FEW] * 2
    assert plan["kv_cache_bytes"] == own.kv_cache_bytes
    assert plan["memory"]["weights"] == own.memory.weights
    assert plan["memory"]["peak"] > plan["memory"]["base"]
    assert run("--context", "700", "--json")["room"] == run("--context", "700", "--json")["max_new_tokens"]
    text = run("--image-size", "48x64", "--max-image-tokens", "50")
    assert "an image of 48 x 64 px: 16 tokens, 1 tiles (1 x 1), 64 x 64 px; longest_edge 64" in text
    assert "peak" in text
    assert "of these for images          0" in run("--images", "0")


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--images", "2"], 2, "--images is of a --plan"),
        (["--plan", "--image", "a.png"], 2, "--image-size"),
        (["--plan", "--context", "5000"], 1, "more than the model's context of 1024"),
        (["--plan", "--max-image-tokens", "3"], 2, "16 tokens at least"),
        (["--image-size", "48x64", "--max-image-tokens", "3"], 2, "16 tokens at least"),
    ],
)
def test_plans_that_cannot_be(tiny_bundle: Path, options: list[str], code: int, word: str) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tiny_bundle), *options])
    assert result.exit_code == code
    assert word in result.stderr


def test_run_and_profile_keep_the_bound(tiny_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(frame()).save(tmp_path / "frame.png")
    image, bound = ["--image", str(tmp_path / "frame.png")], ["--max-image-tokens", "50"]
    done = CliRunner().invoke(main, ["run", str(tiny_bundle), "What?", *image, *bound, "-n", "2", "--json"])
    assert json.loads(done.stdout)["metrics"]["image_tokens"] == FEW
    done = CliRunner().invoke(main, ["run", str(tiny_bundle), "What?", *image, "--max-image-tokens", "3"])
    assert done.exit_code == 2
    assert "16 tokens at least" in done.stderr
    counts = ["-n", "2", "--runs", "1", "--warmup", "0", "--iterations", "1", "--no-roofline", "--json"]
    done = CliRunner().invoke(main, ["profile", str(tiny_bundle), *image, *bound, *counts])
    setting = json.loads(done.stdout)["setting"]
    assert (setting["image_tokens"], setting["max_image_tokens"], setting["min_image_tokens"]) == (FEW, 50, None)
