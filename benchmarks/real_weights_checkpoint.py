"""A SmolVLM checkpoint whose decoder has trained weights; its tower is random and small."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_weights_source import Source

__all__ = ["write_smolvlm"]

_IMAGES = ("<fake_token_around_image>", "<image>", "<global-img>")
_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "embed_tokens", "output_norm": "norm"}
_VOCABULARY = 49280  # of SmolVLM-256M: SmolLM2's, and tokens for images


def write_smolvlm(source: Source, tensors: dict[str, np.ndarray], folder: Path) -> None:
    """Write the checkpoint: SmolVLM's architecture around a Llama whose weights are `tensors`."""
    import torch
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    tokenizer = _tokenizer(source)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SmolVLMConfig(
        text_config=_text_config(source),
        vision_config={**tower, "image_size": 64, "patch_size": 8},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = SmolVLMForConditionalGeneration(config).eval()
    state = {f"model.text_model.{n}": torch.tensor(t) for n, t in _renamed(source, tensors).items()}
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 128}, max_image_size={"longest_edge": 64})
    Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=_TEMPLATE).save_pretrained(folder)
    (folder / "source.json").write_text(json.dumps({"model": source.fields["general.name"]}), encoding="utf-8")


def _text_config(source: Source) -> dict[str, object]:
    fields = source.fields
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        "tie_word_embeddings": True,
    }


def _renamed(source: Source, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By transformers' names; embeddings of the tokens that were added are those of a rare one."""
    heads = {
        "attn_q": source.fields["llama.attention.head_count"],
        "attn_k": source.fields["llama.attention.head_count_kv"],
    }
    renamed = {}
    for name, tensor in tensors.items():
        block, _, rest = name.removeprefix("blk.").removesuffix(".weight").partition(".")
        if not name.startswith("blk."):
            renamed[f"{_TOP[block]}.weight"] = tensor
            continue
        # A GGUF file has the two elements that a rope rotates side by side, transformers half a head apart.
        value = _halves(tensor, int(heads[rest])) if rest in heads else tensor
        renamed[f"layers.{block}.{_NAMES[rest]}.weight"] = value
    table = renamed["embed_tokens.weight"]
    # Not alike, and unlikely: a mean of the table with a little noise.
    added = table.mean(axis=0) + 1e-3 * np.random.default_rng(1).standard_normal(
        (_VOCABULARY - len(table), table.shape[1])
    )
    renamed["embed_tokens.weight"] = np.concatenate([table, added]).astype(np.float32)
    return {name: np.ascontiguousarray(tensor) for name, tensor in renamed.items()}


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    rows, row = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, row).swapaxes(1, 2).reshape(rows, row)


def _tokenizer(source: Source) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = source.fields["tokenizer.ggml.tokens"]
    kinds = source.fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in source.fields["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tiles = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*control, *_IMAGES, *tiles)])
    end = tokens[source.fields["tokenizer.ggml.eos_token_id"]]
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|im_start|>", eos_token=end, pad_token=end)
