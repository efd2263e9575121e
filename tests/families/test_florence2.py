"""Florence-2: tasks become their words, places stay in answers, and what an encoder-decoder does with a prompt."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Florence2Processor

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.compare.compare import compare
from mllm_edge.errors import ContextError, PromptError
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.compare import compare_with_source
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import quantize
from mllm_edge.runtime.budget import memory
from mllm_edge.runtime.planning.shapes import crossed_bytes, stage_runs
from mllm_edge.runtime.profiling.memory import predict_activations
from mllm_edge.runtime.profiling.roofline import MachineLimits, Workload, roofline
from mllm_edge.runtime.prompt.layout import layout_of
from tests.export.test_adapters import train
from tests.export.test_quantize import samples
from tests.families.parity import FLOAT32_TARGETS, Exported, export_tiny, make_image
from tests.tiny_florence2 import florence_tokenizer, save_tiny_florence2

RULES = {"no_repeat_ngram_size": 2, "min_length": 9, "num_beams": 3}
ABOUT = "<CAPTION_TO_PHRASE_GROUNDING>"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("plain"), save_tiny_florence2, generation=RULES, special=True)


@pytest.fixture(scope="module")
def original(plain: Exported) -> Any:
    """transformers' processor as it is."""
    return Florence2Processor(plain.processor.image_processor, florence_tokenizer(special=True))


def test_tasks_become_their_words(plain: Exported, original: Any) -> None:
    """With the ids that transformers' own processor makes of them."""
    image, vlm = make_image(50, 60, 0), plain.vlm("cpu")
    alone, about = original.task_prompts_without_inputs, original.task_prompts_with_input
    assert len(alone) == 8
    assert len(about) == 7
    asked = ["Hello.", "", *alone, *about, *(f"{task}<loc_1> a {{input}}<loc_2> " for task in about), f" x{ABOUT} y"]
    for question in asked:
        expected = original(text=question, images=image, return_tensors="pt")["input_ids"][0].tolist()
        assert vlm.processor.process(question, image).token_ids.tolist() == expected
        if question:
            told = original(text=question, return_tensors="pt")["input_ids"][0].tolist()
            assert vlm.processor.process(question).token_ids.tolist() == told


def test_a_task_without_input_is_the_whole_question(plain: Exported, original: Any) -> None:
    with pytest.raises(PromptError, match="<OD> has to be the whole question"):
        plain.vlm("cpu").processor.process("<OD> please", make_image(50, 60, 0))
    with pytest.raises(ValueError, match="should be the only content"):
        original(text="<OD> please", images=make_image(50, 60, 0))
    talk = [{"role": role, "content": "Hello."} for role in ("user", "assistant", "user")]
    with pytest.raises(PromptError, match="takes one message"):
        plain.vlm("cpu").processor.process(talk)


def test_places_are_text_of_answers(plain: Exported, original: Any) -> None:
    """Those without a name: transformers leaves them in where it is told to, with the ends of the answer."""
    vlm, tokenizer = plain.vlm("cpu"), original.tokenizer
    ids = [tokenizer.bos_token_id, 70, *tokenizer.convert_tokens_to_ids(["<loc_1>", "<loc_7>"]), tokenizer.eos_token_id]
    assert vlm.tokenizer.decode(ids) == tokenizer.decode(ids[1:-1], skip_special_tokens=False)
    assert "<loc_1><loc_7>" not in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
@pytest.mark.parametrize("question", ["<OD>", "Hello."])
def test_answers_are_those_of_generate(plain: Exported, original: Any, question: str, target: str) -> None:
    """With the tokens that the decoder begins with, and rules that count its tokens and not the prompt's. transformers
    forces an end in the last place, which is a token more here."""
    images = [] if question == "Hello." else [make_image(70, 40, 1)]
    inputs = original(text=question, images=images or None, return_tensors="pt")
    with torch.no_grad():
        found = plain.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=22)[0].tolist()
    start = list(plain.vlm(target).spec.text_encoder.start)
    assert start == [2 + 256, 0 + 256] == found[: len(start)]
    ends = plain.model.generation_config.eos_token_id
    answer = found[len(start) :]
    expected = answer[: answer.index(ends)]
    result = plain.vlm(target).generate(question, images, max_new_tokens=20)
    assert list(result.token_ids) == expected
    guessed = plain.vlm(target).generate(question, images, max_new_tokens=20, speculation=3)
    assert guessed.token_ids == result.token_ids


def test_without_a_token_that_is_forced(tmp_path: Path) -> None:
    save_tiny_florence2(tmp_path / "checkpoint", generation={"forced_bos_token_id": None})
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name="fp32")
    assert report.parity["greedy_agreement"] == 1
    spec = Bundle.load(tmp_path / "out").manifest.model.text_encoder
    assert spec is not None
    assert spec.start == (258,)


def test_settings_that_no_runtime_applies_are_named(plain: Exported) -> None:
    source = open_source(str(plain.checkpoint))
    from mllm_edge.export.checkpoint.generation import generation_spec

    generation_spec(source, {"is_encoder_decoder": True})
    (told,) = [notice for notice in source.notices if "num_beams" in notice]
    assert "forced_bos" not in told


def test_compare_with_the_checkpoint(plain: Exported) -> None:
    found = compare_with_source(plain.checkpoint, plain.bundle)
    assert found.greedy_agreement == 1
    assert set(found.errors) == {"vision_encoder", "connector", "text_encoder", "prefill_logits", "decode_logits"}
    assert max(found.errors.values()) <= 1e-3


def test_several_prompts_at_once(plain: Exported) -> None:
    """Each with what its own cross-attention looks at."""
    vlm = plain.vlm("cpu")
    prompts = [vlm.processor.process("Hello."), vlm.processor.process("<OD>", make_image(40, 40, 0))]
    encoded = [vlm.encode(prompt) for prompt in prompts]
    alone = [vlm.greedy([one], 8, stop_ids=())[0] for one in encoded]
    for answer, expected in zip(vlm.greedy(encoded, 8, stop_ids=()), alone, strict=True):
        np.testing.assert_array_equal(answer, expected)
    vlm.decoder.reset(64, batch=2)
    logits = vlm.decoder.forward_batch(encoded)
    assert np.abs(logits[0] - logits[1]).max() > 0.05 * np.ptp(logits[0])
    for row, one in zip(logits, encoded, strict=True):
        np.testing.assert_allclose(row, vlm.score(one, np.array([0]))[0], atol=1e-4 * np.ptp(row))


def test_the_context_holds_prompt_and_answer_apart(plain: Exported) -> None:
    with VLM.load(plain.bundle, max_context=40) as vlm:
        room = 40 - len("Hello.")
        assert len(vlm.generate("Hello." * 6, max_new_tokens=99, ignore_eos=True).token_ids) == 38 > room
        with pytest.raises(ContextError, match="2 too many"):
            vlm.generate("Hello." * 7)


def test_pictures_that_do_not_fit_are_not_compared(tmp_path: Path) -> None:
    """Two of them are more than the context holds."""
    save_tiny_florence2(tmp_path / "checkpoint", text={"max_position_embeddings": 80})
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name="fp32")
    assert report.parity["samples"] == 2
    assert len(compare_with_source(tmp_path / "checkpoint", tmp_path / "out").cases) == 2
    assert len(compare(tmp_path / "out", tmp_path / "out").cases) == 2


def test_what_a_prompt_costs(plain: Exported) -> None:
    """Keys and values of every token of the prompt are kept and read in every step."""
    bundle, image = Bundle.load(plain.bundle), make_image(50, 130, 0)
    model = bundle.manifest.model
    variants = {name: bundle.variant(name, "cpu") for name in bundle.manifest.components}
    layers, width = 2, 64
    with VLM.load(plain.bundle) as vlm:
        metrics = vlm.generate("<OD>", [image], max_new_tokens=2, ignore_eos=True).metrics
        assert vlm.image_features(vlm.processor.process("Hi", [image])).shape == (10, width)
        kept = 4 * 2 * layers * width * metrics.prompt_tokens
        assert metrics.kv_cache_bytes - vlm.decoder.cache.nbytes == kept  # type: ignore[union-attr]
    layouts = [layout_of(model.image, 50, 130, 1)]
    assert crossed_bytes(model, variants, layouts, metrics.prompt_tokens) == kept
    runs = {s.component: stage_runs(model, s, variants, layouts, 30) for s in model.stages}
    assert runs["text_encoder"] == [({"batch": 1, "sequence": 30}, 1)]
    assert runs["cross_kv"] == [({"batch": 1, "features": 30}, 1)]
    (needs,) = [found for found in memory(bundle, 32) if found.target == "cpu"]
    assert needs.cross_kv == 4 * 2 * layers * width * 32
    assert predict_activations(bundle, "cpu", 300, []) > predict_activations(bundle, "cpu", 30, [])
    seconds = dict.fromkeys((*variants, "prefill", "decode"), 1.0)
    limits = MachineLimits(1e9, {"float32": 1e9})
    short, long = ({s.stage: s for s in roofline(bundle, variants, seconds, Workload(n, 2), limits)} for n in (30, 60))
    assert set(short) == {"text_encoder", "cross_kv", "prefill", "decode"}
    assert long["cross_kv"].flops == 2 * short["cross_kv"].flops
    assert long["decode"].bytes - short["decode"].bytes == 4 * 2 * layers * width * 30
    assert long["prefill"].flops - short["prefill"].flops == 2 * 4 * layers * width * 30


def test_adapters_are_merged_on_the_way(tmp_path: Path) -> None:
    model = save_tiny_florence2(tmp_path / "checkpoint")
    adapter = train(model, tmp_path / "adapter", target_modules=["q_proj", "k_proj", "fc1", "qkv"], r=4)
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name="fp32", adapters=[adapter])
    assert report.parity["greedy_agreement"] == 1.0
    export(str(tmp_path / "checkpoint"), tmp_path / "plain", recipe_name="fp32", verify_mode="off")
    for graph in ("vision_encoder", "text_encoder", "cross_kv", "decoder"):
        found, before = ((tmp_path / name / f"{graph}.onnx.data").read_bytes() for name in ("out", "plain"))
        assert found != before


def test_calibrated_weights(plain: Exported, tmp_path: Path) -> None:
    """Those of the text encoder, too."""
    export(str(plain.checkpoint), tmp_path / "fp16", recipe_name="fp16", verify_mode="off")
    quantize(tmp_path / "fp16", tmp_path / "out", recipe="int8", data=samples(6))
    bundle = Bundle.load(tmp_path / "out")
    layers = bundle.manifest.accuracy["layers"]
    assert set(layers["cross_kv"]) == {f"layers.{i}.cross.kv_proj" for i in range(2)}
    parts = ("qk_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    assert set(layers["text_encoder"]) == {f"layers.{i}.{part}" for i in range(2) for part in parts}
    found = {folder: _logits(tmp_path / folder) for folder in ("fp16", "out")}
    assert np.corrcoef(found["fp16"].ravel(), found["out"].ravel())[0, 1] > 0.9


def _logits(bundle: Path) -> np.ndarray:
    with VLM.load(bundle) as vlm:
        prompt = vlm.encode(vlm.processor.process("<OD>", make_image(50, 60, 0)))
        return vlm.score(prompt, np.arange(70, 90))
