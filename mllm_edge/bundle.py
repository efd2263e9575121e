"""The bundle on disk: reading, checking and choosing variants.

A bundle is untrusted input: nothing is unpickled, and no file outside its directory is opened.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mllm_edge.errors import BundleError
from mllm_edge.json_form import from_json, to_json
from mllm_edge.spec import SCHEMA_VERSION, FileEntry, GenerationSpec, Manifest, Variant

__all__ = ["MANIFEST", "Bundle", "file_entries", "sha256", "write_manifest"]

MANIFEST = "manifest.json"
GENERATION = "generation.json"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
_CHUNK = 1 << 20
_EXPORT_AGAIN = "export it again with `mllm-edge export MODEL OUT --force`"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory and its manifest. Opening checks schema, sizes and paths, not hashes."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path) -> "Bundle":
        """Open the bundle in `path`; raises BundleError when it is none, damaged or newer than this version."""
        folder = Path(path)
        bundle = cls(folder, _read_manifest(folder))
        for name, entry in bundle.manifest.files.items():
            file = bundle.file(name)
            if not file.is_file():
                raise BundleError(f"{folder}: {name} is missing", _EXPORT_AGAIN)
            if file.stat().st_size != entry.nbytes:
                raise BundleError(
                    f"{folder}: {name} has {file.stat().st_size} bytes, the manifest says {entry.nbytes}",
                    f"the copy is incomplete: copy the bundle again, or {_EXPORT_AGAIN}",
                )
        for component in bundle.manifest.components.values():
            for variant in component.variants:
                bundle.listed(variant.file)
        return bundle

    def file(self, name: str) -> Path:
        """The path of a file of the bundle; raises BundleError for a name that leads outside it."""
        parts = PurePosixPath(name)
        path = self.path / name
        escapes = parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name
        if escapes or not path.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{self.path}: the manifest names {name!r}, outside the bundle", _EXPORT_AGAIN)
        return path

    def listed(self, name: str) -> Path:
        """Like `file`, for a file that must be in the manifest's list (so that its size was checked)."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name} is not in the manifest's list of files", _EXPORT_AGAIN)
        return self.file(name)

    def variant(self, component: str, target: str) -> Variant:
        """The form of a component for a target; raises BundleError that lists the targets it has."""
        entry = self.manifest.components.get(component)
        if entry is None:
            raise BundleError(f"{self.path}: the bundle has no {component}", _EXPORT_AGAIN)
        for variant in entry.variants:
            if variant.target == target:
                return variant
        have = ", ".join(sorted({v.target for v in entry.variants}))
        raise BundleError(
            f"{self.path}: {component} has no variant for target {target!r} (it has: {have})",
            f"export it with --target {target}",
        )

    def generation(self) -> GenerationSpec:
        """Stop ids and special tokens."""
        return from_json(GenerationSpec, _read_json(self.listed(GENERATION)), GENERATION)

    def embeddings(self) -> np.ndarray:
        """Token embeddings [rows, hidden_size], memory-mapped; raises BundleError when shape or dtype are wrong."""
        model = self.manifest.model
        table = self.array(model.embedding.file)
        expected = (model.embedding.rows, model.hidden_size)
        if table.shape != expected or table.dtype != np.dtype(model.embedding.dtype):
            path = self.path / model.embedding.file
            raise BundleError(f"{path}: {table.dtype}{list(table.shape)}, not {list(expected)}", _EXPORT_AGAIN)
        return table

    def array(self, name: str) -> np.ndarray:
        """A .npy file of the bundle, memory-mapped; raises BundleError when it is none."""
        path = self.listed(name)
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as e:
            raise BundleError(f"{path}: not an array ({e})", _EXPORT_AGAIN) from None

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(entry.nbytes for entry in self.manifest.files.values())

    def verify(self, progress: Callable[[int], None] = lambda n: None) -> None:
        """Compare every file with its SHA-256; `progress(n)` is called with bytes read. Raises BundleError."""
        for name, entry in self.manifest.files.items():
            if sha256(self.file(name), progress) != entry.sha256:
                raise BundleError(f"{self.path}: {name} differs from what was exported", _EXPORT_AGAIN)


def sha256(path: Path, progress: Callable[[int], None] = lambda n: None) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def file_entries(folder: Path, hashes: Mapping[Path, str] | None = None) -> dict[str, FileEntry]:
    """Size and hash of every file in `folder` but the manifest; `hashes` holds those that are known already."""
    known, files = hashes or {}, sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): FileEntry(p.stat().st_size, known.get(p) or sha256(p)) for p in files}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into `folder`."""
    text = json.dumps(to_json(manifest), indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        what = "has no manifest.json: it is not a bundle" if folder.is_dir() else "does not exist"
        hint = " (a checkpoint has to be exported first)" if (folder / "config.json").is_file() else ""
        raise BundleError(f"{folder} {what}{hint}", f"mllm-edge export MODEL {folder}")
    data = _read_json(path)
    schema = data.get("schema")
    if not isinstance(schema, int):
        raise BundleError(f"{path}: no schema version: it is not the manifest of a bundle", _EXPORT_AGAIN)
    if schema != SCHEMA_VERSION:
        newer = schema > SCHEMA_VERSION
        raise BundleError(
            f"{path}: schema version {schema}, this mllm-edge reads {SCHEMA_VERSION}",
            "pip install --upgrade mllm-edge" if newer else _EXPORT_AGAIN,
        )
    return from_json(Manifest, data)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as e:
        raise BundleError(f"{path}: not valid JSON ({e})", _EXPORT_AGAIN) from None
    if not isinstance(data, dict):
        raise BundleError(f"{path}: expected a JSON object", _EXPORT_AGAIN)
    return data
