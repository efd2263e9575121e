"""A model whose decoder has recurrent state, from the checkpoint to the answer: a LLaVA around LFM2."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mllm_edge.bundle import Bundle
from mllm_edge.cli import main
from mllm_edge.errors import OptionError
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import quantize
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.budget import memory
from mllm_edge.runtime.vlm import VLM
from mllm_edge.spec import StateSpec
from tests.export.test_int8_cache import LIMIT, ONLY_CACHE
from tests.export.test_quantize import samples
from tests.tiny import save_tiny_llava

LFM2 = {
    "model_type": "lfm2",
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "block_multiple_of": 32,
}
TARGETS = ("cpu", "cuda", "tensorrt", "tensorrt-10.3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava-lfm2")
    save_tiny_llava(folder, text=LFM2)
    return folder


@pytest.fixture(scope="module")
def float_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("float") / "fp16"
    export(str(checkpoint), out, targets=TARGETS, recipe_name="fp16")
    return out


def logits(bundle: Bundle, target: str) -> np.ndarray:
    """Behind a prompt with an image and at each of a few tokens after it."""
    sample = samples()[1]
    with VLM(bundle, OnnxRuntimeCpu(target=target)) as vlm:
        prompt = vlm.encode(vlm.processor.process(sample["prompt"], sample["images"]))
        return vlm.steps(prompt, np.array([70, 71, 65, 80]))


def test_the_export_is_the_source_model(checkpoint: Path, tmp_path: Path) -> None:
    export(str(checkpoint), tmp_path / "out", targets=("cpu",), recipe_name="fp32")
    parity = Bundle.load(tmp_path / "out").manifest.parity
    assert parity["errors"]["prefill_logits"] < 1e-5
    assert parity["errors"]["decode_logits"] < 1e-5
    assert parity["greedy_agreement"] == 1.0


def test_what_the_bundle_says(float_bundle: Path) -> None:
    bundle = Bundle.load(float_bundle)
    state = bundle.manifest.model.state
    assert state == (StateSpec("growing", (0,), (2, 16)), StateSpec("recurrent", (0, 1), (2, 64)))
    for one in memory(bundle, 100):
        size = 4 if one.target == "cpu" else 2
        assert one.kv_cache == size * (2 * 100 * 2 * 16 + 2 * 2 * 64)
    told = CliRunner().invoke(main, ["inspect", str(float_bundle)]).output
    assert "1 layer x 2 heads x 16, keys and values (growing), 2 layers x 2 x 64 (recurrent)" in told
    assert "past_conv.0 … past_conv.1 (2) float32 [batch, 2, 64]" in told
    listed = json.loads(CliRunner().invoke(main, ["inspect", str(float_bundle), "--json"]).output)
    assert listed["manifest"]["model"]["state"][1]["layers"] == [0, 1]


def test_answers_one_after_the_other(float_bundle: Path) -> None:
    """Nothing of one answer is left for the next; what cannot be taken back is not guessed."""
    with VLM.load(float_bundle) as vlm:
        ask: Any = lambda text, **options: vlm.generate(text, max_new_tokens=8, ignore_eos=True, **options).text  # noqa: E731
        first, second = ask("What is on the belt?"), ask("Count the boxes.")
        assert [ask("What is on the belt?"), ask("Count the boxes.")] == [first, second]
        with pytest.raises(OptionError, match=r"speculation: this model has layers with a recurrent state"):
            ask("Hi", speculation=3)
        prompts = [vlm.encode(vlm.processor.process(text)) for text in ("Hi", "What is on the belt?", "Ho")]
        together = vlm.greedy(prompts, 6, stop_ids=())
        for prompt, answer in zip(prompts, together, strict=True):
            np.testing.assert_array_equal(answer, vlm.greedy([prompt], 6, stop_ids=())[0])


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_calibrated_weights(recipe: str, float_bundle: Path, tmp_path: Path) -> None:
    quantize(float_bundle, tmp_path / "out", recipe=recipe, data=samples())
    bundle = Bundle.load(tmp_path / "out")
    layers = bundle.manifest.accuracy["layers"]["decoder"]
    wanted = {f"layers.{i}.conv_{part}_proj" for i in (0, 2) for part in ("b", "c", "x", "out")}
    assert set(layers) >= wanted
    exact, found = (logits(b, "cpu") for b in (Bundle.load(float_bundle), bundle))
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.9
    for target in TARGETS[1:]:
        assert np.abs(logits(bundle, target) - found).max() <= 0.15 * np.ptp(found)


def test_an_int8_cache_beside_a_float_state(checkpoint: Path, tmp_path: Path) -> None:
    targets = ("cpu", "tensorrt-10.3")
    export(str(checkpoint), tmp_path / "fp16", targets=targets, recipe_name="fp16", verify_mode="off")
    quantize(tmp_path / "fp16", tmp_path / "int8", recipe=ONLY_CACHE, data=samples())
    exact, rounded = (Bundle.load(tmp_path / name) for name in ("fp16", "int8"))
    for target, kind in zip(targets, ("float32", "float16"), strict=True):
        types = {t.name: t.dtype for t in rounded.variant("decoder", target).inputs}
        assert (types["past_key_values.0.key"], types["past_conv.1"]) == ("int8", kind)
        found, expected = logits(rounded, target), logits(exact, target)
        assert 0 < np.abs(found - expected).max() <= LIMIT * np.ptp(expected)
