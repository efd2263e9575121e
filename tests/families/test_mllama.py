"""Llama 3.2 Vision: what tokens see of images in conversations, the answers of `generate`, and what images cost."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.cli import main
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.compare import compare_with_source
from mllm_edge.export.family import family_for
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import quantize
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.budget import memory
from mllm_edge.runtime.onnx_file.cost import graph_cost, read_graph
from mllm_edge.runtime.planning.shapes import crossed_bytes
from mllm_edge.runtime.profiling.memory import predict_activations
from mllm_edge.runtime.profiling.roofline import MachineLimits, Workload, roofline
from mllm_edge.runtime.prompt.layout import layout_of
from tests.export.test_adapters import train
from tests.export.test_quantize import samples
from tests.families.parity import FLOAT32_TARGETS, Exported, check_messages, export_tiny, make_image
from tests.families.test_qwen2_vl import CONVERSATIONS, says
from tests.families.test_recurrent import TARGETS, logits
from tests.tiny_mllama import MLLAMA_TEMPLATE, save_tiny_mllama

PATCHES, TILES, LAYERS = 10, 4, 2  # of a tile with its class token, of an image, with cross-attention
TALKS = {
    **CONVERSATIONS,
    "some_side_by_side": (
        [
            says("user", "Look:", None, None, "and", None, "then", None, None),
            says("assistant", "Well."),
            says("user", "So?"),
        ],
        [(16, 16), (90, 20), (20, 90), (50, 50), (3, 9)],
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("plain"), save_tiny_mllama)


@pytest.mark.parametrize("name", TALKS)
def test_conversations(plain: Exported, name: str) -> None:
    messages, sizes = TALKS[name]
    check_messages(plain, messages, sizes)


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
def test_answers_are_those_of_generate(plain: Exported, target: str) -> None:
    processor = family_for(open_source(str(plain.checkpoint))).load_processor(open_source(str(plain.checkpoint)))
    for messages, sizes in TALKS.values():
        images = [make_image(height, width, seed) for seed, (height, width) in enumerate(sizes)]
        rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=rendered, images=images or None, return_tensors="pt")
        with torch.no_grad():
            found = plain.model.generate(**inputs, do_sample=False, min_new_tokens=16, max_new_tokens=16)
        result = plain.vlm(target).generate(messages, images, max_new_tokens=16, ignore_eos=True)
        assert list(result.token_ids) == found[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_prompt_fed_in_pieces_gives_the_same_answer(plain: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [make_image(100, 150, 0), make_image(70, 30, 1)]
    with VLM.load(plain.bundle) as vlm:
        whole = vlm.generate("Compare.", images, max_new_tokens=16)
        guessed = vlm.generate("Compare.", images, max_new_tokens=16, speculation=4)
        monkeypatch.setattr("mllm_edge.runtime.decode.generate.PREFILL_CHUNK", 7)
        pieces = vlm.generate("Compare.", images, max_new_tokens=16)
    assert whole.token_ids == pieces.token_ids == guessed.token_ids


def test_images_are_forgotten_with_their_prompt(plain: Exported) -> None:
    """In single answers, and in several at once."""
    with VLM.load(plain.bundle) as vlm:
        image = make_image(90, 60, 0)
        alone, seen = vlm.generate("Hello.", max_new_tokens=8), vlm.generate("Hello.", image, max_new_tokens=8)
        assert vlm.generate("Hello.", max_new_tokens=8).token_ids == alone.token_ids
        assert vlm.generate("Hello.", image, max_new_tokens=8).token_ids == seen.token_ids
        prompts = [vlm.encode(vlm.processor.process(text)) for text in ("Hello.", "What is it?")]
        expected = [vlm.greedy([prompt], 8, stop_ids=())[0] for prompt in prompts]
        vlm.generate("Hello.", image, max_new_tokens=8)
        for answer, wanted in zip(vlm.greedy(prompts, 8, stop_ids=()), expected, strict=True):
            np.testing.assert_array_equal(answer, wanted)


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
def test_a_snapshot_of_several_sequences(plain: Exported, target: str) -> None:
    """Each goes on with what it sees, and one of text with nothing."""
    vlm = plain.vlm(target)
    images = [make_image(50, 71, 0), make_image(64, 33, 1)]
    asked = [vlm.encode(vlm.processor.process("What?", images[:n])) for n in (1, 0, 2)]
    tokens = [vlm.embed(np.array([token])) for token in (70, 71, 72)]
    vlm.decoder.reset(128, batch=3)
    vlm.decoder.forward_batch(asked)
    snapshot = vlm.decoder.snapshot()
    first = vlm.decoder.forward_batch(tokens).copy()
    vlm.decoder.reset(128, batch=3)
    vlm.decoder.restore(snapshot)
    np.testing.assert_array_equal(vlm.decoder.forward_batch(tokens), first)


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
def test_compare_with_the_checkpoint(plain: Exported, target: str) -> None:
    found = compare_with_source(plain.checkpoint, plain.bundle, target=target)
    assert found.greedy_agreement == 1
    assert set(found.errors) == {"vision_encoder", "connector", "prefill_logits", "decode_logits"}
    assert max(found.errors.values()) <= 1e-3


def test_what_images_cost(plain: Exported) -> None:
    """Keys and values of all tiles, those that are missing too, are kept and read in every step."""
    bundle, image = Bundle.load(plain.bundle), make_image(50, 130, 0)
    variants = {name: bundle.variant(name, "cpu") for name in bundle.manifest.components}
    model = bundle.manifest.model
    layouts = [layout_of(model.image, 50, 130, 2)] * 2
    features = 2 * TILES * PATCHES
    assert crossed_bytes(model, variants, layouts) == 4 * 2 * LAYERS * 2 * 16 * features
    with VLM.load(plain.bundle) as vlm:
        one, none = (vlm.generate("Hi", shown, max_new_tokens=2).metrics for shown in ([image], []))
        kept = 4 * 2 * LAYERS * 2 * 16 * TILES * PATCHES
        assert one.kv_cache_bytes - none.kv_cache_bytes == kept
    (needs,) = [found for found in memory(bundle, 64) if found.target == "cpu"]
    assert (needs.cross_kv, needs.resident) == (kept, sum(needs.weights.values()) + needs.kv_cache + kept)
    assert (
        "keys and values of an image"
        in CliRunner().invoke(main, ["inspect", str(plain.bundle), "--context", "64"]).output
    )
    with VLM.load(plain.bundle) as vlm:
        assert vlm.image_features(vlm.processor.process("Hi", [image])).shape == (TILES * PATCHES, 64)
    assert (one.image_tokens, one.tiles) == (1, 3)
    assert predict_activations(bundle, "cpu", 30, layouts) > predict_activations(bundle, "cpu", 30, layouts[:1])
    limits = MachineLimits(1e9, {"float32": 1e9})
    seconds = dict.fromkeys(("vision_encoder", "connector", "cross_kv", "prefill", "decode"), 1.0)
    seen, blind = (
        roofline(bundle, variants, seconds, Workload(30, 2, tuple(shown)), limits) for shown in (layouts, [])
    )
    bytes_of, flops_of = ({s.stage: getattr(s, name) for s in seen} for name in ("bytes", "flops"))
    assert set(bytes_of) == set(seconds)
    assert flops_of["cross_kv"] == 2 * features * LAYERS * 64 * 2 * 32
    before = {s.stage: s for s in blind}
    assert bytes_of["decode"] - before["decode"].bytes == crossed_bytes(model, variants, layouts)
    assert flops_of["decode"] - before["decode"].flops == 4 * features * LAYERS * 64
    told = CliRunner().invoke(main, ["inspect", str(plain.bundle), "--image-size", "50x130"]).output
    assert "an image of 50 x 130 px: 3 tiles (1 x 3), 1 image tokens" in told


def test_self_attention_is_no_cross_attention(plain: Exported) -> None:
    graph = read_graph(Bundle.load(plain.bundle).listed("decoder.onnx"))
    kinds = Counter(node.kind for node in graph.nodes)
    sizes = {"batch": 1, "sequence": 5, "rows": 1}
    flops = [
        sum(graph_cost(graph, sizes, 5, pairs, crossed).flops.values()) for pairs, crossed in ((0, 0), (1, 0), (0, 1))
    ]
    assert flops[1] - flops[0] == 4 * 64 * kinds["GroupQueryAttention"]
    assert flops[2] - flops[0] == 4 * 64 * LAYERS


def test_own_template_renders_as_the_checkpoints() -> None:
    from mllm_edge.export.families.mllama import _TEMPLATE
    from mllm_edge.runtime.prompt.tokenizer import ChatTemplate

    own, stored = (ChatTemplate(text, {"bos_token": "<|begin_of_text|>"}) for text in (_TEMPLATE, MLLAMA_TEMPLATE))
    for messages, _ in TALKS.values():
        for prompt in (messages, [{"role": "user", "content": "Hello."}]):
            for opens in (True, False):
                assert own.render(prompt, opens) == stored.render(prompt, opens)


def test_adapters_are_merged_on_the_way(tmp_path: Path) -> None:
    model = save_tiny_mllama(tmp_path / "checkpoint", names="hub")
    adapter = train(model, tmp_path / "adapter", target_modules=["q_proj", "k_proj", "down_proj", "fc1"], r=4)
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name="fp32", adapters=[adapter])
    assert report.parity["greedy_agreement"] == 1.0
    export(str(tmp_path / "checkpoint"), tmp_path / "plain", recipe_name="fp32", verify_mode="off")
    for graph in ("vision_encoder", "cross_kv", "decoder"):
        found, before = ((tmp_path / name / f"{graph}.onnx.data").read_bytes() for name in ("out", "plain"))
        assert found != before


@pytest.mark.parametrize("recipe", ["int8", "int4"])
@pytest.mark.parametrize("images", [True, False])
def test_calibrated_weights(plain: Exported, recipe: str, images: bool, tmp_path: Path) -> None:
    """Without images what makes keys and values of them is rounded."""
    export(str(plain.checkpoint), tmp_path / "fp16", targets=TARGETS, recipe_name="fp16", verify_mode="off")
    data: list[dict[str, Any]] = [
        sample if images else {key: value for key, value in sample.items() if key != "images"} for sample in samples()
    ]
    quantize(tmp_path / "fp16", tmp_path / "out", recipe=recipe, data=data)
    bundle = Bundle.load(tmp_path / "out")
    layers = bundle.manifest.accuracy["layers"]
    assert set(layers["cross_kv"]) == ({f"layers.{i}.cross.kv_proj" for i in (1, 3)} if images else set())
    wanted = {f"layers.{i}.cross_{part}_proj" for i in (1, 3) for part in "qo"}
    assert set(layers["decoder"]) >= wanted
    exact, found = (logits(b, "cpu") for b in (Bundle.load(tmp_path / "fp16"), bundle))
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.9
    for target in TARGETS[1:]:
        assert np.abs(logits(bundle, target) - found).max() <= 0.15 * np.ptp(found)


def test_the_whole_prompt_is_seen_by_one_run(plain: Exported) -> None:
    """Features of several images, one behind the other."""
    with VLM(Bundle.load(plain.bundle), OnnxRuntimeCpu()) as vlm:
        images = [make_image(50, 71, 0), make_image(64, 33, 1)]
        both = vlm.stage_outputs(vlm.processor.process("Hi", images))["cross_kv"]
        apart = [vlm.stage_outputs(vlm.processor.process("Hi", image))["cross_kv"] for image in images]
    assert len(both) == 2 * LAYERS
    for name, array in both.items():
        np.testing.assert_allclose(array, np.concatenate([one[name] for one in apart], axis=2), rtol=0, atol=1e-5)
