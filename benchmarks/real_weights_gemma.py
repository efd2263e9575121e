"""A LLaVA checkpoint whose decoder is Gemma 3 270M with trained weights; its tower is random and small."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_weights_source import Source

__all__ = ["write_llava"]

_IMAGE = "<unused0>"  # a word of the vocabulary that nothing else uses
# The model is not tuned to chat.
_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}{% for part in message['content'] %}"
    "{{ 'Question: ' + part['text'] + '\n' if part['type'] == 'text' else '<unused0>\n' }}"
    "{% endfor %}{% endfor %}{{ 'Answer:' if add_generation_prompt else '' }}"
)
_NAMES = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "embed_tokens", "output_norm": "norm"}
_EVERY = 6  # so many layers one sees all, the others a window; the file does not say
_LOCAL_BASE = 10_000.0  # of the rope of the windowed layers


def write_llava(source: Source, tensors: dict[str, np.ndarray], folder: Path) -> None:
    """Write the checkpoint: LLaVA's architecture around a Gemma 3 whose weights are `tensors`."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer(source)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=_text_config(source),
        vision_config={"model_type": "clip_vision_model", **tower, "image_size": 64, "patch_size": 16},
        image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    state = {f"model.language_model.{_renamed(n)}": torch.tensor(_value(n, t)) for n, t in tensors.items()}
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    missing = [name for name in found.missing_keys if "language_model" in name]
    assert not missing, missing
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=_IMAGE,
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)


def _text_config(source: Source) -> dict[str, object]:
    fields = {name.removeprefix("gemma3."): value for name, value in source.fields.items()}
    layers, head_dim = int(fields["block_count"]), int(fields["attention.key_length"])
    return {
        "model_type": "gemma3_text",
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": fields["attention.head_count"],
        "num_key_value_heads": fields["attention.head_count_kv"],
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["context_length"],
        "rms_norm_eps": float(fields["attention.layer_norm_rms_epsilon"]),
        "sliding_window": fields["attention.sliding_window"],
        "layer_types": ["sliding_attention" if (i + 1) % _EVERY else "full_attention" for i in range(layers)],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": float(fields["rope.freq_base"])},
            "sliding_attention": {"rope_type": "default", "rope_theta": _LOCAL_BASE},
        },
        "tie_word_embeddings": True,
    }


def _renamed(name: str) -> str:
    block, _, rest = name.removeprefix("blk.").removesuffix(".weight").partition(".")
    return f"layers.{block}.{_NAMES[rest]}.weight" if name.startswith("blk.") else f"{_TOP[block]}.weight"


def _value(name: str, tensor: np.ndarray) -> np.ndarray:
    """A GGUF file has the scales of norms as they multiply, transformers less one."""
    value = tensor - 1 if name.endswith("_norm.weight") else tensor
    return np.ascontiguousarray(value, np.float32)


def _tokenizer(source: Source) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = source.fields["tokenizer.ggml.tokens"], source.fields["tokenizer.ggml.token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, source.fields["tokenizer.ggml.scores"]),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Pairs of words that make a third, the best word first."""
    pairs = []
    for word, i in vocabulary.items():
        for cut in range(1, len(word)):
            left, right = vocabulary.get(word[:cut]), vocabulary.get(word[cut:])
            if left is not None and right is not None:
                pairs.append((-scores[i], left, right, word[:cut], word[cut:]))
    return [(left, right) for *_, left, right in sorted(pairs)]
