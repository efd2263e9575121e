"""Every decoder in every dialect against transformers in float32, on ONNX Runtime's CPU provider.

Prefill, a chunk, single steps and truncate-then-continue run through the shipping `Decoder` and its caches; the
reference takes the same steps with its own cache. Tolerance: max|a − b| ≤ 1e-3 of the reference logits' range (seen:
below 1e-6).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PersimmonConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2VLTextConfig,
    Qwen3Config,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.errors import ExportError
from mllm_edge.export.datafile import DataFile
from mllm_edge.export.decoder.build import DIALECTS, build_decoder
from mllm_edge.export.decoder.dialects import contrib, opset17, opset24
from mllm_edge.export.decoder.internlm2 import internlm2_spec
from mllm_edge.export.decoder.llama import LLAMA_LIKE, llama_spec
from mllm_edge.export.decoder.opt import POSITION_OFFSET, opt_spec
from mllm_edge.export.decoder.persimmon import persimmon_spec
from mllm_edge.export.decoder.phi3 import phi3_spec
from mllm_edge.export.decoder.spec import DecoderSpec
from mllm_edge.export.graph import save_model, tensor_specs
from mllm_edge.export.safetensors import Weights, open_weights
from mllm_edge.export.source import ConfigReader
from mllm_edge.runtime.backend import open_backend
from mllm_edge.runtime.decoder import Decoder
from mllm_edge.runtime.generate import generate
from mllm_edge.runtime.sampling import Sampler, SamplingParams
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import CacheSpec, EmbeddingSpec, ModelSpec, PositionSpec, Variant

TOLERANCE = 1e-3
CAPACITY = 64
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# Ropes that change with the length do so beyond this one, in the middle of the test's sequence.
LIMIT = 8


def roped(kind: str, **parameters: Any) -> dict[str, Any]:
    """SIZES with a rope of this kind."""
    context = {"max_position_embeddings": LIMIT} if kind == "dynamic" else {}
    return {**SIZES, **context, "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **parameters}}


def longrope(pairs: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    return roped("longrope", **factors, original_max_position_embeddings=LIMIT)


INTERNLM2 = 159  # marks the configuration whose checkpoint is rewritten in InternLM2's layout
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama_wide_heads": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}, head_dim=32, tie_word_embeddings=True),
    "mistral_window": MistralConfig(**SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "internlm2": LlamaConfig(**SIZES, pad_token_id=INTERNLM2),
    "opt": OPTConfig(
        vocab_size=160,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        activation_function="gelu",
    ),
    "linear": LlamaConfig(**roped("linear", factor=3.0)),
    "dynamic": LlamaConfig(**roped("dynamic", factor=3.0)),
    "llama3": LlamaConfig(
        **roped("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=LIMIT)
    ),
    "yarn": LlamaConfig(
        **roped("yarn", factor=16.0, beta_fast=4, beta_slow=0.1, original_max_position_embeddings=LIMIT)
    ),
    "longrope": LlamaConfig(**longrope(8)),
    "persimmon": PersimmonConfig(
        **{**SIZES, "num_key_value_heads": 4, "hidden_size": 128},
        hidden_act="relu2",
        qk_layernorm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
    ),
    "phi3_partial": Phi3Config(
        **{**longrope(8), "hidden_size": 128},
        partial_rotary_factor=0.5,
        original_max_position_embeddings=LIMIT,
        pad_token_id=0,
    ),
}
MINIMUM = {"contrib": contrib.MINIMUM, "opset24": opset24.MINIMUM, "opset17": opset17.MINIMUM}


@dataclass(frozen=True)
class Case:
    """A reference model and the decoder built from its checkpoint."""

    model: Any
    decoder: Decoder
    embeddings: np.ndarray
    learned: np.ndarray | None = None  # position rows [P, H], which the host adds

    def steps(self, pieces: list[list[int]], **options: Any) -> np.ndarray:
        """Logits after the last of `pieces`, [V]."""
        return [self.decoder.forward(self.embeds(piece), **options).copy() for piece in pieces][-1]

    def embeds(self, ids: list[int]) -> np.ndarray:
        """Embeddings [S, H] of ids behind what the cache holds."""
        embeds = self.embeddings[ids]
        if self.learned is None:
            return embeds
        assert self.decoder.cache is not None
        start = self.decoder.cache.length
        return embeds + self.learned[start : start + len(ids)]

    def reference(self, pieces: list[list[int]]) -> list[np.ndarray]:
        """The source model's logits after each of `pieces`, fed one after the other, [V] each."""
        if self.learned is None:
            # Rotary modules remember the longest sequence they have seen.
            self.model.model.rotary_emb = type(self.model.model.rotary_emb)(self.model.config)
        logits, cache = [], None
        with torch.no_grad():
            for piece in pieces:
                out = self.model(torch.tensor([piece]), past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                logits.append(out.logits[0, -1].numpy())
        return logits


def random_model(config: Any) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        is_norm = "norm" in name
        weight.data = (1 if is_norm else 0) + 0.15 * torch.randn_like(weight)
    model.tie_weights()
    return model


def as_internlm2(folder: Path) -> None:
    """Rename and fuse a Llama checkpoint into InternLM2's layout: the same arithmetic, so Llama is its reference."""
    renamed = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "lm_head": "output",
        "embed_tokens": "tok_embeddings",
    }
    tensors = load_file(folder / "model.safetensors")
    for i in range(SIZES["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        query, key, value = (tensors.pop(f"{prefix}.self_attn.{part}_proj.weight") for part in "qkv")
        heads = [w.reshape(2, -1, 16, 64) for w in (query, key, value)]  # [key head, its heads, head_dim, hidden]
        tensors[f"{prefix}.attention.wqkv.weight"] = np.concatenate(heads, axis=1).reshape(-1, 64)
    for old, new in renamed.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = random_model(CONFIGS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    if request.param == "internlm2":
        as_internlm2(folder)
    return model, folder


def decoder_spec(config: Any, weights: Weights) -> DecoderSpec:
    reader = ConfigReader("config.json", config.to_dict(), type(config)().to_dict())
    families = {"opt": opt_spec, "persimmon": persimmon_spec, "phi3": phi3_spec}
    if config.model_type in families:
        prefix = "model.decoder" if config.model_type == "opt" else "model"
        spec = families[config.model_type](reader, weights, prefix, config.tie_word_embeddings)
        reader.take("max_position_embeddings")
    elif config.pad_token_id == INTERNLM2:
        spec = internlm2_spec(reader, weights, "model")
    else:
        spec = llama_spec(reader, weights, "model", config.tie_word_embeddings, config.model_type)
    reader.finish()
    return spec


def open_decoder(spec: DecoderSpec, weights: Weights, dialect: str, folder: Path) -> Decoder:
    """Write the graph of a float32 decoder into `folder` and open it."""
    with DataFile(folder / "decoder.onnx.data") as data:
        graph = build_decoder(spec, weights, RECIPES["fp32"], data, dialect)
    save_model(graph, folder / "decoder.onnx")
    attention = spec.attention
    description = ModelSpec(
        family="test",
        model_type="test",
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        context_length=CAPACITY,
        parameters=weights.parameters,
        embedding=EmbeddingSpec("", spec.vocab_size),
        positions=PositionSpec("rope" if spec.rope else "none", spec.rope, attention.window),
        cache=CacheSpec(spec.layers, attention.kv_heads, attention.head_dim),
        image=None,
    )
    variant = Variant(
        target="cpu",
        dialect=dialect,
        precision="float32",
        file="decoder.onnx",
        inputs=tensor_specs(graph.graph.inputs),
        outputs=tensor_specs(graph.graph.outputs),
        kv_mode=DIALECTS[dialect].kv_mode,
        minimum=MINIMUM[dialect],
    )
    backend = open_backend("cpu")
    decoder = Decoder(backend.open(folder / "decoder.onnx", variant), variant, description, backend)
    decoder.reset(CAPACITY)
    return decoder


@pytest.fixture(scope="module", params=DIALECTS)
def built(
    request: pytest.FixtureRequest, checkpoint: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    model, folder = checkpoint
    weights = open_weights(folder)
    spec = decoder_spec(model.config, weights)
    decoder = open_decoder(spec, weights, request.param, tmp_path_factory.mktemp(request.param))
    assert all("embed" in name or "positions" in name for name in weights.unused()), "a weight was left out"
    learned = None
    if model.config.model_type == "opt":
        learned = model.model.decoder.embed_positions.weight.detach().numpy()[POSITION_OFFSET:]
    return Case(model, decoder, model.get_input_embeddings().weight.detach().numpy(), learned)


@pytest.fixture
def case(built: Case) -> Case:
    """An empty sequence."""
    built.decoder.reset(CAPACITY)
    return built


def assert_close(ours: np.ndarray, reference: np.ndarray) -> None:
    assert np.abs(ours - reference).max() <= TOLERANCE * np.ptp(reference)


IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]


def test_prefill_chunk_decode_and_truncate(case: Case) -> None:
    pieces = [IDS[:5], IDS[5:LIMIT], *([token] for token in IDS[LIMIT:])]
    for piece, expected in zip(pieces, case.reference(pieces), strict=True):
        assert_close(case.steps([piece]), expected)
    assert case.decoder.cache is not None
    case.decoder.cache.truncate(7)
    other = [[100, 101], [102], [103]]
    assert_close(case.steps(other), case.reference([IDS[:7], *other])[-1])


def test_prompt_beyond_the_limit_whole_and_in_chunks(case: Case) -> None:
    expected = case.reference([IDS, [100]])[-1]
    assert_close(case.steps([IDS, [100]]), expected)
    case.decoder.reset(CAPACITY)
    case.steps([IDS[:5], IDS[5:]], length=len(IDS))
    assert_close(case.steps([[100]]), expected)


def test_generated_tokens_with_a_prompt_in_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_edge.runtime.generate.PREFILL_CHUNK", 5)
    embed: Any = lambda ids: case.embeds(ids.tolist())  # noqa: E731
    sampler = Sampler(SamplingParams(), IDS)
    tokens = list(generate(case.decoder, embed, case.embeds(IDS), sampler, (), 4, Trace()))
    expected = case.reference([IDS, *([token] for token in tokens)])
    assert tokens == [int(logits.argmax()) for logits in expected[:-1]]


def test_snapshot_survives_another_sequence(case: Case) -> None:
    case.steps([[5, 6, 7]])
    assert case.decoder.cache is not None
    snapshot = case.decoder.cache.snapshot()
    expected = case.steps([[8], [9]])
    case.decoder.reset(CAPACITY)
    case.steps([[50, 51, 52, 53, 54]])
    case.decoder.cache.restore(snapshot)
    np.testing.assert_array_equal(case.steps([[8], [9]]), expected)


class GivenPositions(torch.nn.Module):
    """Qwen2-VL's rotary embedding in a model that knows one axis only."""

    def __init__(self, parameters: dict[str, Any]):
        super().__init__()
        self.rotary = Qwen2VLRotaryEmbedding(Qwen2VLTextConfig(**SIZES, rope_parameters=parameters))
        self.positions = torch.zeros(3, 0)

    def forward(self, x: Any, position_ids: Any) -> Any:
        return self.rotary(x, self.positions[:, None])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_mrope_positions(dialect: str, tmp_path: Path) -> None:
    """Positions on three axes, many of them equal, in prefill, a chunk and single steps."""
    model = random_model(Qwen2Config(**SIZES))
    model.save_pretrained(tmp_path)
    weights = open_weights(tmp_path)
    spec = decoder_spec(model.config, weights)
    spec = replace(spec, rope=replace(spec.rope, sections=(2, 3, 3)))
    decoder = open_decoder(spec, weights, dialect, tmp_path)
    rotary = GivenPositions({"rope_type": "default", "rope_theta": spec.rope.theta, "mrope_section": [2, 3, 3]})
    model.model.rotary_emb = rotary
    embeddings = model.get_input_embeddings().weight.detach().numpy()
    positions = np.array([[0, 1, 1, 1, 1, 3, 4, 4, 4, 6, 7, 8], [0, 1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8], [0, *range(11)]])
    for start, end in [(0, 6), (6, 10), (10, 11), (11, 12)]:
        logits = decoder.forward(embeddings[IDS[start:end]], positions[:, start:end])
        rotary.positions = torch.tensor(positions[:, :end])
        with torch.no_grad():
            assert_close(logits, model(torch.tensor([IDS[:end]])).logits[0, -1].numpy())
    with pytest.raises(ValueError, match=r"positions \[3, 2\]"):
        decoder.forward(embeddings[:1], positions[:, :2])
    assert decoder.cache is not None
    assert decoder.cache.length == len(IDS)


def test_rope_that_contrib_cannot_turn(tmp_path: Path) -> None:
    model = random_model(LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path)
    weights = open_weights(tmp_path)
    spec = decoder_spec(model.config, weights)
    with pytest.raises(ExportError, match="8 elements of a head"):
        open_decoder(replace(spec, rope=replace(spec.rope, dim=8)), weights, "contrib", tmp_path)


def test_every_llama_like_type_is_tested() -> None:
    assert {config.model_type for config in CONFIGS.values()} - {"opt", "persimmon"} == set(LLAMA_LIKE)
