"""Adapters whose names are not today's: of any age, with marks of training, of checkpoints with names of their own."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

from mllm_edge.bundle import Bundle
from mllm_edge.errors import ConfigError, MllmEdgeError, SourceError, WeightsError
from mllm_edge.export import reference
from mllm_edge.export.checkpoint import download
from mllm_edge.export.checkpoint.adapters import skeleton
from mllm_edge.export.checkpoint.safetensors import open_weights
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.checkpoint.source_weights import source_weights
from mllm_edge.export.family import family_for
from mllm_edge.export.pipeline import export
from tests.families.row import families_of
from tests.tiny import save_tiny_llava
from tests.tiny_internvl import save_tiny_internvl_chat

Tensors = dict[str, torch.Tensor]
FILE = "adapter_model.safetensors"
# Attention and the multilayer perceptrons of both halves, whatever a family calls them.
EVERYWHERE = (
    r".*(layers|blocks|layer)\.\d+\..*(q_proj|v_proj|qkv|query_key_value|fc1|fc2|down_proj|dense_4h_to_h|attn\.proj)"
    r"|.*vision_embed_tokens|.*encoder\..*attn.*\.[qv]_proj"
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(checkpoint: Path) -> Any:
    return AutoModelForMultimodalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def train(model: Any, folder: Path, **options: Any) -> Path:
    """Save an adapter of random weights for `model`, which is changed."""
    trained = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    torch.manual_seed(0)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    trained.save_pretrained(folder)
    return folder


def renamed(folder: Path, to: Path, rename: Callable[[str], str], **config: Any) -> Path:
    """A copy of an adapter with other names."""
    shutil.copytree(folder, to)
    save_file({rename(k): v for k, v in load_file(folder / FILE).items()}, to / FILE)
    path = to / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return to


def merged(checkpoint: Path, *adapters: Path | str) -> dict[str, np.ndarray]:
    """The weights that the adapters change."""
    weights = source_weights(open_source(str(checkpoint), adapters=adapters))
    return {name: weights.read(name) for name in weights.altered}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=2e-6)


def reason(checkpoint: Path, *adapters: Path | str, kind: type[MllmEdgeError] = WeightsError) -> str:
    with pytest.raises(kind) as caught:
        merged(checkpoint, *adapters)
    assert caught.value.fix
    return str(caught.value)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava") / "m"
    save_tiny_llava(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["linear_2"]}
    return train(load(llava), tmp_path_factory.mktemp("adapter") / "a", **options)


# ---------------------------------------------------------------- names of another age
@pytest.mark.parametrize("family", families_of(""))
def test_names_of_the_checkpoint_on_the_hub(saved: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """Of text, vision and connector, as transformers had them before 4.52; the reference holds all of it."""
    checkpoint = saved(family)
    model = load(checkpoint)
    names = skeleton(model)
    today = train(model, tmp_path / "today", target_modules=EVERYWHERE)
    stored = {names.rename(n).removesuffix(".weight"): n.removesuffix(".weight") for n in open_weights(checkpoint)}

    def old(key: str) -> str:
        module = key.removeprefix("base_model.model.").partition(".lora_")[0]
        return key.replace(module, stored[module])

    other = renamed(today, tmp_path / "old", old)
    expected = merged(checkpoint, today)
    of_images = ("vis", "image_tower", "img_processor", "vqmodel")
    assert any(part in name for name in expected for part in of_images) or family == "chameleon", "convolutions"
    assert_same(merged(checkpoint, other), expected)
    found, notes = reference.adapted(load(checkpoint), open_source(str(checkpoint), adapters=[other]))
    assert notes == ()
    parameters = dict(found.named_parameters())
    assert_same({n: parameters[names.rename(n)].detach().numpy() for n in expected}, expected)
    report = export(str(checkpoint), tmp_path / "out", recipe_name="fp32", adapters=[other])
    assert report.parity["greedy_agreement"] == 1


def test_names_that_a_regular_expression_of_old_names_targets(llava: Path, adapter: Path, tmp_path: Path) -> None:
    def old(key: str) -> str:
        return key.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.vision_tower.", "model.vision_tower.vision_model."
        )

    pattern = r"(language_model\.model|vision_tower\.vision_model)\..*\.(q|v)_proj"
    other = renamed(adapter, tmp_path / "old", old, target_modules=pattern)
    assert_same(merged(llava, other), merged(llava, adapter))
    assert export(str(llava), tmp_path / "out", recipe_name="fp32", adapters=[other]).parity["notes"] == []


def test_where_peft_has_no_place_the_reference_is_merged_here(
    llava: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm_edge.export.checkpoint import peft_merge

    right = peft_merge._named
    monkeypatch.setattr(
        peft_merge, "_named", lambda *a: {n.replace("v_proj", "u_proj"): p for n, p in right(*a).items()}
    )
    source = open_source(str(llava), adapters=[adapter])
    found, notes = reference.adapted(load(llava), source)
    assert "PEFT has no place" in notes[0]
    parameters, rename = dict(found.named_parameters()), skeleton(load(llava)).rename
    expected = merged(llava, adapter)
    assert_same({n: parameters[rename(n)].detach().numpy() for n in expected}, expected)


# ---------------------------------------------------------------- marks of training
def _named(name: str) -> Callable[[str], str]:
    def rename(key: str) -> str:
        if ".lora_" in key:
            return key.replace(".lora_A.", f".lora_A.{name}.").replace(".lora_B.", f".lora_B.{name}.")
        return key.replace(".linear_2.", f".linear_2.modules_to_save.{name}.")

    return rename


MARKS: dict[str, Callable[[str], str]] = {
    "default": _named("default"),
    "another_name": _named("my_task"),
    "name_with_a_dot": _named("v1.5"),
    "without_prefix": lambda key: key.removeprefix("base_model.model."),
    "data_parallel": lambda key: f"module.{key}",
    "inner_data_parallel": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled_layers": lambda key: key.replace(".self_attn.", "._orig_mod.self_attn."),
    "sharded": lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "checkpointed": lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "all_of_it": lambda key: "module._orig_mod." + _named("default")(key),
    "old_names": lambda key: _named("x")(key).replace("model.model.language_model.", "model.language_model.model."),
}


@pytest.mark.parametrize("mark", MARKS)
def test_marks_of_training_in_the_names(llava: Path, adapter: Path, tmp_path: Path, mark: str) -> None:
    other = renamed(adapter, tmp_path / "other", MARKS[mark])
    expected = merged(llava, adapter)
    assert_same(merged(llava, other), expected)
    found, notes = reference.adapted(load(llava), open_source(str(llava), adapters=[other]))
    assert notes == ()
    parameters, rename = dict(found.named_parameters()), skeleton(load(llava)).rename
    assert_same({n: parameters[rename(n)].detach().numpy() for n in expected}, expected)


def test_state_of_the_whole_wrapped_model(llava: Path, adapter: Path, tmp_path: Path) -> None:
    """With the base's own weights beside what was trained."""
    trained = PeftModel.from_pretrained(load(llava), adapter)
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    state = {k: v.clone() for k, v in trained.state_dict().items()}
    assert any("original_module" in k for k in state)
    save_file(state, other / FILE)
    changed, plain = merged(llava, other), open_weights(llava)
    expected = merged(llava, adapter)
    assert expected.keys() < changed.keys()
    assert_same(changed, {n: expected.get(n, plain.read(n)) for n in changed})
    found, notes = reference.adapted(load(llava), open_source(str(llava), adapters=[other]))
    assert notes == ()
    parameters, rename = dict(found.named_parameters()), skeleton(load(llava)).rename
    assert_same({n: parameters[rename(n)].detach().numpy() for n in expected}, expected)


def _edited(adapter: Path, to: Path, change: Callable[[Tensors], Any]) -> Path:
    shutil.copytree(adapter, to)
    tensors = load_file(adapter / FILE)
    change(tensors)
    save_file(tensors, to / FILE)
    return to


def _first(tensors: Tensors) -> str:
    return next(k for k in sorted(tensors) if "lora_A" in k)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({k.replace("lora_A", "lora_A.b"): v.clone() for k, v in t.items()}), "same parameter"),
        (
            lambda t: t.update(
                {k.replace(".lora_A.", f".lora_A.{n}."): v.clone() for k, v in list(t.items()) for n in "ab"}
            ),
            "tensors of 2 adapters: a, b",
        ),
        (lambda t: t.update({"q_proj.lora_A.weight": t.pop(_first(t))}), "not named like the others"),
        (lambda t: t.update({_first(t): torch.zeros(0)}), "shards of DeepSpeed or FSDP were not gathered"),
    ],
)
def test_names_that_contradict_each_other(
    llava: Path, adapter: Path, tmp_path: Path, change: Callable[[Tensors], Any], words: str
) -> None:
    assert words in reason(llava, _edited(adapter, tmp_path / "other", change))


def test_adapters_in_folders_of_their_names(llava: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "all" / "my_task")
    assert f"--adapter {tmp_path / 'all' / 'my_task'}" in reason(llava, tmp_path / "all", kind=SourceError)


# ---------------------------------------------------------------- embeddings
@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def embeddings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    folder = tmp_path_factory.mktemp("embeddings") / "m"
    save_tiny_llava(folder, config={"tie_word_embeddings": request.param})
    return folder, request.param


AS_ONE: dict[str, dict[str, Any]] = {
    "saved": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [7, 3]},
    "tokens_by_name": {"trainable_token_indices": {"embed_tokens": [319, 0, 5]}},
    "tokens_as_one": {"trainable_token_indices": [3], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("name", AS_ONE)
def test_embeddings_are_those_that_were_trained(embeddings: tuple[Path, bool], tmp_path: Path, name: str) -> None:
    """The export equals the model as it was trained, not PEFT's merge alone."""
    checkpoint, _ = embeddings
    model = load(checkpoint)
    trained = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **AS_ONE[name]))
    torch.manual_seed(0)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        live = trained.eval()(input_ids=ids).logits
    trained.save_pretrained(tmp_path / "a")
    source = open_source(str(checkpoint), adapters=[tmp_path / "a"])
    weights, plain, names = source_weights(source), load(checkpoint), skeleton(load(checkpoint))
    assert any("embed_tokens" in n for n in weights.altered)
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for n in weights.altered:
            parameters[names.rename(n)].copy_(torch.from_numpy(weights.read(n)))
        torch.testing.assert_close(plain(input_ids=ids).logits, live, rtol=0, atol=2e-5)
    assert (
        export(str(checkpoint), tmp_path / "out", recipe_name="fp32", adapters=[tmp_path / "a"]).parity["notes"] == []
    )


def test_rows_of_trained_tokens(embeddings: tuple[Path, bool], tmp_path: Path) -> None:
    checkpoint, _ = embeddings
    folder = train(load(checkpoint), tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[319, 4, 9])
    weights = source_weights(open_source(str(checkpoint), adapters=[folder]))
    name = next(n for n in weights if n.endswith("embed_tokens.weight"))
    whole, plain = weights.read(name), open_weights(checkpoint).read(name)
    np.testing.assert_array_equal(weights.rows(name, 3, 10), whole[3:10])
    assert [int(i) for i in np.flatnonzero((whole != plain).any(axis=1))] == [4, 9, 319]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "it has a LoRA"),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "it has a LoRA"),
        ({"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}}, "trained apart"),
    ],
)
def test_shared_embeddings_that_were_trained_apart(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    checkpoint = tmp_path / "m"
    save_tiny_llava(checkpoint, config={"tie_word_embeddings": True})
    folder = train(load(checkpoint), tmp_path / "a", **{"target_modules": ["q_proj"], **options})
    text = reason(checkpoint, folder, kind=ConfigError)
    assert words in text
    assert "shares with" in text


def test_resized_vocabulary_is_refused(llava: Path, tmp_path: Path) -> None:
    for size, options in (
        (330, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (300, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (330, {"target_modules": ["embed_tokens", "lm_head"]}),
    ):
        model = load(llava)
        model.resize_token_embeddings(size)
        folder = train(
            model, tmp_path / f"a{size}{len(options)}{min(options)}", **{"target_modules": ["q_proj"], **options}
        )
        text = reason(llava, folder)
        assert "resized" in text
        assert f"resize_token_embeddings({size})" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainable_token_indices": [3]}, "does not fit"),
        ({"trainable_token_indices": [3, 3]}, "does not fit"),
        ({"trainable_token_indices": [3, 320]}, "does not fit"),
        ({"trainable_token_indices": [3, -1]}, "does not fit"),
        ({"trainable_token_indices": {"lm_head": [3, 4]}}, "does not fit"),
        ({"trainable_token_indices": None}, "does not fit"),
        ({"trainable_token_indices": "3, 4"}, "does not fit"),
    ],
)
def test_trained_tokens_that_do_not_fit(llava: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = train(load(llava), tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[3, 4])
    assert words in reason(llava, renamed(folder, tmp_path / "b", str, **changes))


# ---------------------------------------------------------------- checkpoints that transformers does not know
def _chat_adapter(checkpoint: Path, folder: Path, modules: tuple[str, ...], rename: Callable[[str], str] = str) -> Path:
    """A LoRA by the checkpoint's own names."""
    folder.mkdir()
    torch.manual_seed(1)
    tensors = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and module.endswith(modules) and ".layers." in module:
            key = f"base_model.model.{rename(module)}"
            tensors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(3, weight.shape[1])
            tensors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], 3)
    assert tensors
    save_file(tensors, folder / FILE)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [m.lstrip(".") for m in modules]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _added(checkpoint: Path, folder: Path, rename: Callable[[str], str] = str) -> dict[str, np.ndarray]:
    """W + 2·B·A by hand."""
    stored, tensors = load_file(checkpoint / "model.safetensors"), load_file(folder / FILE)
    found = {}
    for name, weight in stored.items():
        key = f"base_model.model.{rename(name.removesuffix('.weight'))}"
        if f"{key}.lora_A.weight" in tensors:
            found[name] = (weight + 2 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]).numpy()
    return found


QWEN, INTERNLM2 = (".q_proj", ".down_proj", ".qkv", ".fc1"), (".wqkv", ".wo", ".w1", ".w2", ".w3")


@pytest.mark.parametrize(("internlm2", "modules"), [(False, QWEN), (True, INTERNLM2)])
@pytest.mark.parametrize("tied", [False, True])
def test_adapter_of_an_original_internvl(tmp_path: Path, internlm2: bool, modules: tuple[str, ...], tied: bool) -> None:
    checkpoint = tmp_path / "m"
    save_tiny_internvl_chat(checkpoint, internlm2=internlm2, config={"tie_word_embeddings": tied})
    folder = _chat_adapter(checkpoint, tmp_path / "a", modules)
    expected = _added(checkpoint, folder)
    assert_same(merged(checkpoint, folder), expected)
    source = open_source(str(checkpoint), adapters=[folder])
    model, notes = reference.adapted(family_for(source).load_model(source), source)
    assert "transformers does not know" in notes[0]
    if not internlm2:
        parameters = dict(model.named_parameters())
        name = "language_model.model.layers.1.self_attn.q_proj.weight"
        found = parameters["model.language_model.layers.1.self_attn.q_proj.weight"].detach().numpy()
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=2e-6)
    report = export(str(checkpoint), tmp_path / "out", recipe_name="fp32", adapters=[folder])
    assert report.parity["greedy_agreement"] == 1


def test_adapter_of_its_language_model_alone(tmp_path: Path) -> None:
    checkpoint = tmp_path / "m"
    save_tiny_internvl_chat(checkpoint)

    def inner(module: str) -> str:
        return module.removeprefix("language_model.")

    folder = _chat_adapter(checkpoint, tmp_path / "a", (".q_proj",), inner)
    assert_same(merged(checkpoint, folder), _added(checkpoint, folder, inner))


def test_tied_embeddings_of_an_original_internvl(tmp_path: Path) -> None:
    for internlm2, names in ((False, ("embed_tokens", "lm_head")), (True, ("tok_embeddings", "output"))):
        checkpoint = tmp_path / f"m{internlm2}"
        save_tiny_internvl_chat(checkpoint, internlm2=internlm2, config={"tie_word_embeddings": True})
        folder = _chat_adapter(checkpoint, tmp_path / f"a{internlm2}", (".q_proj", ".wqkv"))
        tensors, saved = load_file(folder / FILE), torch.randn(320, 64)
        keys = [f"base_model.model.language_model.{n}.weight" for n in (f"model.{names[0]}", names[1])]
        save_file({**tensors, keys[0]: saved}, folder / FILE)
        assert "shares with" in reason(checkpoint, folder, kind=ConfigError)
        save_file({**tensors, keys[0]: saved, keys[1]: saved.clone()}, folder / FILE)
        found = merged(checkpoint, folder)
        np.testing.assert_array_equal(found[f"language_model.model.{names[0]}.weight"], saved.numpy())


def test_adapter_of_another_original_internvl(tmp_path: Path) -> None:
    save_tiny_internvl_chat(tmp_path / "m")
    save_tiny_internvl_chat(tmp_path / "n", internlm2=True)
    folder = _chat_adapter(tmp_path / "m", tmp_path / "a", (".q_proj",))
    assert "the model has no language_model.model.layers.0.self_attn.q_proj" in reason(tmp_path / "n", folder)


def _wrap(
    checkpoint: Path, prefix: str, modules: tuple[str, ...], key: str, old: bool = False
) -> dict[str, np.ndarray]:
    """Save a checkpoint as the original code does while it trains a LoRA; the weights that it stands for."""
    tensors, wrapped, expected = load_file(checkpoint / "model.safetensors"), {}, {}
    torch.manual_seed(2)
    for name, weight in tensors.items():
        new = name.replace(f"{prefix}.", f"{prefix}.base_model.model.", 1) if name.startswith(f"{prefix}.") else name
        module, leaf = new.rpartition(".")[::2]
        if new != name and module.endswith(modules) and ".layers." in module:
            wrapped[new if old else f"{module}.base_layer.{leaf}"] = weight
            if leaf == "weight":
                down, up = 0.1 * torch.randn(5, weight.shape[1]), 0.1 * torch.randn(weight.shape[0], 5)
                wrapped[f"{module}.lora_A.default.weight"], wrapped[f"{module}.lora_B.default.weight"] = down, up
                expected[name] = (weight + 2 * up @ down).numpy()
        else:
            wrapped[new] = weight
    save_file(wrapped, checkpoint / "model.safetensors")
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: 5}))
    return expected


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("prefix", "key", "modules", "internlm2"),
    [
        ("language_model", "use_llm_lora", (".q_proj", ".down_proj"), False),
        ("language_model", "use_llm_lora", INTERNLM2, True),
        ("vision_model", "use_backbone_lora", (".attn.qkv", ".attn.proj", ".mlp.fc1", ".mlp.fc2"), False),
    ],
)
def test_lora_among_the_weights_of_an_original_internvl(
    tmp_path: Path, prefix: str, key: str, modules: tuple[str, ...], internlm2: bool, old: bool
) -> None:
    checkpoint = tmp_path / "m"
    save_tiny_internvl_chat(checkpoint, internlm2=internlm2)
    names = set(load_file(checkpoint / "model.safetensors"))
    expected = _wrap(checkpoint, prefix, modules, key, old)
    weights = source_weights(open_source(str(checkpoint)))
    assert set(weights) == names
    assert_same({n: weights.read(n) for n in weights.altered}, expected)
    assert export(str(checkpoint), tmp_path / "out", recipe_name="fp32").parity["greedy_agreement"] == 1


def test_lora_among_the_weights_that_contradicts_itself(tmp_path: Path) -> None:
    checkpoint = tmp_path / "m"
    save_tiny_internvl_chat(checkpoint)
    _wrap(checkpoint, "language_model", (".q_proj",), "use_llm_lora")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "use_llm_lora": 8}))
    assert "use_llm_lora = 8" in reason(checkpoint, kind=ConfigError)
    (checkpoint / "config.json").write_text(json.dumps(config))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors.pop(next(n for n in tensors if "lora_B" in n))
    save_file(tensors, checkpoint / "model.safetensors")
    assert "no partner" in reason(checkpoint)


def test_lora_among_the_weights_of_another_model(llava: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(llava, tmp_path / "m"))
    _wrap(checkpoint, "language_model", (".q_proj",), "unused")
    assert "LoRA factors among the weights" in reason(checkpoint)


# ---------------------------------------------------------------- where adapters lie
def test_adapter_in_the_folder_of_the_checkpoint(llava: Path, adapter: Path, tmp_path: Path) -> None:
    """transformers merges it, too, where PEFT is installed."""
    checkpoint = Path(shutil.copytree(llava, tmp_path / "m"))
    shutil.copytree(adapter, checkpoint, dirs_exist_ok=True)
    model, ids = load(checkpoint), torch.arange(12)[None]
    assert any("lora" in name for name, _ in model.named_modules())
    assert_same(merged(checkpoint), merged(llava, adapter))
    assert merged(checkpoint, "none") == {}
    assert_same(merged(checkpoint, "none", adapter), merged(llava, adapter))
    assert_same(merged(checkpoint, checkpoint), merged(llava, adapter))
    report = export(str(checkpoint), tmp_path / "out", recipe_name="fp32")
    assert any("an adapter lies in the folder" in text and "--adapter none" in text for text in report.notices)
    assert Bundle.load(tmp_path / "out").manifest.provenance["adapters"][0]["rank"] == 4
    source = open_source(str(checkpoint))
    found, notes = reference.adapted(reference.load_reference(source).eval(), source)
    assert notes == ()
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=2e-5)
    plain = export(str(checkpoint), tmp_path / "plain", recipe_name="fp32", adapters=["none"])
    assert plain.parity["greedy_agreement"] == 1
    assert Bundle.load(tmp_path / "plain").manifest.provenance["adapters"] == []


def test_adapter_in_the_folder_that_cannot_be_merged(llava: Path, adapter: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(llava, tmp_path / "m"))
    shutil.copytree(adapter, checkpoint, dirs_exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (checkpoint / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    assert "--adapter none" in reason(checkpoint, kind=ConfigError)
    (checkpoint / FILE).unlink()
    source = open_source(str(checkpoint))
    assert source.adapters == ()
    assert "left aside" in "".join(source.notices)


def test_adapter_on_the_hub(llava: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    snapshot = tmp_path / ("1" * 40)

    def snapshot_download(repo: str, allow_patterns: Any = None, **_: Any) -> str:
        taken.extend(allow_patterns)
        shutil.copytree(adapter, snapshot, dirs_exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    source = open_source(str(llava), adapters=["maker/adapter"])
    assert source.adapters[0].provenance()["name"] == "maker/adapter"
    assert source.adapters[0].provenance()["revision"] == "1" * 40
    assert_same(merged(llava, "maker/adapter"), merged(llava, adapter))
    assert set(download.ADAPTER_FILES) <= set(taken)
    assert not any("model" in name for name in set(taken) - set(download.ADAPTER_FILES))


@pytest.mark.parametrize("listed", [["adapter_config.json", "adapter_model.bin"], None])
def test_pickled_adapter_on_the_hub(
    llava: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: list[str] | None
) -> None:
    shutil.copytree(adapter, tmp_path / "a", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path / "a"))
    monkeypatch.setattr(download, "_listed", lambda *a: listed)
    assert "pickled" in reason(llava, "maker/adapter")


def test_adapter_by_a_path_as_people_write_it(
    llava: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapter, tmp_path / "an adapter")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("~/an adapter", (tmp_path / "an adapter").as_uri()):
        assert_same(merged(llava, name), merged(llava, adapter))


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_stored_though_it_is_said_to_be_shared(tmp_path: Path, equal: bool) -> None:
    """transformers makes one of the two only where they are equal."""
    checkpoint = tmp_path / "m"
    save_tiny_llava(checkpoint)
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    if equal:
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
        save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    folder = train(load(checkpoint), tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[3, 4])
    found = merged(checkpoint, folder)
    assert "language_model.lm_head.weight" in found  # PEFT goes by config.json
    report = export(str(checkpoint), tmp_path / "out", recipe_name="fp32", adapters=[folder])
    assert report.parity["greedy_agreement"] == 1
    folder = train(load(checkpoint), tmp_path / "b", target_modules=["lm_head"])
    if equal:
        assert "shares with" in reason(checkpoint, folder, kind=ConfigError)
    else:
        assert list(merged(checkpoint, folder)) == ["language_model.lm_head.weight"]


def test_tokenizer_and_template_beside_an_adapter_are_told(llava: Path, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(llava / name, folder)
    assert not len(open_source(str(llava), adapters=[folder]).notices)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 319, "content": "<my_token>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    told = "\n".join(open_source(str(llava), adapters=[folder]).notices)
    assert "<my_token>" in told
    assert "chat_template.jinja differs" in told
