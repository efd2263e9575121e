"""The gate of standard-dialect graphs: the static check, and TensorRT for RTX as a witness."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from transformers import AutoModelForCausalLM, Qwen3Config

from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.errors import BackendError, ExportError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights, open_weights
from mllm_edge.export.decoders import llama
from mllm_edge.export.decoders.build import build_decoder
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.builder import save_model
from mllm_edge.graph.datafile import DataFile, DryFile
from mllm_edge.graph.decoder_spec import DecoderSpec
from mllm_edge.graph.dialects.known import DIALECTS
from mllm_edge.graph.gate import check_cuda_graph, check_graph, tensorrt_10_3_operators
from mllm_edge.runtime.backends.tensorrt_build import build, check_network, inspect_network
from mllm_edge.runtime.onnx_file.dimensions import fix_dimensions
from tests.decoders.engines import engine_inputs

LAYERS, CAPACITY = 2, 256
HALF = ir.DataType.FLOAT16
STANDARD = ("opset24", "opset17")
KEY = "past_key_values.0.key"  # a graph without caches may leave its mask out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[DecoderSpec, Weights]:
    """A tiny Qwen3 (all of Llama's parts and head norms); weights differ per layer, as TensorRT merges equal ones."""
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    folder = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(folder)
    weights = open_weights(folder)
    reader = ConfigReader("config.json", config.to_dict(), Qwen3Config().to_dict())
    return llama.spec(reader, weights, Place(), "qwen3"), weights


def write(folder: Path, source: tuple[DecoderSpec, Weights], dialect: str, recipe: str) -> Path:
    path = folder / f"{dialect}-{recipe}.onnx"
    with DataFile(folder / f"{path.name}.data") as data:
        model = build_decoder(*source, RECIPES[recipe], data, dialect, HALF)
    save_model(model, path)
    path.write_bytes(fix_dimensions(path.read_bytes(), {"capacity": CAPACITY}))  # TensorRT wants a number
    return path


@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("dialect", STANDARD)
def test_graphs_parse_and_build_for_every_generation(
    source: tuple[DecoderSpec, Weights], tmp_path: Path, dialect: str, recipe: str
) -> None:
    path = write(tmp_path, source, dialect, recipe)
    report = check_network(path, 2 * LAYERS if dialect == "opset24" else 0)
    assert report.layers.get("ATTENTION_INPUT", 0) == (LAYERS if dialect == "opset24" else 0)
    oldest = "SM80" if recipe == "int4" else "SM75"  # int4 weights need Ampere
    profiles, options = engine_inputs(ir.load(path).graph, path, dialect, CAPACITY)
    engine = build(path, profiles, [oldest, "SM86", "SM89", "SM120"], options=options)
    assert engine.nbytes > 10_000


def test_profile_that_lacks_an_input_is_named(source: tuple[DecoderSpec, Weights], tmp_path: Path) -> None:
    path = write(tmp_path, source, "opset17", "fp16")
    (whole, profile), _ = engine_inputs(ir.load(path).graph, path, "opset17", CAPACITY)
    profile.pop("cos")
    with pytest.raises(BackendError, match="lacks a range for input cos"):
        build(path, [profile], ["SM86"])
    with pytest.raises(BackendError, match="does not build for SM90"):
        build(path, [whole], ["SM90"])


def attention_model(folder: Path, inputs: list[str], **attributes: Any) -> Path:
    """One Attention node over a cache longer than the query."""
    shapes = {"q": (1, 2, 1, 32), KEY: (1, 2, 8, 32), "v": (1, 2, 8, 32), "bias": (1, 1, 1, 8)}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, s) for n, s in shapes.items() if n in inputs]
    if "length" in inputs:
        values.append(helper.make_tensor_value_info("length", TensorProto.INT64, (1,)))
    node = helper.make_node("Attention", inputs, ["y"], name="attention", **attributes)
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    path = folder / "attention.onnx"
    onnx.save(model, path)
    return path


def test_the_trap_is_real_and_the_gate_closes_it(tmp_path: Path) -> None:
    """TensorRT accepts both forms and does something else; the static check refuses both."""
    dropped = attention_model(tmp_path, ["q", KEY, "v", "", "", "", "length"], scale=0.2)
    assert inspect_network(dropped).unused_inputs == ("length",)
    with pytest.raises(ExportError, match="nonpad_kv_seqlen"):
        check_graph(ir.load(dropped), "opset24")
    misread = attention_model(tmp_path, ["q", KEY, "v"], scale=0.2, is_causal=1)
    assert len(inspect_network(misread).causal) == 1
    with pytest.raises(ExportError, match="is_causal"):
        check_graph(ir.load(misread), "opset24")


@pytest.mark.parametrize(
    ("inputs", "attributes", "word"),
    [
        (["q", KEY, "v"], {"scale": 0.2}, "no attention_bias"),
        (["q", KEY, "v", "bias"], {}, "no scale"),
        (["q", KEY, "v", "bias"], {"scale": 0.2, "softcap": 30.0}, "softcap"),
    ],
)
def test_attention_that_tensorrt_refuses_or_misreads(
    tmp_path: Path, inputs: list[str], attributes: dict[str, Any], word: str
) -> None:
    model = ir.load(attention_model(tmp_path, inputs, **attributes))
    with pytest.raises(ExportError, match=word):
        check_graph(model, "opset24")


def test_graph_within_the_rules_passes(tmp_path: Path) -> None:
    check_graph(ir.load(attention_model(tmp_path, ["q", KEY, "v", "bias"], scale=0.2)), "opset24")


def test_newer_and_foreign_operators_are_named(source: tuple[DecoderSpec, Weights]) -> None:
    with pytest.raises(ExportError, match=r"opset17: node .* is RMSNormalization"):
        check_graph(build_decoder(*source, RECIPES["fp32"], DryFile(), "opset24"), "opset17")
    contrib = build_decoder(*source, RECIPES["int4"], DryFile(), "contrib")
    with pytest.raises(ExportError, match="is SimplifiedLayerNormalization"):
        check_graph(contrib, "opset24")
    others = [node for node in contrib.graph if not node.domain]
    contrib.graph.remove(others, safe=False)
    with pytest.raises(ExportError, match=r"is com\.microsoft\.MatMulNBits"):
        check_graph(contrib, "opset24")


def test_opset17_imports_19_and_21_for_int4(source: tuple[DecoderSpec, Weights]) -> None:
    for recipe, opset in (("fp16", 19), ("int8", 19), ("int4", 21)):
        model = build_decoder(*source, RECIPES[recipe], DryFile(), "opset17", HALF)
        assert model.opset_imports == {"": opset}


def test_contrib_refuses_what_no_provider_has(source: tuple[DecoderSpec, Weights]) -> None:
    with pytest.raises(ExportError, match="BFLOAT16"):
        build_decoder(*source, RECIPES["fp16"], DryFile(), "contrib", ir.DataType.BFLOAT16)


def test_spans_need_a_newer_onnx_runtime(source: tuple[DecoderSpec, Weights]) -> None:
    """GroupQueryAttention's attribute `causal` came in 1.31."""
    spec, spans = source[0], replace(source[0], spans=True)
    assert DIALECTS["contrib"].minimum(spans) == {"onnxruntime": "1.31"}
    assert DIALECTS["contrib"].minimum(spec) == DIALECTS["contrib"].minimum(None) == {"onnxruntime": "1.23"}
    for dialect in ("opset24", "opset17"):
        assert DIALECTS[dialect].minimum(spans) == DIALECTS[dialect].minimum(None)


def test_operators_without_cuda_kernels_are_named(source: tuple[DecoderSpec, Weights]) -> None:
    """What the CPU's graphs hold, CUDA does not have: a bias in a product, 8-bit activations, a mask in attention."""
    for recipe in ("fp16", "int8", "int4"):
        check_cuda_graph(build_decoder(*source, RECIPES[recipe], DryFile(), "contrib", HALF))
    quantized = replace(RECIPES["int8"], decoder=RECIPES["int8"].vision)
    with pytest.raises(ExportError, match=r"is com\.microsoft\.DynamicQuantizeMatMul, which .* no half-precision CUDA"):
        check_cuda_graph(build_decoder(*source, quantized, DryFile(), "contrib"))
    spec, weights = source
    with pytest.raises(ExportError, match=r"GroupQueryAttention with attention_bias"):
        build_decoder(replace(spec, spans=True), weights, RECIPES["fp16"], DryFile(), "contrib", HALF)
    graph = build_decoder(*source, RECIPES["int4"], DryFile(), "contrib")
    node = next(node for node in graph.graph if node.op_type == "MatMulNBits")
    node.resize_inputs(6)
    node.replace_input_with(5, node.inputs[2])
    with pytest.raises(ExportError, match=r"MatMulNBits with bias"):
        check_cuda_graph(graph)


def test_what_tensorrt_misreads_is_refused(tmp_path: Path) -> None:
    dropped = attention_model(tmp_path, ["q", KEY, "v", "", "", "", "length"], scale=0.2)
    with pytest.raises(BackendError, match=r"input length is read by nothing"):
        check_network(dropped, 0)
    causal = attention_model(tmp_path, ["q", KEY, "v"], scale=0.2, is_causal=1)
    with pytest.raises(BackendError, match=r"causal mask of its own; 0 in-place caches, not 2"):
        check_network(causal, 2)


def test_the_operator_table_is_whole() -> None:
    operators = tensorrt_10_3_operators()
    assert len(operators) == 148
    assert {"MatMul", "Softmax", "GatherND", "LayerNormalization"} <= operators
    assert operators.isdisjoint({"Compress", "MatMulInteger", "Attention", "RMSNormalization"})
