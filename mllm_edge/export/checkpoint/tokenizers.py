"""A `tokenizer.json` for checkpoints that have only an older form of their tokenizer, and the proof that it is equal.

| files | converted by | compared with |
|---|---|---|
| `tokenizer.json` | nobody: it is the tokenizer | – |
| `tokenizer.model`, `spiece.model` | transformers | sentencepiece |
| `qwen.tiktoken`, or a tiktoken `tokenizer.model` (Llama 3) | transformers | tiktoken |
| `vocab.json` and `merges.txt` | transformers | byte-level BPE as published, in plain Python |
| `vocab.txt` | transformers | transformers' WordPiece in Python |

transformers 5 has no slow tokenizer for most of these any more, so the original is the library that the tokenizer was
trained with. Both must give the same ids for every text of `tokenizer_corpus.json`: all scripts, emoji, code,
whitespace. Two things are let pass. Of a Unigram model's segmentations with the same score, rounding decides which one
comes out: the same pieces in another order are as good. And where the checkpoint says `legacy: false`, today's
reference treats a space at the very beginning unlike sentencepiece: texts that begin with one are left out.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import SourceError
from mllm_edge.export.checkpoint.source import Source

if TYPE_CHECKING:
    import tokenizers

__all__ = ["corpus", "load_tokenizer", "vocabulary_file"]

JSON = "tokenizer.json"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_BYTE, _HOPELESS = re.compile("<0x[0-9A-F]{2}>"), -1e6
Encode = Callable[[str], list[int]]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# How text is cut into words before pairs are merged, by the class that transformers makes of the files.
_WORDS = {"GPT2Tokenizer": _GPT2, "RobertaTokenizer": _GPT2, "BartTokenizer": _GPT2, "Qwen2Tokenizer": _QWEN}
# Qwen's code numbers its special tokens behind the vocabulary; no file names them.
_QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)


def load_tokenizer(source: Source) -> "tokenizers.Tokenizer":
    """The checkpoint's tokenizer, converted where it has no tokenizer.json.

    Raises SourceError when there is none, when a package for its conversion is missing, when it cannot be converted,
    or when the conversion gives other ids; the message quotes the text.
    """
    path = source.folder / JSON
    if path.is_file():
        return _read(path)
    stamps = tuple(
        sorted((p.name, p.stat().st_mtime_ns) for p in source.folder.iterdir() if p.suffix != ".safetensors")
    )
    return _converted(source.folder, stamps)


def vocabulary_file(source: Source) -> Path:
    """The file that the tokenizer comes from, for messages."""
    names = (JSON, *_SENTENCEPIECE, "*.tiktoken", "vocab.json", "vocab.txt")
    return next((path for name in names for path in sorted(source.folder.glob(name))), source.folder / JSON)


def corpus() -> tuple[str, ...]:
    """The texts that a converted tokenizer is compared on."""
    return tuple(json.loads(Path(__file__).with_name("tokenizer_corpus.json").read_text(encoding="utf-8")))


def _read(path: Path) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:  # the Rust side raises bare Exception
        raise SourceError(f"{path}: not a tokenizer ({e})", "download the file again") from None


@lru_cache(maxsize=1)
def _converted(folder: Path, stamps: Any) -> "tokenizers.Tokenizer":
    """Kept, because converting a large vocabulary takes seconds; `stamps` tell files that were changed meanwhile."""
    from mllm_edge.export.checkpoint.files import read_json
    from mllm_edge.export.checkpoint.quiet import quiet_transformers

    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    with quiet_transformers():
        file, core, original = _convert(folder, config)
    _check_equal(file, core, original, skip_leading_space=config.get("legacy") is False)
    return core


def _convert(folder: Path, config: Mapping[str, Any]) -> "tuple[Path, tokenizers.Tokenizer, Encode]":
    """The file that holds the vocabulary, the converted tokenizer and the original's encoding."""
    for name in _SENTENCEPIECE:
        if (folder / name).is_file():
            return _from_model(folder / name)
    packed = sorted(folder.glob("*.tiktoken"))
    if packed:
        return _from_tiktoken(packed[0], config)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_merges(folder / "vocab.json", config)
    if (folder / "vocab.txt").is_file():
        return _from_wordpiece(folder / "vocab.txt", config)
    raise SourceError(
        f"{folder}: no {JSON} here, and no {_SENTENCEPIECE[0]}, *.tiktoken, vocab.json with merges.txt, or vocab.txt",
        "copy the tokenizer's files of this model into the directory",
    )


# ---------------------------------------------------------------- one form each
def _from_model(path: Path) -> "tuple[Path, tokenizers.Tokenizer, Encode]":
    if _is_tiktoken(path):
        _need("tiktoken", path)
        return path, _by_transformers(path).backend_tokenizer, _tiktoken_encode(path, _LLAMA3)
    _need("sentencepiece", path)
    from sentencepiece import SentencePieceProcessor

    try:
        original = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as e:
        raise SourceError(f"{path}: not a SentencePiece model ({e})", "download the file again") from None
    core = _without_spelled_bytes(_by_transformers(path).backend_tokenizer)
    return path, core, lambda text: list(original.encode(text))


def _without_spelled_bytes(core: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """A Unigram model would take the text "<0x41>" for the piece of that byte; a hopeless score keeps it from that."""
    from tokenizers import Tokenizer

    if type(core.model).__name__ != "Unigram":
        return core
    state = json.loads(core.to_str())
    pieces = state["model"]["vocab"]
    state["model"]["vocab"] = [[p, _HOPELESS if _BYTE.fullmatch(p) else score] for p, score in pieces]
    return Tokenizer.from_str(json.dumps(state))


def _is_tiktoken(path: Path) -> bool:
    """Lines of base64 and a rank, where SentencePiece would begin with a binary tag."""
    with path.open("rb") as f:
        first = f.readline(4096).split()
    return len(first) == 2 and first[1].isdigit()


def _from_tiktoken(path: Path, config: Mapping[str, Any]) -> "tuple[Path, tokenizers.Tokenizer, Encode]":
    _need("tiktoken", path)
    from transformers.convert_slow_tokenizer import TikTokenConverter

    if config.get("tokenizer_class") != "QWenTokenizer":
        raise SourceError(
            f"{path}: a tiktoken file does not say how text is cut into words, and tokenizer_class "
            f"{config.get('tokenizer_class')!r} is not known",
            f"supported: QWenTokenizer; or make a {JSON} with the model's own code and put it into the directory",
        )
    try:
        core = TikTokenConverter(str(path), pattern=_QWEN, extra_special_tokens=_QWEN_SPECIAL).converted()
        return path, core, _tiktoken_encode(path, _QWEN)
    except ValueError as e:
        raise SourceError(f"{path}: not a tiktoken vocabulary ({e})", "download the file again") from None


def _tiktoken_encode(path: Path, pattern: str) -> Encode:
    from tiktoken import Encoding
    from tiktoken.load import load_tiktoken_bpe

    encoding = Encoding(path.stem, pat_str=pattern, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={})
    return encoding.encode_ordinary


def _from_merges(path: Path, config: Mapping[str, Any]) -> "tuple[Path, tokenizers.Tokenizer, Encode]":
    made = _by_transformers(path, config)
    kind = type(made).__name__
    if kind not in _WORDS:
        raise SourceError(
            f"{path}: {kind} cannot be checked against an original",
            f"supported: {', '.join(_WORDS)}; or put a {JSON} into the directory",
        )
    vocab = json.loads(path.read_text(encoding="utf-8"))
    lines = path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    # Qwen2 composes characters first, GPT-2 takes them as they are.
    form = "NFC" if kind == "Qwen2Tokenizer" else None
    return (
        path,
        made.backend_tokenizer,
        _byte_level_bpe(vocab, ranks, _WORDS[kind], form),
    )


def _byte_level_bpe(vocab: Mapping[str, int], ranks: Mapping[Any, int], words: str, form: Any) -> Encode:
    """Byte-level BPE as GPT-2 defined it: in each word the pair of lowest rank is merged until there is none."""
    import unicodedata

    import regex
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet, pattern = bytes_to_unicode(), regex.compile(words)

    def merge(word: str) -> list[str]:
        parts = [alphabet[byte] for byte in word.encode()]
        while True:
            known = [pair for pair in pairwise(parts) if pair in ranks]
            if not known:
                return parts
            best, merged = min(known, key=ranks.__getitem__), []
            while parts:
                size = 2 if tuple(parts[:2]) == best else 1
                merged.append("".join(parts[:size]))
                parts = parts[size:]
            parts = merged

    def encode(text: str) -> list[int]:
        text = unicodedata.normalize(form, text) if form else text
        return [vocab[part] for word in pattern.findall(text) for part in merge(word)]

    return encode


def _from_wordpiece(path: Path, config: Mapping[str, Any]) -> "tuple[Path, tokenizers.Tokenizer, Encode]":
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    made = _by_transformers(path, config)
    if type(made).__name__ != "BertTokenizer":
        raise SourceError(
            f"{path}: {type(made).__name__} cannot be checked against an original",
            f"supported: BertTokenizer; or put a {JSON} into the directory",
        )
    original = BertTokenizerLegacy.from_pretrained(path.parent)
    return path, made.backend_tokenizer, lambda text: list(original.encode(text, add_special_tokens=False))


# ---------------------------------------------------------------- helpers
def _need(package: str, path: Path) -> None:
    packages = {"sentencepiece": ("sentencepiece", "google.protobuf"), "tiktoken": ("tiktoken",)}[package]
    for module in packages:
        if not _installed(module):
            names = "sentencepiece protobuf" if package == "sentencepiece" else package
            raise SourceError(
                f"{path.parent}: no {JSON} here, and converting {path.name} needs {package}", f"pip install {names}"
            )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _by_transformers(path: Path, config: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer of the checkpoint as transformers converts it; with `config`, by the very class that it names."""
    import transformers

    stated = str((config or {}).get("tokenizer_class", "")).removesuffix("Fast")
    try:
        return getattr(transformers, stated, transformers.AutoTokenizer).from_pretrained(path.parent)
    except Exception as e:  # converters fail in kinds of their own
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise SourceError(
            f"{path}: transformers cannot convert this tokenizer ({reason})",
            f"download the file again, or put a {JSON} into the directory",
        ) from None


def _check_equal(path: Path, core: "tokenizers.Tokenizer", original: Encode, skip_leading_space: bool) -> None:
    unordered = type(core.model).__name__ == "Unigram"
    for text in corpus():
        if skip_leading_space and text[:1].isspace():
            continue
        ours, theirs = core.encode(text, add_special_tokens=False).ids, original(text)
        if ours != theirs and not (unordered and sorted(ours) == sorted(theirs)):
            raise SourceError(
                f"{path}: converted to {JSON}, {text!r} becomes {ours}, but the original says {theirs}",
                f"make a {JSON} with the model's own code and put it into the directory",
            )
