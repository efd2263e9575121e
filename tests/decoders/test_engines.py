"""Every decoder in half precision: its graph on ONNX Runtime's CPU provider, and engines of TensorRT for RTX.

float16 against the float32 graph: max|a − b| ≤ 2e-2 of the logits' range over prefill, chunk and steps (a mixture of
experts excepted, whose choice of experts may tip: only where it does not). Engines are built ahead of time for Turing,
Ampere, Ada and Blackwell; nothing is executed.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.errors import ExportError
from mllm_edge.export.checkpoint.safetensors import Weights, open_weights
from mllm_edge.export.decoders.build import build_cross_kv, build_decoder, build_text_encoder
from mllm_edge.graph.builder import save_model
from mllm_edge.graph.datafile import DataFile, DryFile
from mllm_edge.graph.decoder_spec import DecoderSpec
from mllm_edge.runtime.backends.tensorrt_build import build
from tests.decoders import test_cross_attention as cross
from tests.decoders.engines import engine_inputs
from tests.decoders.models import (
    CAPACITY,
    CONFIGS,
    assert_close,
    decoder_spec,
    open_decoder,
    random_model,
    save_checkpoint,
    saved_model,
    widen_sums,
)

STANDARD = ("opset24", "opset17")
HALF, WIDE, BRAIN = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BFLOAT16
CAPABILITIES = ["SM75", "SM86", "SM89", "SM120"]
AMPERE_ON = ["SM80", "SM86", "SM89", "SM120"]
IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32]
# Ropes differ on the host only: one of the Llamas stands for all.
SAME_GRAPH = ("linear", "dynamic", "llama3", "yarn", "longrope", "internlm2", "qwen2_moe_renormalized")
NAMES = [name for name in CONFIGS if name not in SAME_GRAPH]
TOLERANCE = 2e-2


@pytest.fixture(scope="module", params=NAMES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DecoderSpec, Weights]:
    folder = tmp_path_factory.mktemp(request.param)
    model = saved_model(request.param, folder)
    weights = open_weights(folder)
    options = {"spans": True} if request.param == "gemma3" else {}
    spec = decoder_spec(model.config, weights, **options)
    return replace(spec, deepstack=(0, 1)) if request.param == "qwen3_vl" else spec, weights


def build_engine(
    model: ir.Model, folder: Path, updates: int, dialect: str, capabilities: list[str] = CAPABILITIES
) -> int:
    """Bytes of the engine of a graph whose weights are in `folder` already; the parsed network is checked first."""
    path = folder / f"{model.graph.name}.onnx"
    save_model(model, path)
    profiles, options = engine_inputs(model.graph, path, dialect, CAPACITY)
    assert options.cache_updates == updates
    return build(path, profiles, capabilities, options=options).nbytes


@pytest.mark.parametrize("dialect", STANDARD)
def test_engines_build(source: tuple[DecoderSpec, Weights], dialect: str, tmp_path: Path) -> None:
    with DataFile(tmp_path / "d.data") as data:
        graph = build_decoder(*source, RECIPES["fp16"], data, dialect, HALF)
    assert build_engine(graph, tmp_path, 2 * source[0].cached if dialect == "opset24" else 0, dialect) > 10_000


@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4"])
def test_every_operator_has_a_cuda_kernel(source: tuple[DecoderSpec, Weights], recipe: str) -> None:
    """Which the builder checks; a mask that is more than causal or windowed has none."""
    refused = pytest.raises(ExportError, match="GroupQueryAttention with attention_bias")
    with refused if source[0].spans else nullcontext():
        build_decoder(*source, RECIPES[recipe], DryFile(), "contrib", HALF)


def test_half_precision_on_the_cpu(source: tuple[DecoderSpec, Weights], tmp_path: Path) -> None:
    spec, weights = source
    embeds = 0.4 * np.random.default_rng(0).normal(size=(len(IDS), spec.hidden_size)).astype(np.float32)
    pieces = [slice(0, 5), slice(5, 7), slice(7, 8), slice(8, 9)]

    def steps(folder: str, *options: Any) -> list[np.ndarray]:
        (tmp_path / folder).mkdir()
        decoder = open_decoder(spec, weights, *options[:1], tmp_path / folder, *options[1:])
        assert decoder.cache is not None
        size = 2 if HALF in options else 4
        heads = 2 * spec.cached * CAPACITY * spec.attention.kv_heads * spec.attention.head_dim
        twice = 0 if spec.conv is None else 2 * spec.convolved * (spec.conv.width - 1) * spec.hidden_size
        assert decoder.cache.nbytes == (heads + twice) * size
        return [decoder.forward(embeds[piece]).copy() for piece in pieces]

    expected = steps("float", "opset17", WIDE)
    for dialect in STANDARD:
        for wide in (False, True):
            found = steps(f"{dialect}-{wide}", dialect, HALF, wide)
            for a, b in zip(found, expected, strict=True):
                assert_close(a, b, TOLERANCE if spec.moe is None else 0.3)


@pytest.mark.parametrize(("recipe", "least", "part"), [("int8", 0.99, 0.77), ("int4", 0.6, 0.69)])
def test_rounded_weights_on_the_cpu(
    source: tuple[DecoderSpec, Weights], recipe: str, least: float, part: float, tmp_path: Path
) -> None:
    """Both standard dialects hold the same codes; logits stay correlated with the unrounded decoder's (seen: 0.997 and
    0.73: rows of 64 random weights leave little to average). In half precision ONNX Runtime's kernel for blocks rounds
    inputs to 8 bits, and a value in half falls to the other side now and then (seen: 0.06). Each array begins on a page
    of 4 KiB, which is a part of files as small as these."""
    spec, weights = source
    embeds = 0.4 * np.random.default_rng(0).normal(size=(len(IDS), spec.hidden_size)).astype(np.float32)

    def logits(dialect: str, kind: ir.DataType, name: str) -> tuple[np.ndarray, int]:
        folder = tmp_path / f"{dialect}-{kind.name}-{name}"
        folder.mkdir()
        decoder = open_decoder(spec, weights, dialect, folder, kind, recipe_name=name)
        found = np.stack([decoder.forward(embeds[piece]).copy() for piece in (slice(0, 5), slice(5, 8), slice(8, 9))])
        return found, (folder / "decoder.onnx.data").stat().st_size

    whole, nbytes = logits("opset17", HALF, "fp16")
    rounded, _ = logits("opset17", WIDE, recipe)
    chosen = whole > -1e4
    assert np.corrcoef(rounded[chosen], whole[chosen])[0, 1] >= least
    other, _ = logits("opset24", WIDE, recipe)
    assert_close(other, rounded, TOLERANCE if spec.moe is None else 0.3)
    for dialect in STANDARD:
        half, size = logits(dialect, HALF, recipe)
        assert_close(half, rounded, 0.1 if spec.moe is None else 0.5)
        assert size < part * nbytes


@pytest.mark.parametrize("dialect", STANDARD)
@pytest.mark.parametrize("recipe", ["int8", "int4"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_rounded_experts_build(name: str, recipe: str, dialect: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    save_checkpoint(model, tmp_path)
    weights = open_weights(tmp_path)
    spec = decoder_spec(model.config, weights)
    with DataFile(tmp_path / "d.data") as data:
        graph = build_decoder(spec, weights, RECIPES[recipe], data, dialect, HALF)
    updates = 2 * spec.cached if dialect == "opset24" else 0
    assert build_engine(graph, tmp_path, updates, dialect, AMPERE_ON) > 10_000


@pytest.mark.parametrize("dialect", STANDARD)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_bfloat16_and_wide_sums_build(name: str, dialect: str, tmp_path: Path) -> None:
    """bfloat16 needs Ampere; models that overflow half precision get float32 sums."""
    model = random_model(CONFIGS[name])
    save_checkpoint(model, tmp_path)
    weights = open_weights(tmp_path)
    spec = decoder_spec(model.config, weights)
    updates = 2 * spec.cached if dialect == "opset24" else 0
    for kind in (BRAIN, HALF):
        folder = tmp_path / kind.name
        folder.mkdir()
        with DataFile(folder / "d.data") as data:
            graph = build_decoder(spec, weights, RECIPES["fp16"], data, dialect, kind)
        if kind == HALF:
            widen_sums(graph)
        assert build_engine(graph, folder, updates, dialect, AMPERE_ON) > 10_000


@pytest.mark.parametrize("dialect", STANDARD)
@pytest.mark.parametrize("name", cross.PAIRS)
def test_encoder_decoder_engines_build(name: str, dialect: str, tmp_path: Path) -> None:
    architecture, config, specs = cross.PAIRS[name]
    cross.random_weights(architecture(config)).save_pretrained(tmp_path)
    weights = open_weights(tmp_path)
    encoder, spec = specs(cross.ConfigReader("config.json", config.to_dict(), {}), weights)
    with DataFile(tmp_path / "e.data") as data:
        graph = build_text_encoder(encoder, weights, RECIPES["fp16"], data, dialect, HALF)
    build_engine(graph, tmp_path, 0, dialect)
    build_cross_attention(spec, weights, dialect, tmp_path)


@pytest.mark.parametrize("dialect", STANDARD)
@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4"])
def test_mllama_engines_build(
    mllama_source: tuple[DecoderSpec, Weights], recipe: str, dialect: str, tmp_path: Path
) -> None:
    build_cross_attention(*mllama_source, dialect, tmp_path, recipe)


@pytest.fixture(scope="module")
def mllama_source(tmp_path_factory: pytest.TempPathFactory) -> tuple[DecoderSpec, Weights]:
    model, folder = cross.tiny_mllama(tmp_path_factory.mktemp("mllama"))
    weights = open_weights(folder)
    return cross.spec_of_mllama(model, weights), weights


def build_cross_attention(
    spec: DecoderSpec, weights: Weights, dialect: str, folder: Path, recipe: str = "fp16"
) -> None:
    capabilities = CAPABILITIES if recipe == "fp16" else AMPERE_ON
    with DataFile(folder / "c.data") as data:
        graph = build_cross_kv(spec, weights, RECIPES[recipe], data, dialect, HALF)
    build_engine(graph, folder, 0, dialect, capabilities)
    with DataFile(folder / "d.data") as data:
        graph = build_decoder(spec, weights, RECIPES[recipe], data, dialect, HALF)
    build_engine(graph, folder, 2 * spec.cached if dialect == "opset24" else 0, dialect, capabilities)
