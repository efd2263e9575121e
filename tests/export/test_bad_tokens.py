"""Vocabulary, special tokens and embeddings that do not fit together, for each family, before anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from mllm_edge.errors import ConfigError
from mllm_edge.export.pipeline import export
from tests.families.row import families_of

# As transformers writes a token that is more than its text.
ADDED = {"__type": "AddedToken", "content": "<mask>", **dict.fromkeys(("lstrip", "rstrip", "single_word"), False)}


@pytest.fixture(params=families_of(""))
def checkpoint(request: pytest.FixtureRequest, saved: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved(request.param), tmp_path / "checkpoint"))


def edit(path: Path, **changes: Any) -> None:
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, **changes}))


def add_tokens(checkpoint: Path, *tokens: tuple[str, int]) -> None:
    path = checkpoint / "tokenizer.json"
    state = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"] += [{"id": i, "content": token, "special": True, **flags} for token, i in tokens]
    path.write_text(json.dumps(state))


def vocabulary(checkpoint: Path) -> int:
    config = json.loads((checkpoint / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"]) + int(config.get("additional_vocab_size", 0))


def words(checkpoint: Path) -> dict[str, int]:
    """The tokens and their ids."""
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab()


def assert_refused(checkpoint: Path, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        export(str(checkpoint), checkpoint.parent / "out", recipe_name="fp32", verify_mode="off")
    for word in words:
        assert word in str(caught.value)
    assert caught.value.fix
    assert not (checkpoint.parent / "out").exists()


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_named_token_missing_from_the_vocabulary(checkpoint: Path, name: str) -> None:
    edit(checkpoint / "tokenizer_config.json", **{name: "<nowhere>"})
    assert_refused(checkpoint, "tokenizer_config.json", name, "'<nowhere>'", "not in the vocabulary")


def test_token_of_the_template_missing_from_the_vocabulary(checkpoint: Path) -> None:
    stated = json.loads((checkpoint / "tokenizer_config.json").read_text()).get("extra_special_tokens")
    named = stated if isinstance(stated, dict) else {}
    edit(checkpoint / "tokenizer_config.json", extra_special_tokens={**named, "boa_token": "<begin>"})
    assert_refused(checkpoint, "boa_token = '<begin>'")


def test_padding_that_no_prompt_needs_may_be_missing(checkpoint: Path) -> None:
    edit(checkpoint / "tokenizer_config.json", pad_token="<nowhere>", mask_token=ADDED)
    assert export(str(checkpoint), checkpoint.parent / "out", dry_run=True).nbytes > 0


def test_more_ids_than_the_vocabulary(checkpoint: Path) -> None:
    filled, size = len(words(checkpoint)), vocabulary(checkpoint)
    add_tokens(checkpoint, *((f"<more_{i}>", i) for i in range(filled, size + 2)))
    assert_refused(checkpoint, f"ids reach {size + 1}", f"vocab_size is {size}")


def test_more_ids_than_embeddings(checkpoint: Path) -> None:
    """The head has all rows, the embeddings do not."""
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    ends, left = (".embed_tokens.weight", "shared.weight", "additional_embedding.weight"), 260
    for name in sorted((n for n in weights if n.endswith(ends)), reverse=True):
        weights[name] = weights[name][:left].contiguous()
        left -= len(weights[name])
    save_file(weights, path)
    last = max(words(checkpoint).values())
    assert last >= 260
    assert_refused(checkpoint, f"ids reach {last}", "embeddings for 260 only")


@pytest.mark.parametrize("number", ["vocab_size", -1, [257, 9999]])
def test_stop_id_that_is_none(checkpoint: Path, number: Any) -> None:
    number = vocabulary(checkpoint) if number == "vocab_size" else number
    edit(checkpoint / "generation_config.json", eos_token_id=number)
    wrong = number[-1] if isinstance(number, list) else number
    assert_refused(checkpoint, f"eos_token_id {wrong}", "never end")
