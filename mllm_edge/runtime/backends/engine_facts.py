"""The facts beside an engine's file: what it is of and for, its limits, and by what its bytes are known again.

An engine may have gigabytes. Size, time and a sample of its bytes are compared when it is opened; all of them after it
was copied, which changes its time, and by `mllm-edge inspect --verify`.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

from mllm_edge.checksums import sha256
from mllm_edge.files import write_whole, writing_whole

__all__ = ["FOLDER", "damaged_engines", "facts_file", "known_limits", "stored_engines", "write_engine"]

FOLDER = "engines"
# So many pieces of so many bytes, from the first to the last.
_PIECES, _PIECE = 16, 1 << 16


def facts_file(path: Path) -> Path:
    """Where the facts of an engine's file lie."""
    return path.with_name(f"{path.name}.json")


def write_engine(path: Path, data: memoryview, identity: Mapping[str, str], limits: Mapping[str, int]) -> None:
    """Store an engine, whole or not at all. Raises OSError."""
    facts_file(path).unlink(missing_ok=True)
    with writing_whole(path, data.nbytes) as f:
        f.write(data)
    sample, digest = _sample(data.nbytes, lambda start, stop: data[start:stop]), hashlib.sha256(data).hexdigest()
    _write(path, {"identity": identity, "limits": limits, "sha256": digest} | _marks(path.stat(), sample))


def known_limits(path: Path, identity: Mapping[str, str]) -> dict[str, int] | None:
    """The limits of an engine; None when there is none, it is another's, or damaged."""
    try:
        facts = json.loads(facts_file(path).read_text(encoding="utf-8"))
        if facts["identity"] != identity or not _is_whole(path, facts):
            return None
        return dict(facts["limits"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stored_engines(bundle: Path) -> list[Path]:
    """The engines in a bundle's directory that have their facts beside them; no other is ever opened."""
    return sorted(path for path in (bundle / FOLDER).glob("*.engine") if facts_file(path).is_file())


def damaged_engines(bundle: Path, progress: Callable[[int], None] = lambda n: None) -> Iterator[Path]:
    """Compare all bytes of the engines with their SHA-256; `progress(n)` is called with bytes read."""
    for path in stored_engines(bundle):
        try:
            digest = json.loads(facts_file(path).read_text(encoding="utf-8"))["sha256"]
            good = sha256(path, progress) == digest
        except (OSError, ValueError, KeyError, TypeError):
            good = False
        if not good:
            yield path


def _is_whole(path: Path, facts: dict[str, Any]) -> bool:
    before = path.stat()
    if before.st_size != facts.get("nbytes", before.st_size):
        return False
    with path.open("rb", buffering=0) as f:
        sample = _sample(before.st_size, lambda start, stop: _read(f, start, stop))
    marks = _marks(before, sample)
    if facts.items() >= marks.items():
        return True
    if facts.get("sample", sample) != sample or sha256(path) != facts["sha256"]:
        return False
    with contextlib.suppress(OSError):  # a bundle that cannot be written is compared anew each time
        _write(path, facts | marks)
    return True


def _marks(stat: os.stat_result, sample: str) -> dict[str, Any]:
    return {"nbytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sample": sample}


def _sample(nbytes: int, read: Callable[[int, int], Any]) -> str:
    """XXH3 of pieces; `read(start, stop)` gives their bytes."""
    hasher, last = xxhash.xxh3_64(), max(0, nbytes - _PIECE)
    for start in dict.fromkeys(last * i // (_PIECES - 1) for i in range(_PIECES)):
        hasher.update(read(start, min(start + _PIECE, nbytes)))
    return hasher.hexdigest()


def _read(file: IO[bytes], start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


def _write(path: Path, facts: Mapping[str, Any]) -> None:
    write_whole(facts_file(path), json.dumps(facts, indent=1))
