"""Which files of a checkpoint hold its weights: transformers' choice, and the true reason where there is none."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from mllm_edge.errors import SourceError, WeightsError
from mllm_edge.export.checkpoint.notices import Notices

__all__ = ["INDEX", "SINGLE", "no_weights", "shard_names", "weight_files"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "download the checkpoint again"
_EXPLICIT = "transformers_weights"  # config.json may name the file


def weight_files(folder: Path, config: Mapping[str, Any] | None = None, notices: Notices | None = None) -> list[Path]:
    """`model.safetensors` where it is there, else all shards that the index lists; first of all the file that `config`
    names under transformers_weights.

    Raises WeightsError for a missing shard, a broken index, or a folder without safetensors of a whole model.
    """
    told = Notices() if notices is None else notices
    named = (config or {}).get(_EXPLICIT)
    if named is not None:
        return _named(folder, str(named))
    if (folder / SINGLE).is_file():
        _tell_of_index(folder, told)
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        files = _shards(folder, INDEX)
        _tell_of_others(folder, files, told)
        return files
    raise no_weights(str(folder), [p.name for p in folder.iterdir()], _broken_link(folder))


def shard_names(index: Path) -> list[str]:
    """The files that an index names, sorted; raises WeightsError when it is none."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if all(isinstance(name, str) for name in names) and names:
            return names
        reason = "weight_map names no files"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        reason = f"{type(e).__name__}: {e}"
    raise WeightsError(f"{index}: not a safetensors index ({reason})", _AGAIN)


def no_weights(where: str, names: Collection[str], broken: str = "") -> SourceError:
    """What a folder or repository with these files is, when it holds no safetensors of a whole model."""
    shards = _ending(names, ".safetensors", lambda n: "-of-" in n)
    others = _ending(names, ".safetensors", lambda n: n != "adapter_model.safetensors")
    pickled = _ending(names, (".bin", ".pt", ".pth", ".ckpt"), lambda n: n not in ("training_args.bin", "scheduler.pt"))
    gguf = _ending(names, ".gguf")
    if broken:
        return WeightsError(f"{where}: {broken} is a link to a file that is gone", _AGAIN)
    if shards and INDEX not in names:
        return WeightsError(f"{where}: there are shards ({shards[0]}), but no {INDEX} that lists them", _AGAIN)
    if others:
        return WeightsError(
            f"{where}: no {SINGLE} and no {INDEX} here, only {others[0]}, which transformers does not read either",
            f"use the repository in transformers' layout; if {others[0]} is in that layout, rename it to {SINGLE}",
        )
    if gguf:
        return WeightsError(f"{where}: the weights are GGUF ({gguf[0]}), which is not read", _full_precision(where))
    if pickled:
        return WeightsError(
            f"{where}: the weights are pickled ({pickled[0]}), and unpickling can run code",
            'convert them once: python -c "from transformers import AutoModelForImageTextToText as M; '
            f"M.from_pretrained('{where}').save_pretrained('{Path(where).name}-safetensors')\" "
            "(and copy the tokenizer and processor files)",
        )
    if "adapter_config.json" in names:
        return WeightsError(f"{where}: an adapter without its model", f"mllm-edge export MODEL OUT --adapter {where}")
    return WeightsError(f"{where}: no {SINGLE} here", "name a directory that holds a checkpoint")


def _full_precision(where: str) -> str:
    return f"name the full-precision model that {Path(where).name} was made from"


def _ending(names: Iterable[str], ends: str | tuple[str, ...], wanted: Any = lambda name: True) -> list[str]:
    return sorted(n for n in names if n.lower().endswith(ends) and wanted(n))


def _named(folder: Path, name: str) -> list[Path]:
    where = folder / "config.json"
    if not name.endswith((".safetensors", ".safetensors.index.json")) or Path(name).name != name:
        raise WeightsError(
            f"{where}: {_EXPLICIT} = {name!r} is no safetensors file of this folder", "correct config.json"
        )
    if not (folder / name).is_file():
        raise WeightsError(f"{folder}: {name}, which config.json names under {_EXPLICIT}, is missing", _AGAIN)
    return _shards(folder, name) if name.endswith(".json") else [folder / name]


def _shards(folder: Path, index: str) -> list[Path]:
    names = shard_names(folder / index)
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise WeightsError(f"{folder / index}: {outside[0]} is no file of this folder", _AGAIN)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = [] if len(missing) < len(names) else _ending((p.name for p in folder.iterdir()), ".safetensors")
        beside = f"; {others[0]} is not one that {index} names" if others else ""
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsError(f"{folder}: shard {missing[0]} is missing{more}{beside}", _AGAIN)
    return [folder / name for name in names]


def _tell_of_index(folder: Path, notices: Notices) -> None:
    """A left-over of an earlier save, or another set of the same weights: say which was taken."""
    if not (folder / INDEX).is_file():
        return
    try:
        names = shard_names(folder / INDEX)
    except WeightsError:
        notices.add(f"{folder}: {SINGLE} is read, as transformers does; {INDEX} is broken and left aside")
        return
    if names == [SINGLE]:
        return
    here = [name for name in names if (folder / name).is_file()]
    if len(here) == len(names):
        notices.add(
            f"{folder}: two complete sets of weights: {SINGLE} is read, as transformers does, and not the {len(names)} "
            f"shards of {INDEX} ({names[0]} …); remove the set that is out of date"
        )
    else:
        notices.add(
            f"{folder}: {SINGLE} is read, as transformers does; {INDEX} is left aside ({len(here)} of the {len(names)} "
            "files that it names are here)"
        )


def _tell_of_others(folder: Path, files: list[Path], notices: Notices) -> None:
    """Shards that the index does not name."""
    extra = sorted(p.name for p in folder.glob("model-*-of-*.safetensors") if p not in files)
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        notices.add(f"{folder}: {extra[0]}{more} not read: {INDEX} names other files")


def _broken_link(folder: Path) -> str:
    return next((name for name in (SINGLE, INDEX) if (folder / name).is_symlink()), "")
