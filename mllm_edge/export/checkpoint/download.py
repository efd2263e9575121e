"""From the hub: the files that are read, and no others.

Patterns match paths, and `*` matches `/`, too: all names are spelled out, so that nothing of `original/`,
`checkpoint-500/` or `onnx/` comes along, and no second copy of the weights (`consolidated.safetensors`,
`model.fp16.safetensors`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_edge.errors import SourceError, WeightsError
from mllm_edge.export.checkpoint.files import read_json
from mllm_edge.export.checkpoint.weights import INDEX, SINGLE, no_weights, shard_names

__all__ = ["ADAPTER_FILES", "WANTED", "download", "download_adapter"]

_SHARDS = "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_BESIDE = (  # the adapter's own, looked at for what was changed in training
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
WANTED = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer.json",
    "tokenizer.[0-9]*.json",  # for versions of transformers
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "qwen.tiktoken",
    # InstructBLIP's second tokenizer
    "qformer_tokenizer/tokenizer.json",
    "qformer_tokenizer/tokenizer_config.json",
    "qformer_tokenizer/special_tokens_map.json",
    "qformer_tokenizer/added_tokens.json",
    "qformer_tokenizer/vocab.txt",
    *ADAPTER_FILES,
    *(f"vision-lora/{name}" for name in ADAPTER_FILES),  # Phi-4 multimodal's
    SINGLE,
    INDEX,
    _SHARDS,
]


def download(model: str, revision: str | None) -> tuple[Path, str | None]:
    """The hub's own cache of `owner/name`, and the commit. Raises SourceError when it cannot be had, WeightsError when
    the repository has no safetensors of a whole model."""
    # Shards come last: they are not needed where there is one file.
    folder = _fetch(model, revision, WANTED, ignored=[_SHARDS])
    commit = folder.name if len(folder.name) == 40 else revision
    named = (
        read_json(folder / "config.json").get("transformers_weights") if (folder / "config.json").is_file() else None
    )
    if named:
        _fetch(model, commit, [str(named)])
    if not (folder / SINGLE).is_file():
        index = str(named) if named and str(named).endswith(".json") else INDEX
        if (folder / index).is_file():
            _fetch(model, commit, shard_names(folder / index))
        elif not named:
            raise _without_weights(model, commit)
    return folder, folder.name


def download_adapter(name: str) -> tuple[Path, str]:
    """The hub's own cache of an adapter `owner/name`, and the commit; errors as of `download`."""
    folder = _fetch(name, None, [*ADAPTER_FILES, *_BESIDE])
    if not (folder / ADAPTER_FILES[1]).is_file():
        names = _listed(name, folder.name)
        if names is None or "adapter_model.bin" in names:
            raise WeightsError(
                f"{name}: no {ADAPTER_FILES[1]} on the hub; a pickled adapter_model.bin is not read, for unpickling "
                "can run code",
                f"load it with PEFT, save it with save_pretrained(DIR), which writes {ADAPTER_FILES[1]}, and name DIR",
            )
    return folder, folder.name


def _without_weights(model: str, commit: str | None) -> SourceError:
    names = _listed(model, commit)
    if names is not None:
        return no_weights(model, [name for name in names if "/" not in name])
    return WeightsError(
        f"{model}: the repository gave no {SINGLE} and no {INDEX}; weights that are pickled (.bin, .pt), GGUF "
        "or in another layout are not read",
        "look at the repository's files, and name one with safetensors; or convert them once with transformers' "
        "save_pretrained",
    )


def _listed(model: str, commit: str | None) -> list[str] | None:
    """The repository's files, None where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return list(HfApi().list_repo_files(model, revision=commit))
    except Exception:  # offline, in one of many ways
        return None


def _fetch(model: str, revision: str | None, wanted: Sequence[str], ignored: Sequence[str] | None = None) -> Path:
    import huggingface_hub

    options: dict[str, Any] = {"ignore_patterns": list(ignored)} if ignored else {}
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(wanted), **options))
    except Exception as e:  # the hub client raises many kinds; the first line says which
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise SourceError(
            f"{model}: no such directory, and the hub has not delivered it ({type(e).__name__}: {reason})",
            "check the spelling and the network; for a gated model run `hf auth login` first",
        ) from e
