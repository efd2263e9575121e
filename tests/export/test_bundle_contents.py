"""What an export writes."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.export.pipeline import export
from tests.tiny import save_tiny_idefics3

GRAPHS = ("vision_encoder", "connector", "decoder")


def test_files_of_a_bundle(tiny_bundle: Path) -> None:
    names = {p.name for p in tiny_bundle.iterdir()}
    graphs = {f"{g}.onnx" for g in GRAPHS} | {f"{g}.onnx.data" for g in GRAPHS}
    others = {"manifest.json", "embed_tokens.npy", "tokenizer.json", "chat_template.jinja", "generation.json"}
    assert names == graphs | others


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_are_valid_and_tell_nothing_of_the_machine(tiny_bundle: Path, graph: str) -> None:
    path = tiny_bundle / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    assert model.producer_name == "mllm-edge"
    assert str(Path.cwd()).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()
    variant = Bundle.load(tiny_bundle).variant(graph, "cpu")
    assert [i.name for i in model.graph.input] == [spec.name for spec in variant.inputs]
    assert [o.name for o in model.graph.output] == [spec.name for spec in variant.outputs]


def test_operators_are_the_fused_ones(tiny_bundle: Path) -> None:
    def count(graph: str, op: str) -> int:
        model = onnx.load(tiny_bundle / f"{graph}.onnx", load_external_data=False)
        return sum(node.op_type == op for node in model.graph.node)

    assert count("decoder", "GroupQueryAttention") == 2
    assert count("decoder", "SkipSimplifiedLayerNormalization") == 4
    assert count("vision_encoder", "MultiHeadAttention") == 2


@pytest.mark.parametrize(
    ("recipe", "decoder_op", "vision_op"),
    [
        ("fp32", "MatMul", "MatMul"),
        ("fp16", "Cast", "Cast"),
        ("int8", "MatMulNBits", "DynamicQuantizeMatMul"),
        ("int4", "MatMulNBits", "DynamicQuantizeMatMul"),
    ],
)
def test_recipes_write_their_own_linear_layers(
    tiny_checkpoint: Path, tmp_path: Path, recipe: str, decoder_op: str, vision_op: str
) -> None:
    out = tmp_path / recipe
    report = export(str(tiny_checkpoint), out, recipe_name=recipe)
    for graph, op, linears in (("decoder", decoder_op, 2 * 6 + 1), ("vision_encoder", vision_op, 2 * 4)):
        model = onnx.load(out / f"{graph}.onnx", load_external_data=False)
        assert sum(node.op_type == op for node in model.graph.node) == linears
    if recipe == "int4":
        bits = [a.i for n in model.graph.node for a in n.attribute if a.name == "bits"]
        assert not bits  # the vision encoder has no blocks
        decoder = onnx.load(out / "decoder.onnx", load_external_data=False)
        by_name = {n.name: {a.name: a.i for a in n.attribute} for n in decoder.graph.node}
        assert by_name["lm_head"]["bits"] == 8
        assert by_name["layers.0.gate_proj"]["bits"] == 4
        assert by_name["layers.0.down_proj"]["block_size"] == 128
        assert by_name["layers.0.o_proj"]["block_size"] == 64
    names = {"vision_encoder", "connector", "prefill_logits", "decode_logits"}
    assert report.parity["errors"].keys() == names
    # Quantized graphs are judged by their loss; the limits are those of the same graphs in float32.
    proven = report.parity["float32"] if report.loss else report.parity
    assert proven["limits"].keys() == proven["errors"].keys() == names
    assert proven is report.parity or not report.parity["limits"]
    assert bool(report.loss) == (recipe in ("int8", "int4"))


def test_more_bits_mean_less_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    errors, sizes = {}, {}
    for recipe in ("fp32", "fp16", "int8", "int4"):
        report = export(str(tiny_checkpoint), tmp_path / recipe, recipe_name=recipe)
        errors[recipe] = report.parity["errors"]["prefill_logits"]
        sizes[recipe] = report.components["decoder"]
    assert errors["fp32"] < 1e-5 < errors["fp16"] < errors["int8"] < errors["int4"] < 0.3
    assert sizes["fp32"] > sizes["fp16"] > sizes["int8"] > sizes["int4"]


def test_embeddings_keep_half_precision_where_it_is_exact(tmp_path: Path) -> None:
    model = save_tiny_idefics3(tmp_path / "full")
    expected = model.get_input_embeddings().weight.detach().numpy().copy()
    model.half().save_pretrained(tmp_path / "half")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "half" / name).write_bytes((tmp_path / "full" / name).read_bytes())
    for name, dtype in (("full", np.float32), ("half", np.float16)):
        export(str(tmp_path / name), tmp_path / f"{name}-out", recipe_name="fp32", verify_mode="off")
        table = Bundle.load(tmp_path / f"{name}-out").embeddings()
        assert table.dtype == dtype
        assert np.array_equal(table, expected.astype(dtype))


def test_bfloat16_checkpoint(tmp_path: Path) -> None:
    import torch

    model = save_tiny_idefics3(tmp_path / "full").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "bf16" / name).write_bytes((tmp_path / "full" / name).read_bytes())
    report = export(str(tmp_path / "bf16"), tmp_path / "out", recipe_name="fp32", verify_mode="full")
    assert report.parity["errors"]["decode_logits"] < 1e-4
    assert report.parity["greedy_agreement"] == 1.0
