"""Tiny random checkpoints of BLIP-2, InstructBLIP and InstructBLIP for video."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from mllm_edge.export.families.qformer_parts import answering
from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["save_tiny_blip_2", "save_tiny_instructblip", "save_tiny_instructblipvideo", "word_tokenizer"]

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}


def opt_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges; one token begins and ends a text, and is put before it."""
    core = byte_tokenizer("<pad>", "</s>", "<unk>", "<mask>", "<image>")
    core.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", core.token_to_id("</s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def t5_tokenizer(image: str = "<image>") -> PreTrainedTokenizerFast:
    """The same, with a token behind each text and none before it."""
    core = byte_tokenizer("<pad>", "</s>", "<unk>", image)
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", core.token_to_id("</s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def _t5(stated: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A T5 as it is in Flan-T5."""
    told = dict(stated)
    depth = {"num_layers": 2, "num_decoder_layers": told.pop("num_hidden_layers", 3)}  # as others call the decoder's
    layers = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, **depth}
    scores = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    kind = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": tokenizer.pad_token_id}
    return {**layers, **scores, **kind, "vocab_size": 320, "n_positions": 1024, **told}


def _random(architecture: Any, config: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """As random_model; T5 does not scale its scores."""
    model = random_model(architecture, config, tokenizer, seed)
    for name, weight in model.named_parameters():
        if name.endswith(("Attention.q.weight", "Attention.k.weight")):
            weight.data *= 0.4
    return model


def save_tiny_blip_2(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    qformer: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random BLIP-2 with its processor files to `folder` and return the model in float32.

    The defaults: a tower of 48 px and 8 px patches with 2 layers, a Q-Former with 3 and 5 queries, an OPT with 2,
    or with the text model t5 a T5 of 2 + 3; hidden sizes 64, the Q-Former's 48.
    """
    stated = {"model_type": "opt", **(text or {})}
    reads = stated["model_type"] == "t5"
    tokenizer = t5_tokenizer() if reads else opt_tokenizer()
    decoder = {"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    decoder = {**decoder, "vocab_size": 320, "max_position_embeddings": 1024, "word_embed_proj_dim": 64}
    made = Blip2Config(
        text_config=_t5(stated, tokenizer) if reads else {**decoder, **stated},
        vision_config={**SIZES, "image_size": 48, "patch_size": 8, **(vision or {})},
        qformer_config={**SIZES, "hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 90, **(qformer or {})},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **{"num_query_tokens": 5, **(config or {})},
    )
    model = _random(answering(Blip2ForConditionalGeneration), made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side = made.vision_config.image_size
    images = BlipImageProcessorPil(**{"size": {"height": side, "width": side}, **(image_settings or {})})
    Blip2Processor(images, tokenizer, num_query_tokens=made.num_query_tokens).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        _as_on_the_hub(folder)
    return model


def _as_on_the_hub(folder: Path) -> None:
    """Older forms of files: the head beside the embeddings that it is, the image processor in a file of its own, and
    no number of queries."""
    tensors = load_file(folder / "model.safetensors")
    head = tensors["language_model.model.decoder.embed_tokens.weight"].clone()
    save_file({**tensors, "language_model.lm_head.weight": head}, folder / "model.safetensors")
    stated = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(stated.pop("image_processor")))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Blip2Processor"}))


# ---------------------------------------------------------------- InstructBLIP
_CLASSES: dict[str, tuple[Any, Any]] = {
    "image": (InstructBlipForConditionalGeneration, InstructBlipConfig),
    "video": (InstructBlipVideoForConditionalGeneration, InstructBlipVideoConfig),
}


def llama_tokenizer(prepends: str = "always", image: str = "<image>") -> PreTrainedTokenizerFast:
    """Pieces of one character, as SentencePiece's, with a blank before a text: before each part of it, or the first."""
    core = byte_tokenizer("<pad>", "<s>", "</s>", "<unk>", image)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme=prepends),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece in small letters, of single characters and some words, as BERT's."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!-()[]{}<>/'"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words = [*special, *letters, *(f"##{letter}" for letter in letters), "what", "is", "the", "##ing", "picture"]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ends = [(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    core.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, model_max_length=512)


def save_tiny_instructblip(folder: Path, **settings: Any) -> Any:
    """As save_tiny_blip_2, with a Llama, and a tokenizer of words for the Q-Former, which reads 200 of them."""
    return _save_instructblip(folder, "image", **settings)


def save_tiny_instructblipvideo(folder: Path, **settings: Any) -> Any:
    """As save_tiny_instructblip, for the frames of videos."""
    return _save_instructblip(folder, "video", **settings)


def _save_instructblip(
    folder: Path,
    kind: str,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    qformer: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    prepends: str = "always",
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    stated = {"model_type": "llama", **(text or {})}
    reads = stated["model_type"] == "t5"
    tokenizer = t5_tokenizer(f"<{kind}>") if reads else llama_tokenizer(prepends, f"<{kind}>")
    words = {"vocab_size": 130, "max_position_embeddings": 200, "hidden_size": 48, "num_hidden_layers": 3}
    decoder = {**SIZES, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024}
    architecture, config_class = _CLASSES[kind]
    made = config_class(
        text_config=_t5(stated, tokenizer) if reads else {**decoder, **stated},
        vision_config={**SIZES, "image_size": 48, "patch_size": 8, **(vision or {})},
        qformer_config={**SIZES, **words, **(qformer or {})},
        **{f"{kind}_token_index": tokenizer.convert_tokens_to_ids(f"<{kind}>")},
        **{"num_query_tokens": 5, **(config or {})},
    )
    read = "qformer_input_ids", "qformer_attention_mask"
    model = _random(answering(architecture, *read, features=f"get_{kind}_features"), made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side = made.vision_config.image_size
    images = BlipImageProcessorPil(**{"size": {"height": side, "width": side}, **(image_settings or {})})
    queries = made.num_query_tokens
    if kind == "image":
        InstructBlipProcessor(images, tokenizer, word_tokenizer(), num_query_tokens=queries).save_pretrained(folder)
    else:
        _save_video_processor(folder, images, tokenizer, queries)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        files = json.loads((folder / "processor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps(files.pop(f"{kind}_processor")))
        (folder / "processor_config.json").unlink()
    return model


def _save_video_processor(folder: Path, images: Any, tokenizer: Any, queries: int) -> None:
    """What transformers writes where there is torchvision."""
    tokenizer.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder / "qformer_tokenizer")
    settings = {key: value for key, value in images.to_dict().items() if key != "image_processor_type"}
    of_frames = {**settings, "video_processor_type": "InstructBlipVideoVideoProcessor"}
    stated = {"processor_class": "InstructBlipVideoProcessor", "num_query_tokens": queries}
    (folder / "processor_config.json").write_text(json.dumps({**stated, "video_processor": of_frames}))
