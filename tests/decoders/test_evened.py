"""Columns that are evened out change no decoder's function, and make what its blocks round smaller."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.export.checkpoint.safetensors import open_weights
from mllm_edge.export.decoders.evened import EvenedWeights
from mllm_edge.graph import rtn, searched
from mllm_edge.graph.precision import Precision
from mllm_edge.graph.rtn import quantize_blocks
from tests.decoders.models import (
    CAPACITY,
    CONFIGS,
    assert_close,
    decoder_spec,
    open_decoder,
    random_model,
    save_checkpoint,
    saved_model,
)

IDS = np.array([3, 14, 15, 92, 65, 35, 89])
EVENED = replace(RECIPES["fp32"], decoder=Precision("float32", method="evened"))
# The same function, by another order of roundings.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CONFIGS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return saved_model(request.param, folder), folder


def test_logits_stay(source: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = source
    weights = open_weights(folder)
    spec = decoder_spec(model.config, weights)
    embeds = np.random.default_rng(0).normal(size=(len(IDS), spec.hidden_size)).astype(np.float32)
    logits = []
    for name, recipe in (("plain", RECIPES["fp32"]), ("evened", EVENED)):
        decoder = open_decoder(spec, weights, "contrib", tmp_path / name, recipe=recipe)
        decoder.reset(CAPACITY)
        logits.append(decoder.forward(embeds).copy())
    assert_close(logits[1], logits[0], TOLERANCE)
    assert not np.array_equal(logits[0], logits[1]), "nothing was evened out"


def test_zeros_stay(tmp_path: Path) -> None:
    """Norms, rows and columns of nothing but zeros: no factor is infinite or nought."""
    model = random_model(CONFIGS["llama"])
    with torch.no_grad():
        first, second, third = model.model.layers
        first.input_layernorm.weight.zero_()
        first.post_attention_layernorm.weight[:7] = 0
        second.mlp.up_proj.weight[:5] = 0
        second.mlp.down_proj.weight[:, 3:9] = 0
        second.self_attn.v_proj.weight[:4] = 0
        for reader in (second.self_attn.q_proj, second.self_attn.k_proj, second.self_attn.v_proj):
            reader.weight[:, :3] = 0
        third.mlp.up_proj.weight.zero_()
        third.self_attn.o_proj.weight.zero_()
    save_checkpoint(model, tmp_path)
    weights = open_weights(tmp_path)
    spec = decoder_spec(model.config, weights)
    embeds = np.random.default_rng(0).normal(size=(len(IDS), spec.hidden_size)).astype(np.float32)
    logits = []
    for name, recipe in (("plain", RECIPES["fp32"]), ("evened", EVENED)):
        decoder = open_decoder(spec, weights, "contrib", tmp_path / name, recipe=recipe)
        logits.append(decoder.forward(embeds).copy())
    assert_close(logits[1], logits[0], TOLERANCE)


def test_uneven_columns_cost_no_bits(tmp_path: Path) -> None:
    """A Llama whose columns were rescaled, with the norms before them taking it back."""
    model = random_model(CONFIGS["llama"])
    generator = torch.Generator().manual_seed(0)
    rescale(model, lambda count: torch.exp(0.8 * torch.randn(count, generator=generator)))
    save_checkpoint(model, tmp_path)
    weights = open_weights(tmp_path)
    spec = decoder_spec(model.config, weights)
    evened, own = EvenedWeights(weights, spec), weights
    for part in ("q_proj", "up_proj", "down_proj"):
        name = f"{spec.names.layer[part].format(i=0)}.weight"
        before, after = (relative_error(tensors.use(name, weights.shape(name))()) for tensors in (own, evened))
        assert after < 0.8 * before, part


def rescale(model: Any, factors: Callable[[int], torch.Tensor]) -> None:
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                s = factors(len(norm.weight))
                norm.weight /= s
                for reader in readers:
                    reader.weight *= s
            s = factors(len(mlp.up_proj.weight))
            mlp.up_proj.weight /= s[:, None]
            mlp.down_proj.weight *= s


def relative_error(weight: np.ndarray) -> float:
    """Of four bits in blocks of 32, with columns alike in what they are worth."""
    rounded = dequantized(*quantize_blocks(weight, 4, 32))[:, : weight.shape[1]]
    columns = np.linalg.norm(weight, axis=0)
    return float(np.square((rounded - weight) / columns).sum())


def dequantized(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return ((codes.astype(np.float32) - 8) * scales[..., None]).reshape(len(codes), -1)


@pytest.mark.parametrize(("row", "block"), [(96, 32), (200, 64)])
@pytest.mark.parametrize("positive", [False, True])
def test_searched_scales_round_better(row: int, block: int, positive: bool) -> None:
    weight = np.random.default_rng(row).standard_normal((17, row)).astype(np.float32)
    weight[3] = 0
    found, nearest = (
        dequantized(*method.quantize_blocks(weight, 4, block, positive))[:, :row] for method in (searched, rtn)
    )
    loss = [(np.abs(weight) * np.square(rounded - weight)).sum(axis=1) for rounded in (found, nearest)]
    assert (loss[0] <= loss[1] * 1.0001).all()
    assert loss[0].sum() < 0.96 * loss[1].sum()
    codes, scales = searched.quantize_blocks(weight, 4, block, positive)
    assert codes.max() <= 15
    assert not positive or (scales >= 0).all()


def test_weights_on_the_grid_stay() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (5, 64)).astype(np.float32)
    codes[:, ::32] = -8
    weight = codes * np.float32(0.03)
    assert np.allclose(dequantized(*searched.quantize_blocks(weight, 4, 32)), weight, atol=1e-6)
