"""Qwen3-VL: features behind the decoder's first layers, in conversations, in chunks and behind a prompt."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_edge import VLM, Video
from mllm_edge.bundle import Bundle
from mllm_edge.calibration.recipes import Recipe
from mllm_edge.errors import PromptError
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import quantize
from mllm_edge.graph.precision import Precision
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.limits import PREFILL_CHUNK
from mllm_edge.runtime.profiling.memory import predict_activations
from mllm_edge.runtime.prompt.tokenizer import ChatTemplate
from tests.export.test_adapters import train
from tests.export.test_quantize import samples
from tests.families.parity import FLOAT32_TARGETS, Exported, check_messages, export_tiny, make_image
from tests.families.test_qwen2_vl import CONVERSATIONS
from tests.families.test_recurrent import TARGETS, logits
from tests.tiny_qwen3 import QWEN3_TEMPLATE, save_tiny_qwen3_vl


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("plain"), save_tiny_qwen3_vl)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(plain: Exported, name: str) -> None:
    messages, sizes = CONVERSATIONS[name]
    check_messages(plain, messages, sizes)


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
def test_features_of_the_towers_layers(plain: Exported, target: str) -> None:
    """They stand at the images' tokens, in the order of the images, and zeros elsewhere."""
    images, vlm = [make_image(100, 150, 0), make_image(70, 30, 1)], plain.vlm(target)
    prompt = vlm.processor.process("Compare.", images)
    found = vlm.encode(prompt)
    inputs = plain.processor(text=prompt.text, images=[images], return_tensors="pt")
    with torch.no_grad():
        settings = {"return_dict": True}
        seen = plain.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], **settings)
    assert sorted(found.per_token) == ["deepstack.0", "deepstack.1"]
    for k, expected in enumerate(seen.deepstack_features):
        rows, wanted = found.per_token[f"deepstack.{k}"], torch.cat(list(expected)).numpy()
        np.testing.assert_allclose(rows[prompt.image_positions], wanted, atol=1e-4 * np.abs(wanted).max())
        assert not np.delete(rows, prompt.image_positions, axis=0).any()


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
def test_they_count_and_only_where_they_stand(plain: Exported, target: str) -> None:
    """Chunks that cut an image, a snapshot, tokens forgotten within the image, and text behind all of it."""
    vlm = plain.vlm(target)
    prompt = vlm.encode(vlm.processor.process("What is it?", [make_image(100, 150, 0)]))
    behind = vlm.embed(np.array([5, 6]))
    cut = int(np.flatnonzero(prompt.per_token["deepstack.0"].any(axis=1))[3])

    def rest(start: int) -> np.ndarray:
        vlm.decoder.forward(prompt.piece(slice(start, None)), prompt.end)
        return np.stack([vlm.decoder.forward(behind[:1]).copy(), vlm.decoder.forward(behind[1:]).copy()])

    vlm.decoder.start(prompt, 8)
    whole = rest(0)
    spread = np.ptp(whole)
    cache = vlm.decoder.start(prompt, 8)
    vlm.decoder.forward(prompt.piece(slice(cut)), prompt.end)
    snapshot = vlm.decoder.snapshot()
    assert np.abs(rest(cut) - whole).max() <= 1e-4 * spread
    cache.truncate(cut)
    assert np.abs(rest(cut) - whole).max() <= 1e-4 * spread
    vlm.decoder.restore(snapshot)
    assert np.abs(rest(cut) - whole).max() <= 1e-4 * spread
    # A text of the same length, which is run behind a prompt with an image, has none of it.
    text = Encoded(vlm.embed(np.arange(len(prompt))))
    vlm.decoder.start(text, 8)
    first = vlm.decoder.forward(text).copy()
    without = Encoded(prompt.embeds, prompt.positions)
    vlm.decoder.start(without, 8)
    vlm.decoder.forward(without, prompt.end)
    assert np.abs(vlm.decoder.forward(behind[:1]) - whole[0]).max() > 1e-2 * spread
    vlm.decoder.start(text, 8)
    np.testing.assert_array_equal(vlm.decoder.forward(text), first)


def test_a_prompt_fed_in_pieces_gives_the_same_answer(plain: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [make_image(100, 150, 0), make_image(70, 30, 1)]
    with VLM(plain.vlm("cpu").bundle, OnnxRuntimeCpu()) as vlm:
        whole = vlm.generate("Compare.", images, max_new_tokens=16)
        monkeypatch.setattr("mllm_edge.runtime.decode.generate.PREFILL_CHUNK", 7)
        assert vlm.generate("Compare.", images, max_new_tokens=16).token_ids == whole.token_ids


def test_memory_is_predicted_with_them(plain: Exported) -> None:
    """As many rows as the prompt has tokens, from each of the two layers."""
    bundle = plain.vlm("cpu").bundle
    few, many = (predict_activations(bundle, "cpu", tokens, []) for tokens in (PREFILL_CHUNK, PREFILL_CHUNK + 100))
    assert many - few == 2 * 100 * 64 * 4


# A layer of experts and a dense one.
EXPERTS: dict[str, Any] = {"model_type": "qwen3_vl_moe", "text": {"mlp_only_layers": [1]}}


def test_adapters_are_merged_on_the_way(tmp_path: Path) -> None:
    model = save_tiny_qwen3_vl(tmp_path / "checkpoint", **EXPERTS)
    adapter = train(model, tmp_path / "adapter", target_modules=["q_proj", "o_proj", "qkv", "linear_fc1"], r=4)
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name="fp32", adapters=[adapter])
    assert report.parity["greedy_agreement"] == 1.0
    export(str(tmp_path / "checkpoint"), tmp_path / "plain", recipe_name="fp32", verify_mode="off")
    for graph in ("vision_encoder", "connector", "decoder"):
        found, before = ((tmp_path / name / f"{graph}.onnx.data").read_bytes() for name in ("out", "plain"))
        assert found != before


def test_factors_of_layers_alone_change_nothing(tmp_path: Path) -> None:
    """Folded into norms between which something is added, and into those that experts and their router read."""
    float_bundle = export_tiny(tmp_path, save_tiny_qwen3_vl, **EXPERTS).bundle
    part = Precision("float32", method="smoothquant")
    quantize(float_bundle, tmp_path / "out", recipe=Recipe("factors", part, part, part, part), data=samples())
    for target in FLOAT32_TARGETS:
        before, found = (logits(Bundle.load(folder), target) for folder in (float_bundle, tmp_path / "out"))
        assert np.abs(found - before).max() <= 1e-3 * np.ptp(before)
    layers = Bundle.load(tmp_path / "out").manifest.accuracy["layers"]
    assert {f"deepstack_merger_list.{k}.linear_fc1" for k in range(2)} <= set(layers["vision_encoder"])


@pytest.mark.parametrize(("config", "recipe"), [({}, "int4"), (EXPERTS, "int8")], ids=["dense", "experts"])
def test_calibrated_weights(tmp_path: Path, config: dict[str, Any], recipe: str) -> None:
    """More bits for experts: what is a little off chooses others."""
    save_tiny_qwen3_vl(tmp_path / "checkpoint", **config)
    export(str(tmp_path / "checkpoint"), tmp_path / "fp16", targets=TARGETS, recipe_name="fp16", verify_mode="off")
    quantize(tmp_path / "fp16", tmp_path / "out", recipe=recipe, data=samples())
    exact, found = (logits(Bundle.load(tmp_path / name), "cpu") for name in ("fp16", "out"))
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.95
    for target in TARGETS[1:]:
        assert np.abs(logits(Bundle.load(tmp_path / "out"), target) - found).max() <= 0.15 * np.ptp(found)


def test_videos_are_refused_by_name(plain: Exported) -> None:
    frames = Video([make_image(32, 32, seed) for seed in range(4)])
    with pytest.raises(PromptError, match="this bundle takes no videos, and got 1"):
        plain.vlm("cpu").generate("What happens?", [frames])


def test_own_template_renders_as_the_checkpoints() -> None:
    from mllm_edge.export.families.qwen_images import TURNS

    own, stored = (ChatTemplate(template, {}) for template in (TURNS, QWEN3_TEMPLATE))
    for messages, _ in CONVERSATIONS.values():
        for prompt in (messages, [{"role": "user", "content": "Hello."}]):
            for opens in (True, False):
                assert own.render(prompt, opens) == stored.render(prompt, opens)
