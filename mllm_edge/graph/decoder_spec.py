"""What a decoder is made of: the frozen description that the graph is built from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mllm_edge.spec import PositionSpec, RopeSpec, StateSpec

__all__ = [
    "PRE_NORM",
    "Activation",
    "AttentionSpec",
    "Branch",
    "ConvSpec",
    "CrossSpec",
    "DecoderSpec",
    "EncoderSpec",
    "LayerSpec",
    "MlpSpec",
    "MoeSpec",
    "NormSpec",
    "PositionTable",
    "WeightNames",
]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True)
class WeightNames:
    """Where each tensor stands in the checkpoint. In `layer` values `{i}` is the layer number and `{e}` the expert's,
    without `.weight`. `final_norm` None: there is none."""

    layer: Mapping[str, str]
    final_norm: str | None
    lm_head: str
    input_norm: str | None = None


@dataclass(frozen=True)
class NormSpec:
    """`rms` or `layer` normalization over the last axis; `bias` adds a learned vector (layer only).

    `offset` is added to the stored scale (Gemma stores scale − 1). `per_head`: a norm within heads whose scale and bias
    differ from head to head, stored as [heads, D].
    """

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False
    offset: float = 0.0
    per_head: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """Heads of self- or cross-attention. `scale` multiplies q·k; `qk_norm` normalizes each head of q and k before rope;
    `softcap` c bounds scores by c·tanh(s/c), before the mask."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: NormSpec | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class CrossSpec:
    """Attention over encoded features [B, N, features], whose keys and values `build_cross_kv` makes.

    `rows`: the graph takes `cross_attention_rows` [B, S, 1], which multiplies what branches of cross-attention layers
    add (where a token has no image to look at, mllama silences their MLP, IDEFICS their attention).
    """

    attention: AttentionSpec
    features: int
    rows: bool = False


@dataclass(frozen=True)
class ConvSpec:
    """A gated short convolution (LFM2): out(c · conv(b · x)), where b, c and x are projections of the input.

    `width`: a token and the width − 1 ≥ 1 before it, each channel by itself. `bias`: all parts have one.
    """

    width: int
    bias: bool = False


@dataclass(frozen=True)
class MlpSpec:
    """down(act(gate(x)) · up(x)) when `gated`, else down(act(up(x))); `inner` is the width between."""

    inner: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True)
class MoeSpec:
    """`top_k` of `experts` gated MLPs of width `inner`, weighted by the softmax over all router logits.

    `renormalize`: the chosen weights are scaled to sum to one; then all are multiplied by `scale`. `shared_inner`: an
    MLP of that width that every token takes as well (0: none), weighted by a sigmoid of its own when `shared_gate`.
    """

    experts: int
    top_k: int
    inner: int
    renormalize: bool = True
    scale: float = 1.0
    shared_inner: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class Branch:
    """One residual branch of a layer: h ← after(h + tanh(gate) · post(f(pre(h)))).

    `pre`, `post`, `after` and `gate` (one number, or one for each element) are keys of `WeightNames.layer`, None where
    there is no such thing. `silenced`: multiplied by `cross_attention_rows`. `beside`: f's input is that of the branch
    before it, whose norm is the same.
    """

    kind: Literal["attention", "cross_attention", "conv", "mlp", "moe"]
    pre: str | None = None
    post: str | None = None
    after: str | None = None
    gate: str | None = None
    silenced: bool = False
    beside: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """The branches of one layer, and which of the decoder's ropes (None: none) and windows its self-attention has."""

    branches: tuple[Branch, ...]
    rope: int | None = 0
    window: int = 0

    def has(self, kind: str) -> bool:
        """Whether a branch of this kind is there."""
        return any(branch.kind == kind for branch in self.branches)


PRE_NORM = LayerSpec((Branch("attention", pre="input_norm"), Branch("mlp", pre="post_attention_norm")))


@dataclass(frozen=True)
class PositionTable:
    """A checkpoint tensor that the host needs for positions: rows to add to the embeddings (`learned`, the first
    `skip` rows are of no token), or scores by distance (`relative_bias`: [buckets, heads], distances up to
    `max_distance`)."""

    kind: Literal["learned", "relative_bias"]
    tensor: str
    skip: int = 0
    max_distance: int = 0

    def position_spec(self, file: str) -> PositionSpec:
        """The positions for the manifest; `file` is where the bundle keeps the tensor."""
        return PositionSpec(self.kind, table=file, max_distance=self.max_distance)


@dataclass(frozen=True)
class DecoderSpec:
    """A transformer decoder. Sizes are in elements.

    `stack`: the layers, in order; `ropes` and `windows` (None: all positions): what they choose from. `table`: learned
    positions or relative bias. `spans`: some tokens see each other in both directions, so masks come from the host in
    every dialect. `deepstack`: the layers k, from 0, behind which the graph adds an input `deepstack.{k}`
    [B, S, H]. `embedding_scale` multiplies token embeddings (and not image features), on the host; `head_scale` the
    last hidden state, `residual_scale` what each branch adds to the stream; `logits_cap` c bounds logits by
    c·tanh(l/c), `head_bias` names a vector [V] to add to them; `banned`: token ids that are never chosen. `lm_head` may
    name the embedding matrix (tied). `encoder`: the text encoder that reads the prompt, in an encoder-decoder.
    """

    hidden_size: int
    vocab_size: int
    norm: NormSpec
    attention: AttentionSpec
    mlp: MlpSpec
    names: WeightNames
    stack: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...] = ()
    windows: tuple[int | None, ...] = (None,)
    table: PositionTable | None = None
    spans: bool = False
    cross: CrossSpec | None = None
    moe: MoeSpec | None = None
    conv: ConvSpec | None = None
    deepstack: tuple[int, ...] = ()
    embedding_scale: float = 1.0
    head_scale: float = 1.0
    residual_scale: float = 1.0
    head_bias: str | None = None
    banned: tuple[int, ...] = ()
    logits_cap: float | None = None
    encoder: "EncoderSpec | None" = None

    @property
    def layers(self) -> int:
        """Number of layers of any kind."""
        return len(self.stack)

    @property
    def cached(self) -> int:
        """Number of layers with self-attention, and so with a cache."""
        return sum(layer.has("attention") for layer in self.stack)

    @property
    def convolved(self) -> int:
        """Number of layers with a short convolution, and so with a recurrent state."""
        return sum(layer.has("conv") for layer in self.stack)

    @property
    def crossed(self) -> int:
        """Number of layers with cross-attention."""
        return sum(layer.has("cross_attention") for layer in self.stack)

    @property
    def heads_in_bias(self) -> int:
        """Size of the bias's head axis: relative distances score differently in each head."""
        return self.attention.heads if self.table is not None and self.table.kind == "relative_bias" else 1

    def state_specs(self) -> tuple[StateSpec, ...]:
        """What the layers remember, for the manifest."""
        heads = (self.attention.kv_heads, self.attention.head_dim)
        found = [StateSpec("growing", tuple(range(self.cached)), heads)] if self.cached else []
        if self.conv is not None and self.convolved:
            inputs = (self.conv.width - 1, self.hidden_size)
            found.append(StateSpec("recurrent", tuple(range(self.convolved)), inputs))
        return tuple(found)

    def position_spec(self, file: str = "") -> PositionSpec:
        """Positions and masks, for the manifest; `file` is where the bundle keeps `table`."""
        if self.table is not None:
            return replace(self.table.position_spec(file), ropes=self.ropes, windows=self.windows)
        return PositionSpec("rope" if self.ropes else "none", self.ropes, self.windows)


@dataclass(frozen=True)
class EncoderSpec:
    """A text encoder: layers without a cache, in which every token sees every other. Fields as in DecoderSpec;
    `embedding` is the tensor of the token embeddings, which its decoder shares, `copies` are others that some files
    have of it."""

    hidden_size: int
    norm: NormSpec
    attention: AttentionSpec
    mlp: MlpSpec
    names: WeightNames
    stack: tuple[LayerSpec, ...]
    embedding: str
    copies: tuple[str, ...] = ()
    table: PositionTable | None = None

    def position_spec(self, file: str) -> PositionSpec:
        """As of `DecoderSpec`."""
        return PositionSpec("none") if self.table is None else self.table.position_spec(file)

    @property
    def heads_in_bias(self) -> int:
        return self.attention.heads if self.table is not None and self.table.kind == "relative_bias" else 1
