"""The bundle on disk: reading, checking and choosing variants.

A bundle is untrusted input: nothing is unpickled, and no name leads outside its directory. Opening it compares texts
with their checksums; graphs and weights are compared when they are opened, embeddings when their rows are first read.
"""

import glob
import json
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mllm_edge.checksums import Touched, damaged_block, file_entry, own_checksum, sha256
from mllm_edge.errors import BundleError
from mllm_edge.install import install_hint
from mllm_edge.json_form import from_json, to_json
from mllm_edge.manifest_checks import check_manifest
from mllm_edge.spec import SCHEMA_VERSION, FileEntry, GenerationSpec, Manifest, Variant

__all__ = ["MANIFEST", "Bundle", "file_entries", "sha256", "write_manifest"]

MANIFEST = "manifest.json"
GENERATION = "generation.json"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
_NO_CHECKSUM = "0" * 12 + "-" + "0" * 16
_EXPORT_AGAIN = "export it again with `mllm-edge export MODEL OUT --force`"
_COPY_AGAIN = f"copy the bundle again from where it is whole, or {_EXPORT_AGAIN}"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory and its manifest. Opening checks schema, sizes and names, and the
    checksums of texts."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path) -> "Bundle":
        """Open the bundle in `path`; raises BundleError when it is none, damaged or newer than this version."""
        folder = Path(path)
        bundle = cls(folder, _read_manifest(folder))
        for name, entry in bundle.manifest.files.items():
            size = bundle._size(name)
            if size is None:
                raise BundleError(f"{folder}: {name} is missing", _EXPORT_AGAIN)
            if size != entry.nbytes:
                raise BundleError(
                    f"{folder}: {name} has {size} bytes, the manifest says {entry.nbytes}",
                    f"the copy is incomplete: copy the bundle again, or {_EXPORT_AGAIN}",
                )
        for component in bundle.manifest.components.values():
            for variant in component.variants:
                bundle.listed(variant.file)
        try:
            check_manifest(bundle.manifest)
        except BundleError as e:
            raise BundleError(f"{folder}: {e.message}", e.fix) from None
        for name in bundle.texts():
            bundle.check(name)
        return bundle

    @property
    def identity(self) -> str:
        """A checksum of its files' checksums: of another content another."""
        listed = sorted((name, entry.sha256) for name, entry in self.manifest.files.items())
        return own_checksum("".join(f"{name} {digest}\n" for name, digest in listed).encode(errors="surrogatepass"))

    def file(self, name: str) -> Path:
        """The path of a file of the bundle; raises BundleError for a name that leads outside it."""
        # Names are judged, and not where links lead: the hub's cache and the Nix store are made of links.
        parts = PurePosixPath(name)
        escapes = (
            parts.is_absolute() or ".." in parts.parts or any(c in "\\:\0" or "\ud800" <= c <= "\udfff" for c in name)
        )
        if escapes or not parts.parts:
            raise BundleError(f"{self.path}: the manifest names {name!r}, outside the bundle", _EXPORT_AGAIN)
        return self.path / name

    def _size(self, name: str) -> int | None:
        """The bytes of a file of the bundle, None when it is none."""
        path = self.file(name)
        try:
            return path.stat().st_size if path.is_file() else None
        except OSError as e:
            raise BundleError(f"{self.path}: {name} cannot be read: {e.strerror}", _EXPORT_AGAIN) from e

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
        spec: GenerationSpec = from_json(GenerationSpec, _read_json(self.listed(GENERATION)), GENERATION)
        if any(token < 0 for token in spec.eos_token_ids):
            raise BundleError(f"{self.path}: {GENERATION}: stop ids {list(spec.eos_token_ids)}", _EXPORT_AGAIN)
        return spec

    def embeddings(self) -> np.ndarray:
        """Token embeddings [rows, hidden_size], memory-mapped; raises BundleError when shape or dtype are wrong. No row
        is compared with its checksum yet: see `touched`."""
        model = self.manifest.model
        self.touched(model.embedding.file)(0, 1)  # the header
        table = self._mapped(model.embedding.file)
        expected = (model.embedding.rows, model.hidden_size)
        if table.shape != expected or table.dtype != np.dtype(model.embedding.dtype):
            path = self.path / model.embedding.file
            raise BundleError(f"{path}: {table.dtype}{list(table.shape)}, not {list(expected)}", _EXPORT_AGAIN)
        return table

    def array(self, name: str) -> np.ndarray:
        """A .npy file of the bundle, memory-mapped; raises BundleError when it is none, or damaged."""
        self.check(name)
        return self._mapped(name)

    def _mapped(self, name: str) -> np.ndarray:
        path = self.listed(name)
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as e:
            raise BundleError(f"{path}: not an array ({e})", _EXPORT_AGAIN) from None

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(entry.nbytes for entry in self.manifest.files.values())

    def texts(self) -> list[str]:
        """The files that are neither graphs nor weights nor arrays nor pictures, all of them small."""
        graphs = tuple(v.file for c in self.manifest.components.values() for v in c.variants)
        return [n for n in self.manifest.files if n.endswith((".json", ".jinja")) and not n.startswith(graphs)]

    def check(self, name: str) -> None:
        """Compare a file with its checksums; raises BundleError that names the damaged bytes. Bundles of older versions
        have no checksums, and are only checked by `verify`."""
        place = damaged_block(self.listed(name), self.manifest.files[name])
        if place is not None:
            raise self._damaged(name, place)

    def check_all(self) -> None:
        """`check` every file: before work that reads all of them."""
        for name in self.manifest.files:
            self.check(name)

    @contextmanager
    def checking(self, variant: Variant) -> Iterator[None]:
        """Compare a variant's graph with its checksums now, and its weights in a thread while the body opens it.

        Raises BundleError in the end, whatever the body made of a damaged file.
        """
        self.check(variant.file)
        found: list[BaseException] = []
        weights = [n for n in self.manifest.files if n.startswith(variant.file) and n != variant.file]

        def compare() -> None:
            try:
                for name in weights:
                    self.check(name)
            except BaseException as e:  # raised again where it can be handled
                found.append(e)

        thread = threading.Thread(target=compare, name="checksums", daemon=True)
        thread.start()
        try:
            yield
        except Exception as e:
            thread.join()
            if found:
                raise found[0] from e
            raise
        thread.join()
        if found:
            raise found[0]

    def touched(self, name: str) -> Touched:
        """What compares the blocks of an array with their checksums when they are first read."""
        return Touched(self.listed(name), self.manifest.files[name], lambda place: self._damaged(name, place))

    def verify(self, progress: Callable[[int], None] = lambda n: None) -> None:
        """Compare every file with its SHA-256; `progress(n)` is called with bytes read. Raises BundleError."""
        for name, entry in self.manifest.files.items():
            if sha256(self.file(name), progress) != entry.sha256:
                raise BundleError(f"{self.path}: {name} differs from what was exported", _COPY_AGAIN)

    def _damaged(self, name: str, place: range) -> BundleError:
        return BundleError(
            f"{self.path}: {name} is damaged: bytes {place.start} to {place.stop - 1} differ from what was exported",
            _COPY_AGAIN,
        )


def file_entries(folder: Path, known: Mapping[Path, FileEntry] | None = None) -> dict[str, FileEntry]:
    """Size and checksums of every file in `folder` but the manifest; `known` are those that need not be read again."""
    found, files = known or {}, sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): found.get(p) or file_entry(p) for p in files}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into `folder`, with its own checksum."""
    data = {**to_json(manifest), "checksum": _NO_CHECKSUM}
    text = (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
    (folder / MANIFEST).write_bytes(text.replace(_NO_CHECKSUM.encode(), own_checksum(text).encode()))


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        aside = sorted(folder.absolute().parent.glob(f".{glob.escape(folder.name)}.old-*"))
        if aside and not folder.exists():
            raise BundleError(
                f"{folder} does not exist: an export that was killed while it replaced it left it as {aside[0]}",
                f"mv {shlex.quote(str(aside[0]))} {shlex.quote(str(folder))}",
            )
        what = "has no manifest.json: it is not a bundle" if folder.is_dir() else "does not exist"
        if folder.is_file():
            what = "is a file, not the directory of a bundle"
        hint = " (a checkpoint has to be exported first)" if (folder / "config.json").is_file() else ""
        raise BundleError(f"{folder} {what}{hint}", f"mllm-edge export MODEL {folder}")
    data = _read_json(path)
    _check_own(path, data)
    schema = data.get("schema")
    if not isinstance(schema, int):
        raise BundleError(f"{path}: no schema version: it is not the manifest of a bundle", _EXPORT_AGAIN)
    if schema != SCHEMA_VERSION:
        newer = schema > SCHEMA_VERSION
        raise BundleError(
            f"{path}: schema version {schema}, this mllm-edge reads {SCHEMA_VERSION}",
            f"upgrade mllm-edge: {install_hint()}" if newer else _EXPORT_AGAIN,
        )
    return from_json(Manifest, data)


def _check_own(path: Path, data: Mapping[str, Any]) -> None:
    """Raise BundleError for a manifest that was damaged after it was written. One of another size was edited by
    someone, who is trusted to mean it."""
    told, text = data.get("checksum"), path.read_bytes()
    if not isinstance(told, str) or len(text) != int(told[:12] if told[:12].isdecimal() else 0):
        return
    if own_checksum(text.replace(told.encode(), _NO_CHECKSUM.encode())) != told:
        raise BundleError(f"{path} is damaged: it differs from what was exported", _COPY_AGAIN)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise BundleError(f"{path}: nested too deep", _EXPORT_AGAIN) from None
    except (ValueError, UnicodeDecodeError) as e:
        raise BundleError(f"{path}: not valid JSON ({e})", _EXPORT_AGAIN) from None
    if not isinstance(data, dict):
        raise BundleError(f"{path}: expected a JSON object", _EXPORT_AGAIN)
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a key that is there twice would hide one of its values."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
