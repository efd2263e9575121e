"""The layers of decoders and text encoders, written once; a dialect supplies the operators."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from mllm_edge.calibration.recipes import Recipe, precision_of
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.evened import EvenedWeights
from mllm_edge.export.decoders.moe import dense_routing
from mllm_edge.graph import operators
from mllm_edge.graph.decoder_spec import AttentionSpec, Branch, DecoderSpec, EncoderSpec, LayerSpec, NormSpec
from mllm_edge.graph.dialects import base
from mllm_edge.graph.dialects.base import Dialect, Norm, SelfAttention
from mllm_edge.graph.linear import Linear, by_weights, linear, to_float
from mllm_edge.graph.precision import FLOAT32
from mllm_edge.spec import CROSS_BIAS, CROSS_ROWS, cross_names, state_input

__all__ = ["Layers", "Stream"]

_FLOAT = ir.DataType.FLOAT
Factor = float | np.ndarray  # of all rows of a matrix, or of each


class Stream:
    """The residual stream: `pending` is the last branch's output, not yet added to `residual`, so that the sum and the
    norm that follows can be one operator."""

    def __init__(self, ops: Dialect, hidden: ir.Value):
        self._ops, self.pending, self.residual = ops, hidden, None  # type: Dialect, ir.Value, ir.Value | None

    def total(self, name: str) -> ir.Value:
        """The stream itself."""
        return self._ops.add(name, self.pending, self.residual)

    def normed(self, name: str, norm: Norm) -> tuple[ir.Value, ir.Value]:
        """The stream normalized, and the stream."""
        return self._ops.norm(name, norm, self.pending, self.residual)

    def pick(self, indices: ir.Value) -> None:
        """Keep the rows at `indices` [B, K] only."""
        graph = self._ops.graph
        self.pending = operators.pick_rows(graph, "hidden.rows", self.pending, indices)
        if self.residual is not None:
            self.residual = operators.pick_rows(graph, "residual.rows", self.residual, indices)


class Layers:
    """The parts of a layer, with names `layers.N.part` in the graph."""

    def __init__(self, ops: Dialect, spec: DecoderSpec | EncoderSpec, weights: Weights, recipe: Recipe):
        self._ops, self._spec, self._recipe = ops, spec, recipe
        evened = recipe.decoder.method == "evened"
        self._weights: Weights | EvenedWeights = EvenedWeights(weights, spec) if evened else weights
        self._cached = self._crossed = 0
        self._read: ir.Value | None = None  # the input of the last branch
        self.recurrent: list[ir.Value] = []  # what the recurrent state becomes, layer by layer

    def branch(self, stream: Stream, i: int, layer: LayerSpec, branch: Branch, inputs: "dict[str, ir.Value]") -> None:
        """Append one residual branch of layer i; `inputs` are the graph's, by name."""
        ops, name = self._ops, f"layers.{i}.{branch.kind}"
        if branch.beside:
            assert self._read is not None
            x, total = self._read, stream.total(f"{name}.beside")
        elif branch.pre is not None:
            x, total = stream.normed(f"layers.{i}.{branch.pre}", self.norm(i, branch.pre))
        else:
            x = total = stream.total(f"{name}.input")
        self._read = x
        out = self._output(i, layer, branch, x, inputs)
        if branch.silenced:
            out = ops.graph.node("Mul", [out, inputs[CROSS_ROWS]], f"{name}.silenced")
        if branch.post is not None:
            out, _ = ops.norm(f"layers.{i}.{branch.post}", self.norm(i, branch.post), out, None)
        stream.pending, stream.residual = out, total
        if branch.after is not None:
            stream.pending, _ = stream.normed(f"layers.{i}.{branch.after}", self.norm(i, branch.after))
            stream.residual = None

    def norm(self, i: int, part: str) -> Norm:
        """The norm `part` of layer i over hidden states."""
        return self.stream_norm(self._name(i, part))

    def stream_norm(self, name: str, factor: float = 1.0) -> Norm:
        """A norm of the residual stream; `factor` multiplies what it returns."""
        return self._norm(name, self._spec.norm, (self._spec.hidden_size,), factor)

    def cross_kv(self, i: int, features: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Keys and values [B, Hkv, N, D] of layer i's cross-attention over features [B, N, features]."""
        cross = self._spec.cross if isinstance(self._spec, DecoderSpec) else None
        assert cross is not None
        spec, graph, name = cross.attention, self._ops.graph, f"layers.{i}.cross"
        rows = spec.kv_heads * spec.head_dim
        sources = [self._name(i, f"cross_{part}_proj") for part in "kv"]
        both = self._project(features, f"{name}.kv_proj", sources, [rows, rows], cross.features, spec.qkv_bias)
        sizes = graph.constant("cross.sizes", np.array([rows, rows], np.int64))
        key, value = graph.nodes("Split", [both, sizes], f"{name}.kv", outputs=2, axis=-1)
        key = operators.reshape(graph, f"{name}.key.heads", key, (0, 0, -1, spec.head_dim))
        value = operators.reshape(graph, f"{name}.value.heads", value, (0, 0, -1, spec.head_dim))
        if spec.qk_norm is not None:
            norm = self._norm(self._name(i, "cross_k_norm"), spec.qk_norm, (spec.head_dim,))
            key = base.normed_heads(self._ops, f"{name}.k_norm", norm, key)
        return tuple(operators.heads_first(graph, f"{name}.{p}", x) for p, x in (("key", key), ("value", value)))  # type: ignore[return-value]

    def linear(
        self,
        name: str,
        sources: list[str],
        rows: list[int],
        row: int,
        bias: bool | Callable[[], np.ndarray],
        factor: Factor = 1.0,
    ) -> Linear:
        """One layer whose weight is the `sources` stacked along the output axis, times `factor`, one for all or each of
        its rows; `bias`: whether the sources have one, or the vector itself."""
        parts = [self._weights.use(f"{s}.weight", (n, row)) for s, n in zip(sources, rows, strict=True)]
        vector = bias if callable(bias) else None
        if bias is True:
            biases = [self._weights.use(f"{s}.bias", (n,)) for s, n in zip(sources, rows, strict=True)]
            vector = lambda: _times(np.concatenate([b() for b in biases]), factor)  # noqa: E731
        read = lambda: _times(parts[0]() if len(parts) == 1 else np.concatenate([p() for p in parts]), factor)  # noqa: E731
        return Linear(name, (sum(rows), row), read, vector)

    def _output(self, i: int, layer: LayerSpec, branch: Branch, x: ir.Value, inputs: "dict[str, ir.Value]") -> ir.Value:
        """What a branch makes of its (normalized) input."""
        factor: Factor = self._spec.residual_scale if isinstance(self._spec, DecoderSpec) else 1.0
        if branch.gate is not None:
            factor = factor * self._gate(self._name(i, branch.gate))
        if branch.kind == "mlp":
            return self._mlp(i, x, factor)
        assert branch.kind not in ("moe", "conv") or _is_one(factor), "a scale is folded into one last layer"
        if branch.kind == "moe":
            return self._moe(i, x)
        if branch.kind == "conv":
            return self._convolution(i, x, inputs)
        if branch.kind == "cross_attention":
            return self._cross_attention(i, x, inputs, factor)
        return self._self_attention(i, layer, x, inputs, factor)

    def _gate(self, name: str) -> Factor:
        """tanh of the tensor, one number or [.., H]."""
        shape = self._weights.shape(name)
        values = np.tanh(self._weights.use(name, shape if shape[-1:] == (self._spec.hidden_size,) else (1,))())
        return float(values[0]) if values.shape == (1,) else values.reshape(-1)

    def _self_attention(
        self, i: int, layer: LayerSpec, x: ir.Value, inputs: "dict[str, ir.Value]", factor: Factor
    ) -> ir.Value:
        """Projections (q and k packed; v apart, for it may need more bits), attention (over the cache, in a decoder),
        output projection."""
        spec, name, width = self._spec.attention, f"layers.{i}.attention", self._spec.hidden_size
        rows = [n * spec.head_dim for n in (spec.heads, spec.kv_heads)]
        names = [self._name(i, part) for part in ("q_proj", "k_proj")]
        query_key = self._project(x, f"layers.{i}.qk_proj", names, rows, width, spec.qkv_bias)
        value = self._project(x, f"layers.{i}.v_proj", [self._name(i, "v_proj")], rows[1:], width, spec.qkv_bias)
        if isinstance(self._spec, EncoderSpec):
            attended = self._bidirectional(name, spec, query_key, value, inputs["attention_bias"])
        else:
            cache, self._cached = self._cached, self._cached + 1
            described = SelfAttention(name, cache, layer.rope, layer.window, self._qk_norm(i, spec))
            attended = self._ops.self_attention(described, query_key, value)
        out = self._name(i, "o_proj")
        return self._to_hidden(attended, f"layers.{i}.o_proj", out, rows[0], spec.output_bias, factor)

    def _bidirectional(
        self, name: str, spec: AttentionSpec, query_key: ir.Value, values: ir.Value, bias: ir.Value
    ) -> ir.Value:
        graph = self._ops.graph
        query, keys = operators.split_query_key(graph, name, query_key, spec)
        key, value = (
            operators.heads_first(
                graph, f"{name}.{p}", operators.reshape(graph, f"{name}.{p}.heads", x, (0, 0, -1, spec.head_dim))
            )
            for p, x in zip(("key", "value"), (keys, values), strict=True)
        )
        return self._ops.attention(name, spec, query, key, value, bias)

    def _cross_attention(self, i: int, x: ir.Value, inputs: "dict[str, ir.Value]", factor: Factor) -> ir.Value:
        cross = self._spec.cross if isinstance(self._spec, DecoderSpec) else None
        assert cross is not None
        spec, name, graph = cross.attention, f"layers.{i}.cross_attention", self._ops.graph
        rows, number = spec.heads * spec.head_dim, self._crossed
        self._crossed += 1
        source = [self._name(i, "cross_q_proj")]
        query = self._project(x, f"layers.{i}.cross_q_proj", source, [rows], self._spec.hidden_size, spec.qkv_bias)
        if spec.qk_norm is not None:
            norm = self._norm(self._name(i, "cross_q_norm"), spec.qk_norm, (spec.head_dim,))
            heads = operators.reshape(graph, f"{name}.q_norm.heads", query, (0, 0, -1, spec.head_dim))
            query = operators.merge_heads(
                graph, f"{name}.q_norm.merged", base.normed_heads(self._ops, f"{name}.q_norm", norm, heads)
            )
        key, value = (inputs[tensor] for tensor in cross_names(number))
        attended = self._ops.attention(name, spec, query, key, value, inputs[CROSS_BIAS])
        out = self._name(i, "cross_o_proj")
        return self._to_hidden(attended, f"layers.{i}.cross_o_proj", out, rows, spec.output_bias, factor)

    def _convolution(self, i: int, x: ir.Value, inputs: "dict[str, ir.Value]") -> ir.Value:
        """Each channel's last values, those of the state before the new ones, as a sum of shifted products: operators
        that every runtime has in every type."""
        spec = self._spec.conv if isinstance(self._spec, DecoderSpec) else None
        assert spec is not None
        graph, name, width = self._ops.graph, f"layers.{i}.conv", self._spec.hidden_size
        before, after, values = (
            self._project(x, f"{name}_{part}_proj", [self._name(i, f"conv_{part}_proj")], [width], width, spec.bias)
            for part in "bcx"
        )
        new = graph.node("Mul", [before, values], f"{name}.new")
        past = inputs[state_input("recurrent", str(len(self.recurrent)))]
        joined = graph.node("Concat", [past, new], f"{name}.joined", axis=1)
        self.recurrent.append(operators.rows_between(graph, f"{name}.last", joined, 1 - spec.width, None))
        source, kind = self._name(i, "conv"), graph.float_type
        read = self._weights.use(f"{source}.weight", (width, 1, spec.width))
        products = []
        for k in range(spec.width):
            tap = graph.weight(f"{source}.weight.{k}", kind, (width,), partial(_tap, source, read, k, kind))
            behind = k + 1 - spec.width
            rows = operators.rows_between(graph, f"{name}.rows.{k}", joined, k, behind) if behind else new
            products.append(graph.node("Mul", [rows, tap], f"{name}.product.{k}"))
        total = products[0]
        for k, product in enumerate(products[1:], 1):
            total = graph.node("Add", [total, product], f"{name}.sum.{k}")
        if spec.bias:
            bias = self._vector(f"{source}.bias", (width,), lambda b: b)
            total = graph.node("Add", [total, bias], f"{name}.biased")
        gated = graph.node("Mul", [after, total], f"{name}.gated")
        return self._to_hidden(gated, f"{name}_out_proj", self._name(i, "conv_out_proj"), width, spec.bias)

    def _mlp(self, i: int, x: ir.Value, factor: Factor) -> ir.Value:
        spec = self._spec.mlp
        sources = {part: self._name(i, part) for part in (("gate_proj",) if spec.gated else ()) + ("up_proj",)}
        return self._feed_forward(
            f"layers.{i}", x, sources, self._name(i, "down_proj"), spec.inner, spec.bias, factor=factor
        )

    def _feed_forward(
        self,
        name: str,
        x: ir.Value,
        sources: dict[str, str],
        down: str,
        inner: int,
        bias: bool = False,
        factor: Factor = 1.0,
    ) -> ir.Value:
        """down(act(first) · second): gate and up stay apart, 2–3% faster than one product and a split."""
        graph = self._ops.graph
        first, *up = (
            self._project(x, f"{name}.{part}", [source], [inner], self._spec.hidden_size, bias)
            for part, source in sources.items()
        )
        mixed = self._ops.activation(f"{name}.activation", self._spec.mlp.activation, first)
        if up:
            mixed = graph.node("Mul", [mixed, *up], f"{name}.gated")
        return self._to_hidden(mixed, f"{name}.down_proj", down, inner, bias, factor)

    def _moe(self, i: int, x: ir.Value) -> ir.Value:
        """Every expert runs and is weighted, most by 0: plain operators, which every runtime and precision has."""
        spec = self._spec.moe if isinstance(self._spec, DecoderSpec) else None
        assert spec is not None
        graph, name = self._ops.graph, f"layers.{i}.moe"
        router = self.linear(
            f"layers.{i}.router", [self._name(i, "router")], [spec.experts], self._spec.hidden_size, False
        )
        shares = dense_routing(graph, name, linear(graph, x, router, FLOAT32), spec)
        parts = [
            graph.node("Mul", [self._expert(i, e, x, spec.inner), share], f"{name}.{e}.weighted")
            for e, share in enumerate(shares)
        ]
        if spec.shared_inner:
            parts.append(self._shared_expert(i, x, spec.shared_inner, spec.shared_gate))
        return graph.node("Sum", parts, name)

    def _expert(self, i: int, e: int, x: ir.Value, inner: int) -> ir.Value:
        gate, up, down = (
            self._spec.names.layer[f"expert_{part}_proj"].format(i=i, e=e) for part in ("gate", "up", "down")
        )
        return self._feed_forward(f"layers.{i}.experts.{e}", x, {"gate_proj": gate, "up_proj": up}, down, inner)

    def _shared_expert(self, i: int, x: ir.Value, inner: int, gated: bool) -> ir.Value:
        graph, name = self._ops.graph, f"layers.{i}.shared_expert"
        gate, up, down = (self._name(i, f"shared_{part}_proj") for part in ("gate", "up", "down"))
        out = self._feed_forward(name, x, {"gate_proj": gate, "up_proj": up}, down, inner)
        if not gated:
            return out
        router = self.linear(f"{name}.router", [self._name(i, "shared_router")], [1], self._spec.hidden_size, False)
        share = graph.node("Sigmoid", [linear(graph, x, router, FLOAT32)], f"{name}.share")
        return graph.node("Mul", [out, share], f"{name}.weighted")

    def _qk_norm(self, i: int, spec: AttentionSpec) -> tuple[Norm, Norm] | None:
        if spec.qk_norm is None:
            return None
        query, key = (
            self._norm(
                self._name(i, part),
                spec.qk_norm,
                (heads, spec.head_dim) if spec.qk_norm.per_head else (spec.head_dim,),
            )
            for part, heads in (("q_norm", spec.heads), ("k_norm", spec.kv_heads))
        )
        return query, key

    def _norm(self, name: str, spec: NormSpec, shape: tuple[int, ...], factor: float = 1.0) -> Norm:
        """A norm with its scale and bias."""
        bias = self._vector(f"{name}.bias", shape, lambda b: _times(b, factor)) if spec.bias else None
        scale = self._vector(f"{name}.weight", shape, lambda w: _times(w + np.float32(spec.offset), factor))
        return Norm(spec, scale, bias)

    def _vector(self, name: str, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> ir.Value:
        read, kind = self._weights.use(name, shape), self._ops.graph.float_type
        return self._ops.graph.weight(name, kind, shape, lambda: to_float(name, change(read()), kind))

    def _to_hidden(self, x: ir.Value, name: str, source: str, row: int, bias: bool, factor: Factor = 1.0) -> ir.Value:
        layer = self.linear(name, [source], [self._spec.hidden_size], row, bias, factor)
        return self._rounded(x, layer)

    def _project(self, x: ir.Value, name: str, sources: list[str], rows: list[int], row: int, bias: bool) -> ir.Value:
        return self._rounded(x, self.linear(name, sources, rows, row, bias))

    def _rounded(self, x: ir.Value, layer: Linear) -> ir.Value:
        """The layer as the recipe wants it."""
        precision = precision_of(self._recipe, "decoder", layer.name)
        return linear(self._ops.graph, x, replace(layer, rounding=by_weights(precision)), precision)

    def _name(self, i: int, part: str) -> str:
        return self._spec.names.layer[part].format(i=i)


def _tap(name: str, read: Callable[[], np.ndarray], k: int, kind: ir.DataType) -> np.ndarray:
    """Column k of a depthwise convolution's weight [H, 1, width]."""
    return to_float(name, np.ascontiguousarray(read()[:, 0, k]), kind)


def _is_one(factor: Factor) -> bool:
    return not isinstance(factor, np.ndarray) and factor == 1


def _times(array: np.ndarray, factor: Factor) -> np.ndarray:
    """The array [rows, ..], each row times its factor."""
    if _is_one(factor):
        return array
    return array * np.asarray(factor, np.float32).reshape(-1, *[1] * (array.ndim - 1))
