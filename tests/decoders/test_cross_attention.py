"""Decoders that look at something encoded: T5, BART and mllama, with their encoders and cross-attention caches.

In every dialect, in float32, against transformers; tolerance as in test_parity.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from mllm_edge.calibration.recipes import RECIPES, Recipe
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights, open_weights
from mllm_edge.export.decoders.bart import bart_specs
from mllm_edge.export.decoders.build import DIALECTS, build_cross_kv, build_text_encoder
from mllm_edge.export.decoders.find import decoder_for
from mllm_edge.export.decoders.place import Place
from mllm_edge.export.decoders.t5 import t5_specs
from mllm_edge.graph.datafile import DataFile
from mllm_edge.graph.decoder_spec import DecoderSpec, EncoderSpec
from mllm_edge.graph.precision import Precision
from mllm_edge.runtime.decode import along
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.masks import RelativeBias, encoder_bias
from tests.decoders.models import CAPACITY, SIZES, assert_close, open_decoder, open_graph, random_weights

T5: dict[str, Any] = {
    "vocab_size": 160,
    "d_model": 64,
    "d_kv": 24,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
BART: dict[str, Any] = {
    "vocab_size": 160,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
}
PAIRS: dict[str, tuple[Any, Any, Callable[..., tuple[EncoderSpec, DecoderSpec]]]] = {
    "t5": (T5ForConditionalGeneration, T5Config(**T5), t5_specs),
    "t5_gated": (
        T5ForConditionalGeneration,
        T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        t5_specs,
    ),
    "bart": (BartForConditionalGeneration, BartConfig(**BART), bart_specs),
}
PROMPT = [5, 88, 31, 7, 7, 150, 42, 99, 3, 64, 12, 11, 10, 9, 8, 130]
IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 100, 101]


@dataclass(frozen=True)
class Case:
    """A reference and its three graphs."""

    model: Any
    decoder: Decoder
    encoded: np.ndarray
    cross_kv: dict[str, np.ndarray]


# Columns are evened out, and nothing is rounded.
EVENED = replace(RECIPES["fp32"], decoder=Precision("float32", method="evened"))


def component(model: Any, path: Path, dialect: str) -> Callable[..., dict[str, np.ndarray]]:
    """A graph as a function of its inputs."""
    session = open_graph(model, path, dialect).session
    return lambda **feeds: session.run(feeds)


def encode(
    spec: EncoderSpec,
    weights: Weights,
    dialect: str,
    folder: Path,
    embeds: np.ndarray,
    recipe: Recipe = RECIPES["fp32"],
) -> np.ndarray:
    """The text encoder's last hidden states [1, S, H] for embeddings [S, H]."""
    with DataFile(folder / "encoder.onnx.data") as data:
        graph = build_text_encoder(spec, weights, recipe, data, dialect)
    run = component(graph, folder / "e.onnx", dialect)
    relative = None
    assert spec.table is not None
    table = weights.read(spec.table.tensor)[spec.table.skip :]
    if spec.table.kind == "relative_bias":
        relative = RelativeBias(table, spec.table.max_distance)
    else:
        embeds = embeds + table[: len(embeds)]
    return run(inputs_embeds=embeds[None], attention_bias=encoder_bias(len(embeds), relative))["encoder_hidden_states"]


def look(
    spec: DecoderSpec,
    weights: Weights,
    dialect: str,
    folder: Path,
    features: np.ndarray,
    recipe: Recipe = RECIPES["fp32"],
) -> dict[str, np.ndarray]:
    """Cross-attention keys and values for features [1, N, F]."""
    with DataFile(folder / "cross.onnx.data") as data:
        graph = build_cross_kv(spec, weights, recipe, data, dialect)
    return component(graph, folder / "c.onnx", dialect)(encoder_hidden_states=features)


@pytest.fixture(scope="module", params=PAIRS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    architecture, config, _ = PAIRS[request.param]
    torch.manual_seed(0)
    model = random_weights(architecture(config))
    if request.param == "bart":
        model.final_logits_bias.data = torch.randn(1, 160)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.fixture(scope="module", params=DIALECTS)
def built(request: pytest.FixtureRequest, checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, model, folder = checkpoint
    weights, config = open_weights(folder), model.config
    reader = ConfigReader("config.json", config.to_dict(), type(config)().to_dict())
    encoder, spec = PAIRS[name][2](reader, weights)
    reader.take("max_position_embeddings"), reader.take("scale_embedding")
    reader.finish()
    out, dialect = tmp_path_factory.mktemp(f"{name}-{request.param}"), request.param
    decoder = open_decoder(spec, weights, dialect, out)
    embeddings = model.get_input_embeddings().weight.detach().numpy()
    encoded = encode(encoder, weights, dialect, out, embeddings[PROMPT])
    cross_kv = look(spec, weights, dialect, out, encoded)
    left = [n for n in weights.unused() if not any(part in n for part in ("shared", "embed_tokens"))]
    assert not left, "a weight was left out"
    return Case(model, decoder, encoded, cross_kv)


def test_evened_columns_change_nothing(checkpoint: Any, tmp_path: Path) -> None:
    name, model, folder = checkpoint
    weights, config = open_weights(folder), model.config
    encoder, spec = PAIRS[name][2](ConfigReader("c", config.to_dict(), type(config)().to_dict()), weights)
    embeddings = model.get_input_embeddings().weight.detach().numpy()
    found = []
    for recipe in (RECIPES["fp32"], EVENED):
        decoder = open_decoder(spec, weights, "contrib", tmp_path, recipe=recipe)
        encoded = encode(encoder, weights, "contrib", tmp_path, embeddings[PROMPT], recipe)
        decoder.reset(CAPACITY)
        decoder.set_cross(look(spec, weights, "contrib", tmp_path, encoded, recipe))
        found.append((encoded, decoder.forward(embeddings[IDS]).copy()))
    for plain, evened in zip(*found, strict=True):
        assert_close(evened, plain, 1e-4)
        assert not np.array_equal(evened, plain), "nothing was evened out"


def reference(model: Any, pieces: list[list[int]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The encoder's output, and the logits after each piece."""
    with torch.no_grad():
        encoded = model.get_encoder()(torch.tensor([PROMPT]), return_dict=True)
        cache, logits = None, []
        for piece in pieces:
            out = model(
                encoder_outputs=encoded,
                decoder_input_ids=torch.tensor([piece]),
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            logits.append(out.logits[0, -1].numpy())
    return encoded.last_hidden_state.numpy(), logits


def test_encoder_prefill_chunk_decode_and_truncate(built: Case) -> None:
    embeddings = built.model.get_input_embeddings().weight.detach().numpy()
    pieces = [IDS[:5], IDS[5:9], *([token] for token in IDS[9:])]
    encoded, expected = reference(built.model, pieces)
    assert np.linalg.norm(built.encoded - encoded) <= 1e-4 * np.linalg.norm(encoded)
    cache = built.decoder.reset(CAPACITY)
    built.decoder.set_cross(built.cross_kv)
    for piece, logits in zip(pieces, expected, strict=True):
        assert_close(built.decoder.forward(embeddings[piece]), logits)
    cache.truncate(7)
    for piece in ([100, 101], [102]):
        ours = built.decoder.forward(embeddings[piece]).copy()
    assert_close(ours, reference(built.model, [IDS[:7], [100, 101], [102]])[1][-1])


MLLAMA_TEXT = {
    **SIZES,
    "num_hidden_layers": 5,
    "cross_attention_layers": [1, 3],
    "intermediate_size": 96,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Mllama:
    model: Any
    decoder: Decoder
    cross_kv: dict[str, np.ndarray]
    features: np.ndarray


def tiny_mllama(folder: Path) -> tuple[Any, Path]:
    """A random checkpoint whose tower is as small as it may be."""
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2}
    vision |= {"intermediate_size": 32, "vision_output_dim": 64, "image_size": 28, "patch_size": 14}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1}
    config = MllamaConfig(text_config=MLLAMA_TEXT, vision_config=vision, image_token_index=159)
    model = random_weights(MllamaForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model, folder


def spec_of_mllama(model: Any, weights: Weights) -> DecoderSpec:
    config = model.config.text_config
    reader = ConfigReader("config.json", config.to_dict(), type(config)().to_dict())
    new = "model.language_model.norm.weight" in weights
    prefix, head = ("model.language_model", "lm_head") if new else ("language_model.model", "language_model.lm_head")
    spec = decoder_for("mllama_text_model", reader, weights, Place(prefix, head), "model_type")
    reader.take("max_position_embeddings")
    reader.finish()
    return spec


@pytest.fixture(scope="module")
def mllama_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return tiny_mllama(tmp_path_factory.mktemp("mllama"))


@pytest.fixture(scope="module", params=DIALECTS)
def mllama(request: pytest.FixtureRequest, mllama_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Mllama:
    model, folder = mllama_checkpoint
    weights = open_weights(folder)
    spec = spec_of_mllama(model, weights)
    out, dialect = tmp_path_factory.mktemp(request.param), request.param
    decoder = open_decoder(spec, weights, dialect, out)
    features = np.random.default_rng(5).normal(size=(1, 6, 64)).astype(np.float32)
    cross_kv = look(spec, weights, dialect, out, features)
    left = [n for n in weights.unused() if not any(part in n for part in ("vision", "embed_tokens", "projector"))]
    assert not left, "a weight was left out"
    return Mllama(model, decoder, cross_kv, features)


def mllama_reference(model: Any, pieces: list[list[int]], features: Any, masks: list[Any]) -> list[np.ndarray]:
    """Logits after each piece; `masks`: for each, the bias [S, N] and the rows that look, [S, 1]."""
    cache, logits = None, []
    with torch.no_grad():
        for number, (piece, mask) in enumerate(zip(pieces, masks, strict=True)):
            states = torch.tensor(features) if features is not None and number == 0 else None
            bias, rows = (None, None) if mask is None else (torch.tensor(part)[None, None] for part in mask)
            out = model.model.language_model(
                input_ids=torch.tensor([piece]),
                cross_attention_states=states,
                cross_attention_mask=bias,
                full_text_row_masked_out_mask=rows,
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            logits.append(model.lm_head(out.last_hidden_state)[0, -1].numpy())
    return logits


def test_mllama_looks_at_features_where_its_mask_lets_it(mllama: Mllama) -> None:
    embeddings = mllama.model.get_input_embeddings().weight.detach().numpy()
    pieces = [IDS[:6], IDS[6:8], [IDS[8]], [IDS[9]]]
    # Tokens before the image look at nothing; the last two features belong to padding.
    masks = []
    for number, piece in enumerate(pieces):
        rows = np.ones((len(piece), 1), np.float32)
        bias = np.zeros((len(piece), 6), np.float32)
        bias[:, 4:] = -30000.0
        if number == 0:
            rows[:2] = 0
            bias[:2] = 0
        masks.append((bias, rows))
    expected = mllama_reference(mllama.model, pieces, mllama.features, masks)
    mllama.decoder.reset(CAPACITY)
    mllama.decoder.set_cross(mllama.cross_kv)
    for piece, (bias, rows), logits in zip(pieces, masks, expected, strict=True):
        per_token = {"cross_attention_bias": bias, "cross_attention_rows": rows}
        assert_close(mllama.decoder.forward(Encoded(embeddings[piece], per_token=per_token)), logits)


def test_tokens_behind_the_prompt_look_where_its_last_one_did(mllama: Mllama) -> None:
    """Step by step and in one run; a prompt with nothing to see comes between."""
    embeddings = mllama.model.get_input_embeddings().weight.detach().numpy()
    bias, rows = np.zeros((6, 6), np.float32), np.ones((6, 1), np.float32)
    bias[2:, 4:], rows[:2] = -30000.0, 0
    hidden = (bias[5:], rows[5:])
    expected = mllama_reference(
        mllama.model, [IDS[:6], [IDS[6]], [IDS[7]]], mllama.features, [(bias, rows), hidden, hidden]
    )
    per_token = {"cross_attention_bias": bias, "cross_attention_rows": rows}
    prompt = Encoded(embeddings[IDS[:6]], per_token=per_token, cross=mllama.cross_kv)
    plain = Encoded(embeddings[IDS[:7]])
    embed: Any = lambda ids: embeddings[ids]  # noqa: E731
    blind = along.steps(mllama.decoder, embed, plain, np.array(IDS[7:9]))
    for run in (along.steps, along.score):
        found = run(mllama.decoder, embed, prompt, np.array(IDS[6:9]))
        for logits, wanted in zip(found, expected, strict=True):
            assert_close(logits, wanted)
        np.testing.assert_array_equal(along.steps(mllama.decoder, embed, plain, np.array(IDS[7:9])), blind)


def test_a_snapshot_keeps_what_is_seen(mllama: Mllama) -> None:
    """Features, which of them, and where the last token looked; prompts with others and with none come between."""
    embeddings, decoder = mllama.model.get_input_embeddings().weight.detach().numpy(), mllama.decoder
    bias, rows = np.zeros((6, 6), np.float32), np.ones((6, 1), np.float32)
    bias[2:, 4:], rows[:2] = -30000.0, 0
    per_token = {"cross_attention_bias": bias, "cross_attention_rows": rows}
    seeing = Encoded(embeddings[IDS[:6]], per_token=per_token, cross=mllama.cross_kv)
    other = Encoded(embeddings[IDS[2:8]], cross={name: array[:, :, :3] for name, array in mllama.cross_kv.items()})
    blind = Encoded(embeddings[IDS[1:5]])
    assert mllama.cross_kv, "there is something to see"

    def following() -> np.ndarray:
        return np.stack([decoder.forward(embeddings[[token]]).copy() for token in IDS[6:9]])

    found = []
    for prompt in (seeing, blind):
        decoder.start(prompt, 8)
        decoder.forward(prompt)
        snapshot = decoder.snapshot()
        expected = following()
        found.append(expected)
        for between in (other, blind, seeing):
            decoder.start(between, 8)
            decoder.forward(between)
            decoder.restore(snapshot)
            np.testing.assert_array_equal(following(), expected)
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_a_first_prompt_with_nothing_to_see(mllama_checkpoint: Any, tmp_path: Path) -> None:
    model, folder = mllama_checkpoint
    weights = open_weights(folder)
    decoder = open_decoder(spec_of_mllama(model, weights), weights, "contrib", tmp_path)
    embeddings = model.get_input_embeddings().weight.detach().numpy()
    embed: Any = lambda ids: embeddings[ids]  # noqa: E731
    found = along.steps(decoder, embed, Encoded(embeddings[IDS[:7]]), np.array(IDS[7:9]))
    expected = mllama_reference(model, [IDS[:7], [IDS[7]]], None, [None] * 2)
    for logits, wanted in zip(found, expected, strict=True):
        assert_close(logits, wanted)


def test_evened_columns_change_nothing_of_mllama(mllama_checkpoint: Any, tmp_path: Path) -> None:
    model, folder = mllama_checkpoint
    weights = open_weights(folder)
    spec, found = spec_of_mllama(model, weights), []
    embeddings = model.get_input_embeddings().weight.detach().numpy()
    features = np.random.default_rng(5).normal(size=(1, 6, 64)).astype(np.float32)
    for recipe in (RECIPES["fp32"], EVENED):
        decoder = open_decoder(spec, weights, "contrib", tmp_path, recipe=recipe)
        decoder.reset(CAPACITY)
        decoder.set_cross(look(spec, weights, "contrib", tmp_path, features, recipe))
        found.append(decoder.forward(embeddings[IDS]).copy())
    assert_close(found[1], found[0], 1e-4)
    assert not np.array_equal(found[1], found[0]), "nothing was evened out"


def test_mllama_sees_all_features_without_a_mask(mllama: Mllama) -> None:
    embeddings = mllama.model.get_input_embeddings().weight.detach().numpy()
    pieces = [IDS[:5], [IDS[5]]]
    # Without a mask the source would take its attention for causal, so it gets one that hides nothing.
    masks = [(np.zeros((len(piece), 6), np.float32), np.ones((len(piece), 1), np.float32)) for piece in pieces]
    expected = mllama_reference(mllama.model, pieces, mllama.features, masks)
    mllama.decoder.reset(CAPACITY)
    mllama.decoder.set_cross(mllama.cross_kv)
    for piece, logits in zip(pieces, expected, strict=True):
        assert_close(mllama.decoder.forward(embeddings[piece]), logits)


def test_mllama_skips_the_layers_that_look_when_there_is_nothing_to_see(mllama: Mllama) -> None:
    embeddings = mllama.model.get_input_embeddings().weight.detach().numpy()
    pieces = [IDS[:7], [IDS[7]], [IDS[8]]]
    expected = mllama_reference(mllama.model, pieces, None, [None] * 3)
    mllama.decoder.reset(CAPACITY)
    mllama.decoder.set_cross(None)
    for piece, logits in zip(pieces, expected, strict=True):
        assert_close(mllama.decoder.forward(embeddings[piece]), logits)
