"""InternVL checkpoints whose files contradict each other, or ask for something that nobody handles."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge.errors import ConfigError, MllmEdgeError, SourceError, WeightsError
from tests.export.test_bad_input import assert_fails, edit_json, edit_weights
from tests.tiny_internvl import save_tiny_internvl, save_tiny_internvl_chat

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny checkpoint in transformers' layout that a test may damage."""
    save_tiny_internvl(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """The same in the original layout."""
    save_tiny_internvl_chat(tmp_path / "checkpoint", internlm2=True)
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c: c.update(projector_hidden_act="swish"), "projector_hidden_act = 'swish'"),
        (lambda c: c.update(vision_feature_layer=-4), "-4, but the tower has 3 layers"),
        (lambda c: c.update(vision_feature_layer=0), "is 0"),
        (lambda c: c.update(vision_feature_layer=[-1]), "[-1]"),
        (lambda c: c.update(vision_feature_select_strategy="full"), "vision_feature_select_strategy"),
        (lambda c: c.update(downsample_ratio=0.3), "downsample_ratio = 0.3"),
        (lambda c: c.update(downsample_ratio=0.0), "downsample_ratio = 0.0"),
        (lambda c: c.update(downsample_ratio=0.0625), "8 patches"),
        (lambda c: c.update(image_token_id=3), "image_token_id = 3"),
        (lambda c: c["text_config"].update(model_type="gpt_neox"), "text_config.model_type = 'gpt_neox'"),
        (lambda c: c["text_config"].update(vocab_size=280), "vocab_size is 280"),
        (lambda c: c["vision_config"].update(hidden_act="gelu_new"), "hidden_act = 'gelu_new'"),
        (lambda c: c["vision_config"].update(norm_type="batch_norm"), "norm_type = 'batch_norm'"),
        (lambda c: c["vision_config"].update(image_size=[32, 64]), "image_size = [32, 64]"),
        (lambda c: c["vision_config"].update(patch_size=[4]), "patch_size = [4]"),
        (lambda c: c["vision_config"].update(num_channels=1), "num_channels = 1"),
        (lambda c: c["vision_config"].update(num_attention_heads=3), "num_attention_heads 3"),
        (lambda c: c["vision_config"].update(patch_size=5), "patch_size 5"),
        (lambda c: c["vision_config"].update(use_absolute_position_embeddings=False), "use_absolute_position"),
    ],
)
def test_config(saved: Path, change: Change, word: str) -> None:
    edit_json(saved / "config.json", change)
    assert_fails(saved, ConfigError, word)


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        ("preprocessor_config.json", lambda c: c.update(size={"height": 64, "width": 64}), "64×64 px"),
        ("preprocessor_config.json", lambda c: c.update(size={"height": 32, "width": 64}), "32×64 px"),
        ("preprocessor_config.json", lambda c: c.update(min_patches=4, max_patches=3), "at least 4 and at most 3"),
        ("preprocessor_config.json", lambda c: c.update(min_patches=0), "at least 0"),
        ("preprocessor_config.json", lambda c: c.update(do_resize=False), "do_resize"),
        ("preprocessor_config.json", lambda c: c.update(do_rescale=False), "do_rescale"),
        ("preprocessor_config.json", lambda c: c.update(do_convert_rgb=False), "do_convert_rgb"),
        ("preprocessor_config.json", lambda c: c.update(resample=9), "resample"),
        ("preprocessor_config.json", lambda c: c.update(image_processor_type="CLIPImageProcessor"), "CLIPImageProc"),
        ("processor_config.json", lambda c: c.update(image_seq_length=256), "image_seq_length = 256"),
        ("processor_config.json", lambda c: c.pop("image_seq_length"), "image_seq_length = 256 (256 if"),
    ],
)
def test_processor(saved: Path, file: str, change: Change, word: str) -> None:
    edit_json(saved / file, change)
    assert_fails(saved, ConfigError, word)


def test_no_image_processor(saved: Path) -> None:
    (saved / "preprocessor_config.json").unlink()
    assert_fails(saved, ConfigError, "preprocessor_config.json")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c: c.update(ps_version="v1"), "ps_version = 'v1'"),
        (lambda c: c.pop("ps_version"), "ps_version = 'v1'"),
        (lambda c: c.update(ps_version="v3"), "ps_version = 'v3'"),
        (lambda c: c.update(pad2square=True), "pad2square = True"),
        (lambda c: c.update(use_llm_lora=16), "use_llm_lora = 16"),
        (lambda c: c.update(force_image_size=64), "force_image_size = 64"),
        (lambda c: c.update(min_dynamic_patch=7), "at least 7 and at most 6"),
        (lambda c: c.update(select_layer=-4), "-4, but the tower has 3 layers"),
        (lambda c: c.update(template="phi3-chat"), "no chat template"),
        (lambda c: c.pop("llm_config"), "no llm_config"),
        (lambda c: c.update(vision_config=None), "no vision_config"),
        (lambda c: c["llm_config"].update(architectures=["MambaForCausalLM"]), "MambaForCausalLM"),
        (lambda c: c["llm_config"].pop("architectures"), "architectures"),
        (lambda c: c["llm_config"].update(bias=True), "bias = True"),
        (lambda c: c["llm_config"].pop("bias"), "bias = True"),
        (lambda c: c["llm_config"].update(hidden_act="relu"), "hidden_act = 'relu'"),
        (lambda c: c["llm_config"].update(rope_scaling={"type": "xpos", "factor": 2.0}), "xpos"),
        (lambda c: c["vision_config"].update(qk_normalization=True, layer_norm_eps=1e-5), "layer_norm_eps = 1e-05"),
        (lambda c: c["vision_config"].update(norm_type="batch_norm"), "norm_type = 'batch_norm'"),
    ],
)
def test_original_config(chat: Path, change: Change, word: str) -> None:
    edit_json(chat / "config.json", change)
    assert_fails(chat, ConfigError, word)


@pytest.mark.parametrize("layout", ["saved", "chat"])
@pytest.mark.parametrize("token", ["<img>", "</img>", "<IMG_CONTEXT>"])
def test_special_token_missing_from_the_vocabulary(request: pytest.FixtureRequest, layout: str, token: str) -> None:
    checkpoint = request.getfixturevalue(layout)
    path = checkpoint / "tokenizer.json"
    path.write_text(path.read_text().replace(f'"{token}"', '"<other>"'))
    assert_fails(checkpoint, ConfigError, token, "tokenizer.json")


def test_no_tokenizer(chat: Path) -> None:
    (chat / "tokenizer.json").unlink()
    assert_fails(chat, SourceError, "tokenizer.json")


@pytest.mark.parametrize(
    ("layout", "name", "told"),
    [
        ("saved", "language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("saved", "vision_tower.embeddings.cls_token", ""),
        ("saved", "vision_tower.encoder.layer.1.lambda_2", ""),
        ("saved", "multi_modal_projector.layer_norm.bias", ""),
        ("saved", "language_model.lm_head.weight", "lm_head.weight"),
        ("chat", "vision_model.embeddings.position_embedding", "vision_tower.embeddings.position_embeddings"),
        ("chat", "vision_model.encoder.layers.2.attn.qkv.weight", ""),
        ("chat", "vision_model.encoder.layers.0.attn.qkv.bias", ""),
        ("chat", "mlp1.1.weight", "multi_modal_projector.linear_1.weight"),
        ("chat", "language_model.model.layers.1.attention.wqkv.weight", ""),
        ("chat", "language_model.output.weight", "lm_head.weight"),
    ],
)
def test_missing_weight(request: pytest.FixtureRequest, layout: str, name: str, told: str) -> None:
    """Named as the files would, where another layer tells how; else by transformers' name."""
    checkpoint = request.getfixturevalue(layout)
    edit_weights(checkpoint, lambda w: w.pop(name))
    assert_fails(checkpoint, WeightsError, told or name)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("saved", "vision_tower.encoder.layer.7.lambda_2"),
        ("saved", "vision_tower.head.weight"),
        ("saved", "language_model.model.layers.7.mlp.up_proj.weight"),
        ("chat", "vision_model.encoder.layers.1.attn.q_norm.weight"),
        ("chat", "mlp1.4.weight"),
    ],
)
def test_unused_weight(request: pytest.FixtureRequest, layout: str, name: str) -> None:
    checkpoint = request.getfixturevalue(layout)
    edit_weights(checkpoint, lambda w: w.update({name: np.zeros((1, 64), np.float32)}))
    assert_fails(checkpoint, WeightsError, name, "drop it silently")


def test_two_heads(chat: Path) -> None:
    """InternLM2's own, and one under Llama's name."""
    edit_weights(chat, lambda w: w.update({"language_model.lm_head.weight": np.zeros((1, 64), np.float32)}))
    assert_fails(chat, WeightsError, "language_model.output.weight", "language_model.lm_head.weight", "are both")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda c: c["llm_config"].update(num_key_value_heads=4), "wqkv.weight"),
        (lambda c: c["llm_config"].update(intermediate_size=256), "feed_forward.w1.weight"),
        (lambda c: c["vision_config"].update(hidden_size=32), "vision_model."),
        (lambda c: c["vision_config"].update(qk_normalization=True), "attention.q_norm.weight"),
        (lambda c: c["vision_config"].update(patch_size=8), "vision_model.embeddings.position_embedding"),
        (lambda c: c["vision_config"].update(intermediate_size=256), "mlp.fc1"),
    ],
)
def test_weights_of_other_shapes(chat: Path, change: Change, name: str) -> None:
    edit_json(chat / "config.json", change)
    assert_fails(chat, WeightsError, name)


def test_errors_are_of_this_project(chat: Path) -> None:
    edit_json(chat / "config.json", lambda c: c["llm_config"].update(num_attention_heads=5))
    assert_fails(chat, MllmEdgeError, "config.json")
