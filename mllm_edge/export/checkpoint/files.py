"""Files of a checkpoint as such: where a path that the user gave leads, and JSON."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mllm_edge.errors import SourceError

__all__ = ["LFS_POINTER", "local_path", "read_json"]

# What git leaves in the place of a large file when git-lfs is not installed.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def local_path(text: str | Path) -> Path:
    """A path as people write it: `~` and `file://` URLs are understood. Raises SourceError for a home that isn't."""
    text = str(text)
    if text.lower().startswith("file:"):
        text = url2pathname(urlsplit(text).path)
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError:  # no such user
        raise SourceError(f"{text}: no such home directory", "write the path in full") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises SourceError when the file holds none."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise SourceError(f"{path}: cannot be read ({e.strerror or e})", "download the file again") from None
    try:
        data = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise SourceError(f"{path}: not valid JSON (nested too deeply)", "download the file again") from None
    except ValueError as e:
        if raw.startswith(LFS_POINTER):
            raise SourceError(
                f"{path}: a pointer of git-lfs, not the file itself", f"git -C {path.parent} lfs pull"
            ) from e
        raise SourceError(f"{path}: not valid JSON ({e})", "download the file again") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path}: expected a JSON object", "download the file again")
    return data
