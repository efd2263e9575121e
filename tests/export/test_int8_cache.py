"""A decoder whose cache is int8 with calibrated scales, beside the same decoder with a float cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.int8_cache import MINIMUM, largest
from mllm_edge.calibration.recipes import Recipe
from mllm_edge.errors import RecipeError
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import quantize
from mllm_edge.graph.precision import FLOAT16
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.vlm import VLM
from tests.export.test_quantize import engine_bytes, samples
from tests.families.row import families_of

TARGETS = ("cpu", "tensorrt-10.3")
ONLY_CACHE = Recipe("int8-cache", FLOAT16, FLOAT16, FLOAT16, FLOAT16, kv="int8")
# Of the logits' range; seen: 0.006 to 0.035. Keys and values are rounded to 1/254 of their channel's; a wrong scale
# gives errors near 1.
LIMIT = 0.05


@pytest.fixture(scope="module", params=families_of("int8_cache"))
def bundles(
    request: pytest.FixtureRequest, saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Bundle]:
    folder = tmp_path_factory.mktemp(request.param)
    export(str(saved(request.param)), folder / "fp16", targets=TARGETS, recipe_name="fp16", verify_mode="off")
    quantize(folder / "fp16", folder / "int8", recipe=ONLY_CACHE, data=samples())
    return Bundle.load(folder / "fp16"), Bundle.load(folder / "int8")


def opened(bundle: Bundle, target: str) -> VLM:
    return VLM(bundle, OnnxRuntimeCpu(target=target))


def prompt_of(vlm: VLM, i: int = 1) -> Any:
    sample = samples()[i]
    prompt = vlm.processor.process(sample["prompt"], sample["images"])
    return vlm.encode(prompt)


TOKENS = [70, 71, 65, 80, 90, 66, 77, 75]


def steps(vlm: VLM) -> list[np.ndarray]:
    """Logits of a prompt in two chunks and of a few tokens behind it."""
    prompt = prompt_of(vlm)
    vlm.decoder.start(prompt, 16)
    parts = slice(0, len(prompt) - 5), slice(len(prompt) - 5, None)
    logits = [vlm.decoder.forward(prompt.piece(part)).copy() for part in parts]
    return logits + [vlm.decoder.forward(vlm.embed(np.array([token]))).copy() for token in TOKENS]


@pytest.mark.parametrize("target", TARGETS)
def test_steps_agree_with_a_float_cache(bundles: tuple[Bundle, Bundle], target: str) -> None:
    found = []
    for bundle in bundles:
        with opened(bundle, target) as vlm:
            found.append(steps(vlm))
    worst = max(float(np.abs(a - b).max() / np.ptp(a)) for a, b in zip(*found, strict=True))
    assert 0 < worst <= LIMIT


@pytest.mark.parametrize("target", TARGETS)
def test_little_of_a_longer_text_is_clipped(bundles: tuple[Bundle, Bundle], target: str) -> None:
    with opened(bundles[1], target) as vlm:
        vlm.decoder.reset(1000)
        vlm.decoder.forward(vlm.embed(np.tile(TOKENS, 125)))
        assert vlm.decoder.cache is not None
        codes = np.concatenate([rows.ravel() for rows in vlm.decoder.cache.snapshot().rows]).astype(int)
    assert (np.abs(codes) == 127).mean() < 1e-3


def test_keys_that_are_turned_together_share_a_scale(bundles: tuple[Bundle, Bundle]) -> None:
    graph = onnx.load(bundles[1].path / bundles[1].variant("decoder", "cpu").file).graph
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith(".scale")}
    turned = bundles[1].manifest.model.positions.ropes[0].dim  # the others of a head have scales of their own
    for layer in bundles[1].manifest.model.state[0].layers:
        first, second = np.split(scales[f"present.{layer}.key.scale"][..., :turned], 2, axis=-1)
        np.testing.assert_array_equal(first, second)
        first, second = np.split(scales[f"present.{layer}.value.scale"], 2, axis=-1)
        assert (first != second).all()


@pytest.mark.parametrize(("target", "part"), [("cpu", 4), ("tensorrt-10.3", 2)])
def test_cache_takes_a_part_of_the_bytes(bundles: tuple[Bundle, Bundle], target: str, part: int) -> None:
    sizes = []
    for bundle in bundles:
        with opened(bundle, target) as vlm:
            sizes.append(vlm.decoder.reset(64).nbytes)
    assert sizes[0] == part * sizes[1]
    variant = bundles[1].variant("decoder", target)
    caches = [t for t in (*variant.inputs, *variant.outputs) if t.name.startswith(("past_key_values.", "present."))]
    assert {t.dtype for t in caches} == {"int8"}
    assert len(caches) == 4 * len(bundles[1].manifest.model.state[0].layers)
    if target == "cpu":
        assert variant.minimum["onnxruntime"] == MINIMUM["onnxruntime"]


@pytest.mark.parametrize("target", TARGETS)
def test_truncated_and_restored_caches_go_on_as_before(bundles: tuple[Bundle, Bundle], target: str) -> None:
    with opened(bundles[1], target) as vlm:
        expected = steps(vlm)
        cache = vlm.decoder.cache
        assert cache is not None
        kept, length = cache.snapshot(), cache.length
        assert {rows.dtype for rows in kept.rows} == {np.dtype(np.int8)}
        cache.truncate(length - 3)
        again = [vlm.decoder.forward(vlm.embed(np.array([token]))).copy() for token in TOKENS[-3:]]
        np.testing.assert_allclose(again, expected[-3:], atol=1e-3 * np.ptp(expected[0]))
        after = vlm.decoder.forward(vlm.embed(np.array([99]))).copy()
        cache.restore(kept)
        np.testing.assert_array_equal(vlm.decoder.forward(vlm.embed(np.array([99]))), after)


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_is_its_sequences(bundles: tuple[Bundle, Bundle], target: str) -> None:
    with opened(bundles[1], target) as vlm:
        texts = [vlm.embed(np.array(ids)) for ids in ([70, 71, 72, 73], [80, 66])]
        alone = []
        for text in texts:
            vlm.decoder.reset(32)
            alone.append([vlm.decoder.forward(text).copy(), vlm.decoder.forward(vlm.embed(np.array([65]))).copy()])
        vlm.decoder.reset(32, batch=2)
        together = [vlm.decoder.forward_batch(texts).copy()]
        together.append(vlm.decoder.forward_batch([vlm.embed(np.array([65]))] * 2).copy())
    for b, rows in enumerate(alone):
        for i, row in enumerate(rows):
            assert np.abs(together[i][b] - row).max() <= 1e-2 * np.ptp(row)


def test_tensorrt_builds_the_decoder(bundles: tuple[Bundle, Bundle]) -> None:
    assert engine_bytes(bundles[1], "decoder", "tensorrt-10.3", ["SM75", "SM80", "SM86", "SM89", "SM120"]) > 0


def test_generation_says_the_same(bundles: tuple[Bundle, Bundle]) -> None:
    proof = bundles[1].manifest.accuracy
    assert proof["top1"] >= 0.9
    assert proof["kl"] < 5e-3  # seen: 8e-4
    assert bundles[1].manifest.recipe["kv"] == "int8"


@pytest.mark.parametrize("target", TARGETS)
def test_speculation_changes_no_token(bundles: tuple[Bundle, Bundle], target: str) -> None:
    with opened(bundles[1], target) as vlm:
        options: dict[str, Any] = {"max_new_tokens": 32, "ignore_eos": True, "frequency_penalty": -1.0}
        sample = samples()[1]
        expected = vlm.generate(sample["prompt"], sample["images"], **options)
        for speculation in (1, 8):
            found = vlm.generate(sample["prompt"], sample["images"], speculation=speculation, **options)
            assert found.token_ids == expected.token_ids
            assert found.metrics.accepted > 0


def test_caches_in_place_are_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export(str(tiny_checkpoint), tmp_path / "fp16", targets=["tensorrt"], recipe_name="fp16", verify_mode="off")
    with pytest.raises(
        RecipeError, match=r"recipe int8-cache: kv is int8, and target tensorrt updates its cache in place"
    ):
        quantize(tmp_path / "fp16", tmp_path / "out", recipe=ONLY_CACHE, data=samples())
    assert not (tmp_path / "out").exists()


def test_four_bits_with_an_int8_cache(bundles: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('base = "int4"\nkv = "int8"')
    report = quantize(bundles[0].path, tmp_path / "out", recipe=str(tmp_path / "r.toml"), data=samples())
    plain = quantize(bundles[0].path, tmp_path / "plain", recipe="int4", data=samples())
    assert report.proof.kl <= 1.5 * plain.proof.kl + 0.01


def test_ranges_of_keys_hold_at_every_position() -> None:
    random = np.random.default_rng(0)
    keys = random.standard_normal((1, 2, 6, 8)).astype(np.float32)
    found = largest(keys, [4])
    np.testing.assert_array_equal(found[:, 4:], np.abs(keys[0, ..., 4:]).max(axis=1))
    reached = np.zeros((2, 4), np.float32)
    for angle in np.linspace(0, 2 * np.pi, 1000):
        first, second, cos, sin = keys[0, ..., :2], keys[0, ..., 2:4], np.cos(angle), np.sin(angle)
        turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        reached = np.maximum(reached, np.abs(turned).max(axis=1))
    np.testing.assert_allclose(found[:, :4], reached, rtol=1e-4)
    np.testing.assert_array_equal(largest(keys), np.abs(keys[0]).max(axis=1))
