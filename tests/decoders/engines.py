"""What the product builds an engine of a graph with, for graphs that are in no bundle."""

from pathlib import Path

import onnx_ir as ir

from mllm_edge.graph.builder import tensor_specs
from mllm_edge.graph.dialects.known import DIALECTS
from mllm_edge.graph.ranges import CROSS_KV, TEXT_ENCODER, decoder_ranges, used_ranges
from mllm_edge.runtime.backends.tensorrt_build import Options, Range
from mllm_edge.runtime.backends.tensorrt_engines import Limits, build_inputs
from mllm_edge.spec import Variant

__all__ = ["engine_inputs"]


def engine_inputs(graph: ir.Graph, path: Path, dialect: str, max_seq: int) -> tuple[list[dict[str, Range]], Options]:
    """Profiles and options for the graph of a decoder, text encoder or cross_kv in a standard dialect."""
    inputs, kv_mode = tensor_specs(graph.inputs), DIALECTS[dialect].kv_mode
    parts = {"decoder": decoder_ranges(kv_mode), "text_encoder": TEXT_ENCODER, "cross_kv": CROSS_KV}
    variant = Variant(
        target={"opset24": "tensorrt", "opset17": "tensorrt-10.3"}[dialect],
        dialect=dialect,  # type: ignore[arg-type]
        precision="float16",
        file=path.name,
        inputs=inputs,
        outputs=tensor_specs(graph.outputs),
        kv_mode=kv_mode if graph.name == "decoder" else None,
        ranges=used_ranges(inputs, parts[str(graph.name)]),
    )
    return build_inputs(variant, Limits(max_seq))
