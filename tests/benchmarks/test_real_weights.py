"""Trained weights as benchmarks take them: other columns leave the function as it was, and noise stays in bounds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks import real_weights_source
from benchmarks.real_weights_checkpoint import write_smolvlm
from benchmarks.real_weights_gemma import write_llava
from benchmarks.real_weights_source import Source, rescaled

HIDDEN, WIDE, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 6
_LETTERS = ["a", "b", "c", "ab", "abc"]


def source(kind: str, head_dim: int, norms: dict[str, int]) -> Source:
    """Random weights by GGUF's names; `norms`: those of a layer → size."""
    random = np.random.default_rng(0)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "▁", "<|im_start|>", "<|im_end|>", *_LETTERS]
    rows = {"attn_q": HEADS * head_dim, "attn_k": KV_HEADS * head_dim, "attn_v": KV_HEADS * head_dim}
    shapes = {name: (size, HIDDEN) for name, size in rows.items()}
    shapes |= {"attn_output": (HIDDEN, HEADS * head_dim), "ffn_down": (HIDDEN, WIDE)}
    shapes |= {"ffn_gate": (WIDE, HIDDEN), "ffn_up": (WIDE, HIDDEN)}
    tensors = {"token_embd.weight": random.standard_normal((len(words), HIDDEN)), "output_norm.weight": np.ones(HIDDEN)}
    for i in range(LAYERS):
        for name, shape in shapes.items():
            tensors[f"blk.{i}.{name}.weight"] = random.standard_normal(shape) / 8
        for name, size in norms.items():
            tensors[f"blk.{i}.{name}.weight"] = random.uniform(0.5, 1.5, size)
    fields = {
        "general.architecture": kind,
        "general.name": "random",
        f"{kind}.context_length": 128,
        f"{kind}.embedding_length": HIDDEN,
        f"{kind}.block_count": LAYERS,
        f"{kind}.feed_forward_length": WIDE,
        f"{kind}.attention.head_count": HEADS,
        f"{kind}.attention.head_count_kv": KV_HEADS,
        f"{kind}.attention.key_length": head_dim,
        f"{kind}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{kind}.attention.sliding_window": 8,
        f"{kind}.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] * 5 + [1] + [3] * 2 + [1] * len(_LETTERS),
        "tokenizer.ggml.scores": [-float(i) for i in range(len(words))],
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.eos_token_id": 1,
    }
    return Source(Path("none.gguf"), {name: t.astype(np.float32) for name, t in tensors.items()}, fields)


_LLAMA = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN}
_GEMMA = {**_LLAMA, "post_attention_norm": HIDDEN, "post_ffw_norm": HIDDEN, "attn_q_norm": 32, "attn_k_norm": 32}
KINDS: dict[str, tuple[Source, Any]] = {
    "llama": (source("llama", HIDDEN // HEADS, _LLAMA), write_smolvlm),
    "gemma3": (source("gemma3", 32, _GEMMA), write_llava),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_columns_leave_the_function_as_it_was(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_weights_source, "_noised", lambda weight, random: weight)
    given, write = KINDS[kind]
    changed = rescaled(given)
    spread = changed["blk.0.attn_q.weight"] / given.tensors["blk.0.attn_q.weight"]
    assert spread.std() > 0.2
    logits = []
    for name, tensors in (("given", given.tensors), ("changed", changed)):
        write(given, tensors, tmp_path / name)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([[2, 8, 9, 10, 11, 12, 5, 9] * 2])).logits[..., :13].numpy())
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * np.abs(logits[0]).max()


def test_noise_is_a_quarter_of_a_step_of_each_block() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    noise = (real_weights_source._noised(weight, np.random.default_rng(1)) - weight).reshape(-1, 32)
    blocks = weight.reshape(-1, 32)
    bound = np.ptp(blocks, axis=1) / 15 / 4
    assert np.all(np.abs(noise).max(axis=1) <= bound * 1.001)
    assert np.abs(noise).max() > 0.8 * bound.min()
