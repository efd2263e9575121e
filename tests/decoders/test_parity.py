"""Every decoder in every dialect against transformers in float32, on ONNX Runtime's CPU provider.

Prefill, a chunk, single steps and truncate-then-continue run through the shipping `Decoder` and its caches. Tolerance:
max|a − b| ≤ 1e-3 of the reference logits' range (seen: below 1e-6).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.export.datafile import DataFile
from mllm_edge.export.decoder.build import DIALECTS, build_decoder
from mllm_edge.export.decoder.dialects import contrib, opset17, opset24
from mllm_edge.export.decoder.llama import LLAMA_LIKE, llama_spec
from mllm_edge.export.graph import save_model, tensor_specs
from mllm_edge.export.safetensors import open_weights
from mllm_edge.export.source import ConfigReader
from mllm_edge.runtime.backend import open_backend
from mllm_edge.runtime.decoder import Decoder
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
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama_wide_heads": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}, head_dim=32, tie_word_embeddings=True),
    "mistral_window": MistralConfig(**SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
MINIMUM = {"contrib": contrib.MINIMUM, "opset24": opset24.MINIMUM, "opset17": opset17.MINIMUM}


@dataclass(frozen=True)
class Case:
    """A reference model and the decoder built from its checkpoint."""

    model: Any
    decoder: Decoder
    embeddings: np.ndarray

    def steps(self, pieces: list[list[int]]) -> np.ndarray:
        """Logits after the last of `pieces`, [V]."""
        return [self.decoder.forward(self.embeddings[piece]).copy() for piece in pieces][-1]

    def reference(self, ids: list[int]) -> np.ndarray:
        """The source model's logits after `ids`, [V]."""
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0, -1].numpy()


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        is_norm = "norm" in name
        weight.data = (1 if is_norm else 0) + 0.15 * torch.randn_like(weight)
    model.tie_weights()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(params=DIALECTS)
def case(request: pytest.FixtureRequest, checkpoint: tuple[Any, Path], tmp_path: Path) -> Case:
    model, folder = checkpoint
    config, weights = model.config, open_weights(folder)
    reader = ConfigReader("config.json", config.to_dict(), type(config)().to_dict())
    spec = llama_spec(reader, weights, "model", config.tie_word_embeddings, config.model_type)
    reader.take("max_position_embeddings")
    reader.finish()
    with DataFile(tmp_path / "decoder.onnx.data") as data:
        graph = build_decoder(spec, weights, RECIPES["fp32"], data, request.param)
    save_model(graph, tmp_path / "decoder.onnx")
    attention = spec.attention
    description = ModelSpec(
        family="test",
        model_type=config.model_type,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        context_length=CAPACITY,
        parameters=weights.parameters,
        embedding=EmbeddingSpec("", spec.vocab_size),
        positions=PositionSpec("rope", spec.rope, attention.window),
        cache=CacheSpec(spec.layers, attention.kv_heads, attention.head_dim),
        image=None,
    )
    variant = Variant(
        target="cpu",
        dialect=request.param,
        precision="float32",
        file="decoder.onnx",
        inputs=tensor_specs(graph.graph.inputs),
        outputs=tensor_specs(graph.graph.outputs),
        kv_mode=DIALECTS[request.param].kv_mode,
        minimum=MINIMUM[request.param],
    )
    backend = open_backend("cpu")
    decoder = Decoder(backend.open(tmp_path / "decoder.onnx", variant), variant, description, backend)
    decoder.reset(CAPACITY)
    return Case(model, decoder, model.get_input_embeddings().weight.detach().numpy())


def assert_close(ours: np.ndarray, reference: np.ndarray) -> None:
    assert np.abs(ours - reference).max() <= TOLERANCE * np.ptp(reference)


def test_prefill_chunk_decode_and_truncate(case: Case) -> None:
    ids = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
    assert_close(case.steps([ids[:5]]), case.reference(ids[:5]))
    assert_close(case.steps([ids[5:8]]), case.reference(ids[:8]))
    for end in range(9, len(ids) + 1):
        assert_close(case.steps([[ids[end - 1]]]), case.reference(ids[:end]))
    assert case.decoder.cache is not None
    case.decoder.cache.truncate(7)
    other = [*ids[:7], 100, 101, 102]
    assert_close(case.steps([[100, 101], [102]]), case.reference(other))


def test_snapshot_survives_another_sequence(case: Case) -> None:
    case.steps([[5, 6, 7]])
    assert case.decoder.cache is not None
    snapshot = case.decoder.cache.snapshot()
    expected = case.steps([[8], [9]])
    case.decoder.reset(CAPACITY)
    case.steps([[50, 51, 52, 53, 54]])
    case.decoder.cache.restore(snapshot)
    np.testing.assert_array_equal(case.steps([[8], [9]]), expected)


def test_every_llama_like_type_is_tested() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(LLAMA_LIKE)
