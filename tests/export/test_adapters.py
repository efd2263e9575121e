"""LoRA adapters: merged as PEFT merges them, in every option that is supported, and refused by name in the others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlavaForConditionalGeneration

from mllm_edge.bundle import Bundle
from mllm_edge.errors import ConfigError, MllmEdgeError, SourceError, WeightsError
from mllm_edge.export import pipeline, reference
from mllm_edge.export.checkpoint.adapters import merge, open_adapter, skeleton
from mllm_edge.export.checkpoint.safetensors import open_weights
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.checkpoint.source_weights import source_weights
from mllm_edge.export.pipeline import export
from tests.tiny import save_tiny_llava

PLAIN: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}
EVERYWHERE = r".*(self_attn\.(q|k|v|o)_proj|self_attn\.out_proj|mlp\.fc1|down_proj|linear_[12])"
OPTIONS: dict[str, dict[str, Any]] = {
    "list": PLAIN,
    "regex": {**PLAIN, "target_modules": EVERYWHERE},
    "rank_and_alpha_patterns": {
        **PLAIN,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7},
        "alpha_pattern": {r"layers\.0\..*v_proj": 3, "k_proj": 99},
    },
    "rslora": {**PLAIN, "use_rslora": True, "lora_alpha": 3.5},
    "fan_in_fan_out_on_linear_layers": {**PLAIN, "fan_in_fan_out": True},
    "modules_to_save": {**PLAIN, "modules_to_save": ["linear_2", "embed_tokens", "lm_head"]},
    "embedding": {**PLAIN, "target_modules": ["embed_tokens", "lm_head"]},
    "convolution": {**PLAIN, "target_modules": ["patch_embedding", "fc2"]},
    "dora": {**PLAIN, "target_modules": ["down_proj", "fc1", "k_proj"], "use_dora": True},
    "bias_of_lora": {**PLAIN, "target_modules": ["fc1", "out_proj"], "bias": "lora_only"},
    "bias_of_all": {**PLAIN, "bias": "all"},
    "lora_bias": {**PLAIN, "target_modules": ["fc1"], "lora_bias": True},
    "one_layer": {**PLAIN, "layers_to_transform": 1},
    "layers_of_the_decoder": {**PLAIN, "layers_to_transform": [0], "layers_pattern": "language_model.layers"},
    "excluded": {**PLAIN, "exclude_modules": r".*vision_tower.*"},
    "orthogonal": {**PLAIN, "init_lora_weights": "orthogonal"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA; read only."""
    folder = tmp_path_factory.mktemp("llava") / "checkpoint"
    save_tiny_llava(folder, vision={"hidden_size": 48}, text={"intermediate_size": 96})
    return folder


def load(checkpoint: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()


def train(model: Any, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save an adapter of random weights for `model`, which is changed."""
    adapted = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(seed)
    trained = [p for n, p in adapted.named_parameters() if p.requires_grad and "original_module" not in n]
    for parameter in trained:
        parameter.data = (parameter.data + 0.1 * torch.randn_like(parameter)).to(dtype)
    adapted.save_pretrained(folder)
    return folder


def peft_merged(model: Any, *folders: Path) -> Any:
    for folder in folders:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model


def check_equal(checkpoint: Path, merged: Any, *folders: Path) -> int:
    """Every weight read through the adapters equals that of PEFT's `merged` model; the number that changed."""
    weights, plain = source_weights(open_source(str(checkpoint), adapters=folders)), open_weights(checkpoint)
    expected, rename = dict(merged.named_parameters()), skeleton(load(checkpoint)).rename
    assert {rename(name) for name in weights} == set(expected)
    for name in weights:
        ours, theirs = weights.read(name), expected[rename(name)].detach().numpy()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(weights.view(name), ours)
        if ours.ndim > 1:
            # Another product of matrices, another order of sums.
            np.testing.assert_allclose(weights.rows(name, 3, 7), ours[3:7], rtol=0, atol=1e-6)
        assert (name in weights.altered) == (not np.array_equal(ours, plain.read(name)))
    return len(weights.altered)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


# ---------------------------------------------------------------- equality with PEFT
@pytest.mark.parametrize("name", OPTIONS)
def test_merged_weights_equal_those_of_peft(checkpoint: Path, tmp_path: Path, name: str) -> None:
    folder = train(load(checkpoint), tmp_path / "adapter", **OPTIONS[name])
    assert check_equal(checkpoint, peft_merged(load(checkpoint), folder), folder) > 0


def test_adapters_are_merged_in_their_order(checkpoint: Path, tmp_path: Path) -> None:
    options = [OPTIONS[n] for n in ("regex", "modules_to_save", "dora", "convolution")]
    folders = [train(load(checkpoint), tmp_path / str(i), seed=i, **o) for i, o in enumerate(options)]
    check_equal(checkpoint, peft_merged(load(checkpoint), *folders), *folders)
    turned = source_weights(open_source(str(checkpoint), adapters=folders[::-1]))
    name = next(n for n in turned if n.endswith("layers.0.mlp.down_proj.weight"))
    assert not np.allclose(turned.read(name), source_weights(open_source(str(checkpoint), adapters=folders)).read(name))


def test_half_precision_adapters(checkpoint: Path, tmp_path: Path) -> None:
    folder = train(load(checkpoint), tmp_path / "adapter", dtype=torch.bfloat16, **PLAIN)
    assert next(iter(load_file(folder / "adapter_model.safetensors").values())).dtype == torch.bfloat16
    check_equal(checkpoint, peft_merged(load(checkpoint), folder), folder)


@pytest.mark.parametrize("names", ["saved", "state_dict", "hub"])
def test_names_of_any_age(tmp_path: Path, names: Any) -> None:
    """Of the checkpoint, and of the adapter: trained with the modules' older names."""
    save_tiny_llava(tmp_path / "checkpoint", names=names)
    folder = train(load(tmp_path / "checkpoint"), tmp_path / "adapter", **OPTIONS["regex"])
    merged = peft_merged(load(tmp_path / "checkpoint"), folder)
    expected = dict(merged.named_parameters())

    def compare() -> None:
        weights = source_weights(open_source(str(tmp_path / "checkpoint"), adapters=[folder]))
        assert len(weights.altered) == 2 * 5 + 3 * 5 + 2
        rename = skeleton(merged).rename
        for name in weights.altered:
            np.testing.assert_allclose(weights.read(name), expected[rename(name)].detach(), rtol=0, atol=2e-6)

    compare()
    old = {"model.model.language_model.": "model.language_model.model.", "model.model.": "model."}

    def rename_old(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            new = next((name.replace(n, o, 1) for n, o in old.items() if n in name), name)
            tensors[new] = tensors.pop(name)

    edit_tensors(folder, rename_old)
    compare()


def test_matrices_that_a_model_stores_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's Conv1D, which fan_in_fan_out is for; one of them is square."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32, tie_word_embeddings=False)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 3}
    folder = train(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter", **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    weights = open_weights(tmp_path / "model")
    names = skeleton(model)
    merge(weights, [open_adapter(folder)], names, "gpt2")
    expected = dict(peft_merged(model, folder).named_parameters())
    assert len(weights.altered) == 6
    for name in weights:
        np.testing.assert_allclose(weights.read(name), expected[names.rename(name)].detach(), rtol=0, atol=2e-6)


def test_fused_weights_are_cut_after_the_merge(checkpoint: Path, tmp_path: Path) -> None:
    folder = train(load(checkpoint), tmp_path / "adapter", **PLAIN)
    weights = source_weights(open_source(str(checkpoint), adapters=[folder]))
    name = next(n for n in weights if n.endswith("language_model.model.layers.0.self_attn.q_proj.weight"))
    weights.derive("part", name, (10, 64), lambda values: values[20:30])
    np.testing.assert_array_equal(weights.use("part", (10, 64))(), weights.read(name)[20:30])
    assert name in weights.altered


# ---------------------------------------------------------------- export
def test_export_is_compared_with_the_merged_reference(checkpoint: Path, tmp_path: Path) -> None:
    folders = [train(load(checkpoint), tmp_path / n, **OPTIONS[n]) for n in ("regex", "embedding")]
    report = export(str(checkpoint), tmp_path / "out", recipe_name="fp32", adapters=folders)
    assert report.parity["greedy_agreement"] == 1
    assert report.parity["notes"] == []
    assert report.adapters == tuple(map(str, folders))
    told = Bundle.load(tmp_path / "out").manifest.provenance["adapters"]
    assert [(a["name"], a["rank"], a["base_model"]) for a in told] == [
        (n, 4, str(checkpoint)) for n in ("regex", "embedding")
    ]
    assert all(len(a["sha256"]) == 64 for a in told)


def test_comparison_notices_a_wrong_merge(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm_edge.export.checkpoint import adapters

    folder = train(load(checkpoint), tmp_path / "adapter", **OPTIONS["regex"])
    right = adapters._delta
    monkeypatch.setattr(adapters, "_delta", lambda left, right_, scaling, m: right(left, right_, scaling * 1.1, m))
    with pytest.raises(MllmEdgeError, match="disagree with the source model"):
        export(str(checkpoint), tmp_path / "out", recipe_name="fp32", adapters=[folder])


def test_without_peft_the_reference_gets_the_same_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(load(checkpoint), tmp_path / "adapter", **OPTIONS["modules_to_save"])
    source = open_source(str(checkpoint), adapters=[folder])
    theirs, notes = reference.adapted(load(checkpoint), source)
    assert notes == ()
    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None)
    ours, notes = reference.adapted(load(checkpoint), source)
    assert "pip install peft" in notes[0]
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("peft", [True, False])
def test_large_model_with_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peft: bool) -> None:
    save_tiny_llava(tmp_path / "checkpoint", text={"num_hidden_layers": 4})
    folder = train(load(tmp_path / "checkpoint"), tmp_path / "adapter", **OPTIONS["regex"])
    monkeypatch.setattr(pipeline, "WHOLE_LIMIT", 1000)
    if not peft:
        monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None)
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name="fp32", adapters=[folder])
    assert report.parity["scope"] == "decoder: first 2 layers and head"
    assert bool(report.parity["notes"]) == (not peft)


def test_rows_of_a_saved_embedding(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    save_tiny_llava(checkpoint)
    folder = train(load(checkpoint), tmp_path / "adapter", **{**PLAIN, "modules_to_save": ["embed_tokens"]})
    weights = source_weights(open_source(str(checkpoint), adapters=[folder]))
    name = next(n for n in weights if n.endswith("embed_tokens.weight"))
    saved = next(v for k, v in load_file(folder / "adapter_model.safetensors").items() if "embed_tokens" in k)
    np.testing.assert_array_equal(weights.rows(name, 5, 9), saved[5:9].numpy())


# ---------------------------------------------------------------- refusals
def assert_refused(checkpoint: Path, folder: Path, kind: type[MllmEdgeError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        export(str(checkpoint), folder.parent / "out", adapters=[folder], dry_run=True)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.fix


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    return train(load(checkpoint), tmp_path / "adapter", **PLAIN)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, ["peft_type", "'IA3'"]),
        ({"peft_type": None}, ["peft_type"]),
        ({"r": None}, ["r and lora_alpha"]),
        ({"init_lora_weights": "pissa"}, ["'pissa'", "path_initial_model_for_weight_conversion"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
        ({"trainable_token_indices": [3]}, ["trainable_token_indices"]),
        ({"target_parameters": ["experts.gate_up_proj"]}, ["target_parameters"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ({"megatron_config": {"a": 1}}, ["megatron_config"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"use_something_new": True}, ["use_something_new"]),
        ({"r": 5}, ["rank 4", "says 5"]),
        ({"rank_pattern": {"v_proj": 2}}, ["v_proj", "says 2"]),
        ({"target_modules": ["q_proj"]}, ["v_proj", "does not target it"]),
        ({"target_modules": None}, ["does not target it"]),
        ({"layers_to_transform": [0]}, ["layers.1", "does not target it"]),
        ({"exclude_modules": ["v_proj"]}, ["v_proj", "does not target it"]),
        ({"use_dora": True}, ["lora_magnitude_vector"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save = lm_head"]),
    ],
)
def test_option_that_cannot_be_merged(
    checkpoint: Path, adapter: Path, changes: dict[str, Any], words: list[str]
) -> None:
    edit_config(adapter, **changes)
    assert_refused(checkpoint, adapter, SourceError, *words)


def _first(tensors: dict[str, torch.Tensor], part: str = "lora_A") -> str:
    return next(name for name in sorted(tensors) if part in name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(_first(t)), ["lora_B.weight", "not its partner"]),
        (lambda t: t.update({"q_proj.lora_A.weight": t.pop(_first(t))}), ["tensor q_proj.lora_A.weight"]),
        (lambda t: t.update({"base_model.model.a.lora_C.weight": torch.zeros(2)}), ["a.lora_C.weight"]),
        (lambda t: t.update({_first(t).replace("lora_A", "lora_embedding_A"): torch.zeros(2)}), ["cannot be merged"]),
        (lambda t: t.update({_first(t): torch.zeros(4, 40)}), ["[4, 40]", "does not fit"]),
        (lambda t: t.update({_first(t, "lora_B"): torch.zeros(64, 3)}), ["does not fit"]),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(321, 64)}), ["[321, 64]", "resized"]),
        (lambda t: t.update({"base_model.model.lm_head.bias": torch.zeros(320)}), ["no lm_head.bias"]),
    ],
)
def test_tensor_that_cannot_be_merged(
    checkpoint: Path, adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any], words: list[str]
) -> None:
    edit_tensors(adapter, change)
    assert_refused(checkpoint, adapter, WeightsError, "adapter_model.safetensors", *words)


def test_adapter_of_another_model(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_tiny_llava(other, text={"num_hidden_layers": 1})
    assert_refused(other, adapter, WeightsError, "layers.1.self_attn.q_proj", str(checkpoint), str(other))


def test_dora_of_embeddings_and_convolutions(checkpoint: Path, tmp_path: Path) -> None:
    for module in ("embed_tokens", "patch_embedding"):
        folder = train(load(checkpoint), tmp_path / module, target_modules=[module], use_dora=True)
        assert_refused(checkpoint, folder, ConfigError, "use_dora", module)


def test_magnitudes_without_dora(checkpoint: Path, tmp_path: Path) -> None:
    folder = train(load(checkpoint), tmp_path / "adapter", **OPTIONS["dora"])
    edit_config(folder, use_dora=False)
    assert_refused(checkpoint, folder, WeightsError, "use_dora = False", "lora_magnitude_vector")


@pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens"]}, {**PLAIN, "modules_to_save": ["lm_head"]}])
def test_embeddings_that_are_the_head_too(tmp_path: Path, options: dict[str, Any]) -> None:
    checkpoint = tmp_path / "checkpoint"
    save_tiny_llava(checkpoint, config={"tie_word_embeddings": True}, text={"tie_word_embeddings": True})
    folder = train(load(checkpoint), tmp_path / "adapter", **options)
    assert_refused(checkpoint, folder, ConfigError, "embed_tokens.weight", "lm_head.weight", "shares")


def test_not_an_adapter(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    assert_refused(checkpoint, tmp_path / "nowhere", SourceError, "adapter_config.json")
    damaged = Path(shutil.copytree(adapter, tmp_path / "damaged"))
    (damaged / "adapter_model.safetensors").write_bytes(b"short")
    assert_refused(checkpoint, damaged, WeightsError, "not a safetensors file")
    (damaged / "adapter_model.safetensors").unlink()
    assert_refused(checkpoint, damaged, WeightsError, "no adapter_model.safetensors")
    (damaged / "adapter_model.bin").write_bytes(b"pickle")
    assert_refused(checkpoint, damaged, WeightsError, "pickled", "save_file")
    (damaged / "adapter_config.json").write_text("{")
    assert_refused(checkpoint, damaged, SourceError, "pickled")
