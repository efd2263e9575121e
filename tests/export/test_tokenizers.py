"""Tokenizers without tokenizer.json: converted, with their originals' ids, or refused with the text that differs."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mllm_edge.errors import ConfigError, SourceError
from mllm_edge.export.checkpoint import tokenizers
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.tokenizers import corpus, load_tokenizer
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.vlm import VLM
from tests.tiny import save_tiny_llava

SENTENCES = [f"The quick brown fox number {i} can't jump over the lazy dogs." for i in range(200)]
# Texts that the corpus does not have.
OTHERS = ["USER: Describe it.\nASSISTANT:", "seventeen  cats\n\n\tand 23 Größen 图 🐈‍⬛", "x=[1,2];\n  y = x\n"]


def source(folder: Path) -> Source:
    return Source(str(folder), folder, None, {"model_type": "llava"})


def configure(folder: Path, **settings: Any) -> None:
    """What a checkpoint says about its tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_sentencepiece(folder: Path, kind: str, fallback: bool = True, rule: str = "identity", **options: Any) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in (*SENTENCES, *corpus() * 3) if text.strip()]),
        model_writer=model,
        vocab_size=1400,
        hard_vocab_limit=False,
        model_type=kind,
        byte_fallback=fallback,
        character_coverage=0.98,
        normalization_rule_name=rule,
        minloglevel=3,
        **options,
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def byte_level(pattern: str) -> Tokenizer:
    """A trained byte-level BPE of 400 tokens."""
    from tokenizers import Regex

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return core


def save_merges(folder: Path, pattern: str) -> None:
    folder.mkdir(exist_ok=True)
    byte_level(pattern).model.save(str(folder))


def save_tiktoken(path: Path, pattern: str) -> None:
    """Ranks of bytes first, then of merges in their order."""
    state = json.loads(byte_level(pattern).to_str())["model"]
    to_byte = {c: b for b, c in bytes_to_unicode().items()}
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes(to_byte[c] for c in "".join(pair)) for pair in state["merges"]]
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(dict.fromkeys(tokens))))


# ---------------------------------------------------------------- equal ids
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("fallback", [True, False])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "settings", [{"legacy": True}, {"legacy": False}, {}, {"tokenizer_class": "InternLM2Tokenizer"}]
)
def test_sentencepiece(tmp_path: Path, settings: dict[str, Any], kind: str, fallback: bool, rule: str) -> None:
    save_sentencepiece(tmp_path, kind, fallback, rule, remove_extra_whitespaces=rule != "identity")
    configure(tmp_path, **{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", **settings})
    core = load_tokenizer(source(tmp_path))
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in OTHERS:
        assert core.encode(text, add_special_tokens=False).ids == original.encode(text)
    assert core.get_vocab_size() == original.get_piece_size()


def test_qwen_tiktoken(tmp_path: Path) -> None:
    save_tiktoken(tmp_path / "qwen.tiktoken", tokenizers._QWEN)
    configure(tmp_path, tokenizer_class="QWenTokenizer")
    core = load_tokenizer(source(tmp_path))
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "qwen.tiktoken"))
    special = {token: len(ranks) + i for i, token in enumerate(tokenizers._QWEN_SPECIAL)}
    original = tiktoken.Encoding("qwen", pat_str=tokenizers._QWEN, mergeable_ranks=ranks, special_tokens=special)
    for text in (*OTHERS, "<|im_start|>user\n<img>a.jpg</img>Hello<|im_end|>"):
        assert core.encode(text).ids == original.encode(text, allowed_special="all")
    # As in the model's own configuration: 151643 ranks, image_start_id 151857.
    assert core.token_to_id("<img>") - len(ranks) == 151857 - 151643


def test_tiktoken_that_is_named_like_sentencepiece(tmp_path: Path) -> None:
    save_tiktoken(tmp_path / "tokenizer.model", tokenizers._LLAMA3)
    added = {"400": {"content": "<|begin_of_text|>", "special": True}}
    configure(tmp_path, tokenizer_class="PreTrainedTokenizerFast", added_tokens_decoder=added)
    core = load_tokenizer(source(tmp_path))
    assert core.token_to_id("<|begin_of_text|>") == 400
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "tokenizer.model"))
    original = tiktoken.Encoding("l", pat_str=tokenizers._LLAMA3, mergeable_ranks=ranks, special_tokens={})
    for text in OTHERS:
        assert core.encode(text, add_special_tokens=False).ids == original.encode(text)


@pytest.mark.parametrize(("kind", "pattern"), [("GPT2Tokenizer", "_GPT2"), ("Qwen2Tokenizer", "_QWEN")])
def test_vocabulary_and_merges(tmp_path: Path, kind: str, pattern: str) -> None:
    save_merges(tmp_path, getattr(tokenizers, pattern))
    configure(tmp_path, tokenizer_class=kind)
    core = load_tokenizer(source(tmp_path))
    expected = byte_level(getattr(tokenizers, pattern))
    for text in OTHERS[:1]:
        assert core.encode(text, add_special_tokens=False).ids == expected.encode(text).ids


@pytest.mark.parametrize("lower", [True, False])
def test_word_pieces(tmp_path: Path, lower: bool) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator(
        [t.lower() for t in SENTENCES], trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    )
    vocab = core.get_vocab()
    configure(tmp_path, tokenizer_class="BertTokenizer", do_lower_case=lower)
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)), encoding="utf-8")
    ids = load_tokenizer(source(tmp_path)).encode("The Quick fox").ids
    assert ids[0] == vocab["[CLS]"]
    assert (vocab["[UNK]"] in ids) == (not lower)


def test_llava_with_sentencepiece_alone(tmp_path: Path) -> None:
    """The whole path: the bundle gets a tokenizer.json, and agrees with the reference."""
    folder = tmp_path / "checkpoint"
    save_sentencepiece(tmp_path / "sp", "bpe")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp" / "tokenizer.model")).get_piece_size()
    save_tiny_llava(folder, text={"vocab_size": pieces + 8})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_token_index": pieces, "image_token_id": pieces}))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes((tmp_path / "sp" / "tokenizer.model").read_bytes())
    added = {str(pieces): {"content": "<image>", "special": True, "normalized": False}}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added, **names})
    )
    report = export(str(folder), tmp_path / "out", recipe_name="fp32")
    assert report.parity["greedy_agreement"] == 1
    with VLM.load(tmp_path / "out") as vlm:
        assert vlm.generate("Hello.", max_new_tokens=4, ignore_eos=True).token_ids


def test_checkpoint_with_a_tokenizer_json_is_left_alone(tmp_path: Path) -> None:
    byte_level(tokenizers._GPT2).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"anything")
    assert load_tokenizer(source(tmp_path)).get_vocab_size() == 400


def test_the_corpus_is_awkward() -> None:
    texts = corpus()
    assert len(set(texts)) == len(texts) >= 80
    together = "".join(texts)
    for character in ("\t", "\r\n", "\u00a0", "\u200d", "ب", "क", "你", "한", "😀", "\u0301", "Ġ", "▁"):
        assert character in together
    assert any(t.startswith("  ") for t in texts)
    assert any(t.endswith("  ") for t in texts)
    assert {"", " ", "\n"} <= set(texts)


# ---------------------------------------------------------------- refusals
def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(SourceError) as caught:
        load_tokenizer(source(folder))
    for word in words:
        assert word in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken", "merges", "wordpiece"])
def test_conversion_that_gives_other_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The original is made to differ in a single text."""
    right = tokenizers._convert

    def differ(folder: Path, config: Any) -> Any:
        file, core, original = right(folder, config)
        return file, core, lambda text: [*original(text), 7] if text.startswith("Привет") else original(text)

    _save[name](tmp_path)
    load_tokenizer(source(tmp_path))
    monkeypatch.setattr(tokenizers, "_convert", differ)
    tokenizers._converted.cache_clear()
    assert_refused(tmp_path, "'Привет, как дела?", ", 7]", "the original says")


def _save_model(folder: Path) -> None:
    save_sentencepiece(folder, "bpe")
    configure(folder, tokenizer_class="LlamaTokenizer", legacy=True)


def _save_qwen(folder: Path) -> None:
    save_tiktoken(folder / "qwen.tiktoken", tokenizers._QWEN)
    configure(folder, tokenizer_class="QWenTokenizer")


def _save_merges(folder: Path) -> None:
    save_merges(folder, tokenizers._GPT2)
    configure(folder, tokenizer_class="GPT2Tokenizer")


def _save_words(folder: Path) -> None:
    configure(folder, tokenizer_class="BertTokenizer")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nfox\n##es\n")


_save: dict[str, Callable[[Path], None]] = {
    "tokenizer.model": _save_model,
    "qwen.tiktoken": _save_qwen,
    "merges": _save_merges,
    "wordpiece": _save_words,
}


def test_words_that_are_cut_in_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's pattern in the place of GPT-2's: the corpus notices."""
    _save_merges(tmp_path)
    monkeypatch.setitem(tokenizers._WORDS, "GPT2Tokenizer", tokenizers._QWEN)
    assert_refused(tmp_path, "vocab.json", "the original says")


@pytest.mark.parametrize(("name", "package"), [("tokenizer.model", "sentencepiece"), ("qwen.tiktoken", "tiktoken")])
def test_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    _save[name](tmp_path)
    monkeypatch.setattr(tokenizers, "_installed", lambda module: False)
    assert_refused(tmp_path, name, f"needs {package}", f"pip install {package}")


def test_package_names() -> None:
    assert tokenizers._installed("sentencepiece")
    assert not tokenizers._installed("no_such_package.at_all")


def test_files_that_cannot_be_converted(tmp_path: Path) -> None:
    assert_refused(tmp_path, "no tokenizer.json", "*.tiktoken")
    (tmp_path / "vocab.json").write_text("{}")
    assert_refused(tmp_path, "no tokenizer.json")
    configure(tmp_path, tokenizer_class="Other")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0anothing of the kind")
    assert_refused(tmp_path, "tokenizer.model", "not a SentencePiece model")
    (tmp_path / "tokenizer.model").unlink()
    save_tiktoken(tmp_path / "other.tiktoken", tokenizers._QWEN)
    assert_refused(tmp_path, "'Other'", "QWenTokenizer")
    configure(tmp_path, tokenizer_class="QWenTokenizer")
    (tmp_path / "other.tiktoken").write_bytes(b"not base64 at all")
    assert_refused(tmp_path, "other.tiktoken", "not a tiktoken vocabulary")
    (tmp_path / "other.tiktoken").unlink()
    save_merges(tmp_path, tokenizers._GPT2)
    configure(tmp_path, tokenizer_class="CLIPTokenizer")
    assert_refused(tmp_path, "CLIPTokenizer", "GPT2Tokenizer")


def test_vocabulary_larger_than_the_embeddings(tmp_path: Path) -> None:
    """More ids than embeddings, with a converted tokenizer."""
    folder = tmp_path / "checkpoint"
    save_tiny_llava(folder)
    (folder / "tokenizer.json").unlink()
    save_sentencepiece(folder, "bpe", user_defined_symbols=["<image>"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    number, config = original.piece_to_id("<image>"), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_token_index": number, "image_token_id": number}))
    with pytest.raises(ConfigError, match=f"token ids reach {original.get_piece_size() - 1}, but vocab_size is 320"):
        export(str(folder), tmp_path / "out", dry_run=True)
