"""What the host-side tests share: small tokenizers, a chat template, and the source library's own processor."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from mllm_edge import spec
from mllm_edge.runtime.prompt import tokenizer as host

CORPUS = (
    "What is on the belt? A red box, two bottles and a crate.\n\nDescribe the image in detail, please.",
    "User: how many parts are there? Assistant: there are 17 parts; 3 are damaged.",
    "Grüße aus Zürich, naïve café, 你好，世界, привет, こんにちは 🙂🚀 عرض",
)
IMAGE_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
)
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<end_of_utterance>", *IMAGE_TOKENS)
NAMED_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}

# Reads lists only, as the templates of this family do.
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{{ message['role'] | capitalize }}:{% for part in message['content'] %}
{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}
{% endfor %}
<end_of_utterance>
{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""


def byte_level_bpe(more: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer with every byte, some merges, and the special tokens of the family.

    `more`: its decoder has another step (which changes nothing)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]) if more else decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken("plain", normalized=False)])
    return core


def byte_fallback_bpe() -> Tokenizer:
    """A SentencePiece-like tokenizer: ▁ for spaces, <0xXX> for bytes without a token, one leading space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    characters = "▁abcdefghijklmnopqrstuvwxyzABCD.,?!é你"
    words = ["▁▁", "▁the", "▁belt", "▁a", "the", "box", "▁red", "he", "th", "be", "lt"]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *characters, *words])}
    merges = [("t", "h"), ("th", "e"), ("h", "e"), ("▁", "the"), ("▁", "▁"), ("▁", "a"), ("b", "e"), ("l", "t")]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.add_tokens([AddedToken("<tool>", normalized=False)])
    return core


def word_piece() -> Tokenizer:
    """Words joined by spaces, `##` for continuations: a decoder that looks around."""
    pieces = ["[UNK]", "the", "belt", "##s", "##.", "a", "red", "box", ",", ".", "do", "n't", "##n"]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    return core


def metaspace_unigram() -> Tokenizer:
    """The Metaspace decoder: the first token loses its leading space."""
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("▁the", -2.0), ("▁belt", -2.0), ("s", -3.0), ("▁▁", -3.0), ("你", -4.0)]
    core = Tokenizer(models.Unigram(pieces, 0, False))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return core


def generation(**changes: Any) -> spec.GenerationSpec:
    return spec.GenerationSpec(**{"eos_token_ids": (2,), "special_tokens": NAMED_TOKENS} | changes)


def image_processor(tile: int, longest_edge: int, split: bool, **changes: Any) -> Idefics3ImageProcessorPil:
    options = {
        "size": {"longest_edge": longest_edge},
        "max_image_size": {"longest_edge": tile},
        "do_image_splitting": split,
        "image_mean": [0.5, 0.48, 0.4],
        "image_std": [0.5, 0.26, 0.22],
    }
    return Idefics3ImageProcessorPil(**options | changes)


def transforms(source: Idefics3ImageProcessorPil) -> tuple[spec.Transform, ...]:
    """The transforms that the export writes for this image processor."""
    tile = source.max_image_size["longest_edge"]
    resample = Image.Resampling(source.resample).name.lower()
    first = spec.ResizeLongestEdge(source.size["longest_edge"], resample, 4096)
    last = (spec.Rescale(source.rescale_factor), spec.Normalize(tuple(source.image_mean), tuple(source.image_std)))
    if not source.do_image_splitting:
        return (first, spec.Resize(tile, tile, resample), *last)
    return (first, spec.ResizeToMultiple(tile, resample), spec.SplitTiles(tile, resample), *last)


def model_spec(image: spec.ImageSpec | None) -> spec.ModelSpec:
    return spec.ModelSpec(
        family="test",
        model_type="test",
        hidden_size=8,
        vocab_size=700,
        context_length=4096,
        parameters=0,
        embedding=spec.EmbeddingSpec("embed_tokens.npy", 700),
        positions=spec.PositionSpec("none"),
        state=(spec.StateSpec("growing", (0,), (1, 8)),),
        image=image,
    )


def image_spec(source: Idefics3ImageProcessorPil, image_token_id: int, tokens_per_tile: int) -> spec.ImageSpec:
    around, overview = "<fake_token_around_image>", "<global-img>{image}<fake_token_around_image>"
    prompt = spec.ImagePrompt(
        token="<image>",
        token_id=image_token_id,
        single=around + overview,
        tile=around + "<row_{row}_col_{col}>{image}",
        row_end="\n",
        overview="\n" + around + overview,
    )
    tile = source.max_image_size["longest_edge"]
    return spec.ImageSpec(transforms(source), prompt, tile, tile, tokens_per_tile)


def source_processor(source: Idefics3ImageProcessorPil, core: Tokenizer, tokens_per_tile: int) -> Idefics3Processor:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **NAMED_TOKENS)
    return Idefics3Processor(source, wrapped, image_seq_len=tokens_per_tile, chat_template=TEMPLATE)


def host_tokenizer(core: Tokenizer, **changes: Any) -> host.Tokenizer:
    return host.Tokenizer(Tokenizer.from_str(core.to_str()), generation(**changes))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """An RGB image with smooth parts and noise."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[0:height, 0:width]
    smooth = np.stack([rows * 255 / max(height - 1, 1), cols * 255 / max(width - 1, 1), (rows + cols) % 256], -1)
    noise = rng.integers(-40, 40, (height, width, 3))
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))
