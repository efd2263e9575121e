"""Opening bundles: whole ones, damaged ones, hostile ones."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.checksums import file_entry
from mllm_edge.errors import BundleError
from mllm_edge.json_form import from_json, to_json
from mllm_edge.manifest_checks import check_manifest
from mllm_edge.spec import SCHEMA_VERSION, Manifest


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_whole_bundle_opens_and_verifies(bundle: Path) -> None:
    seen: list[int] = []
    opened = Bundle.load(bundle)
    opened.verify(seen.append)
    assert sum(seen) == opened.nbytes == sum(p.stat().st_size for p in bundle.iterdir()) - manifest_size(bundle)


def manifest_size(bundle: Path) -> int:
    return (bundle / "manifest.json").stat().st_size


def test_not_a_bundle(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.load(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="it is not a bundle"):
        Bundle.load(tmp_path)
    with pytest.raises(BundleError, match="has to be exported first"):
        VLM.load(tiny_checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": "1"}', "\x00\xff"])
def test_manifest_that_is_none(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.load(bundle)


def test_newer_and_older_schema(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(schema=99))
    with pytest.raises(BundleError, match="upgrade"):
        Bundle.load(bundle)
    edit(bundle, lambda m: m.update(schema=0))
    with pytest.raises(BundleError, match="mllm-edge export"):
        Bundle.load(bundle)


FIXTURES = Path(__file__).with_name("fixtures")


def test_every_schema_there_was_is_read_or_names_what_to_do(tmp_path: Path) -> None:
    """`manifest-N.json` is what a version with schema N wrote; a new schema needs a new file."""
    assert {path.stem for path in FIXTURES.glob("manifest-*.json")} == {
        f"manifest-{n}" for n in range(1, SCHEMA_VERSION + 1)
    }
    for n in range(1, SCHEMA_VERSION):
        (tmp_path / "manifest.json").write_bytes((FIXTURES / f"manifest-{n}.json").read_bytes())
        with pytest.raises(BundleError, match=f"schema version {n}, this mllm-edge reads {SCHEMA_VERSION}") as error:
            Bundle.load(tmp_path)
        assert "mllm-edge export MODEL OUT --force" in error.value.fix
    present = FIXTURES / f"manifest-{SCHEMA_VERSION}.json"
    manifest = from_json(Manifest, json.loads(present.read_text(encoding="utf-8")))
    check_manifest(manifest)
    assert [stage.component for stage in manifest.model.stages] == ["vision_encoder", "connector"]


def test_missing_and_truncated_files(bundle: Path) -> None:
    data = (bundle / "decoder.onnx.data").read_bytes()
    (bundle / "decoder.onnx.data").write_bytes(data[:-1])
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data has .* bytes"):
        Bundle.load(bundle)
    (bundle / "decoder.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data is missing"):
        Bundle.load(bundle)


def test_changed_byte_is_found_by_verify(bundle: Path) -> None:
    data = bytearray((bundle / "decoder.onnx.data").read_bytes())
    data[100] ^= 1
    (bundle / "decoder.onnx.data").write_bytes(data)
    opened = Bundle.load(bundle)
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data differs"):
        opened.verify()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "c:secret"])
def test_paths_cannot_leave_the_bundle(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("x")
    edit(bundle, lambda m: m["files"].update({name: {"nbytes": 1, "sha256": ""}}))
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.load(bundle)


@pytest.mark.parametrize("name", ["", ".", "a\0b", "C:\\x", "//server/x"])
def test_names_that_are_none(bundle: Path, name: str) -> None:
    edit(bundle, lambda m: m["files"].update({name: {"nbytes": 1, "sha256": ""}}))
    with pytest.raises(BundleError, match="manifest"):
        Bundle.load(bundle)


def as_hub_cache(bundle: Path, folder: Path) -> Path:
    """The bundle as the hub's cache and the Nix store have it: links to files with other names elsewhere."""
    snapshot, blobs = folder / "snapshots" / "abc", folder / "blobs"
    for path in (p for p in bundle.rglob("*") if p.is_file()):
        blob, link = blobs / file_entry(path).sha256, snapshot / path.relative_to(bundle)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_bundle_of_links_answers_alike(bundle: Path, tmp_path: Path) -> None:
    answers = []
    for path in (bundle, as_hub_cache(bundle, tmp_path / "hub")):
        with VLM.load(path, verify=True) as vlm:
            answers.append(vlm.generate("Hi", max_new_tokens=4).token_ids)
    assert answers[0] == answers[1]


def test_damage_behind_a_link_and_a_link_to_nowhere(bundle: Path, tmp_path: Path) -> None:
    snapshot = as_hub_cache(bundle, tmp_path / "hub")
    blob = (snapshot / "decoder.onnx.data").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data is damaged"):
        VLM.load(snapshot)
    blob.unlink()
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data is missing"):
        VLM.load(snapshot)


def test_graph_that_is_not_listed(bundle: Path) -> None:
    edit(bundle, lambda m: m["files"].pop("decoder.onnx"))
    with pytest.raises(BundleError, match=r"decoder\.onnx is not in the manifest's list"):
        Bundle.load(bundle)


def test_unknown_target_lists_those_there_are(bundle: Path) -> None:
    with pytest.raises(BundleError, match="it has: cpu"):
        Bundle.load(bundle).variant("decoder", "tensorrt")
    with pytest.raises(BundleError, match="no text_encoder"):
        Bundle.load(bundle).variant("text_encoder", "cpu")


def test_embeddings_of_another_shape_or_pickled(bundle: Path) -> None:
    path = bundle / "embed_tokens.npy"

    def store(array: np.ndarray) -> None:
        np.save(path, array, allow_pickle=True)
        edit(bundle, lambda m: m["files"]["embed_tokens.npy"].update(to_json(file_entry(path))))

    store(np.zeros((3, 3), np.float32))
    with pytest.raises(BundleError, match=r"float32\[3, 3\]"):
        Bundle.load(bundle).embeddings()
    store(np.array([{"pickled": True}], dtype=object))
    with pytest.raises(BundleError, match="not an array"):
        Bundle.load(bundle).embeddings()


def test_graph_that_onnx_runtime_refuses(bundle: Path) -> None:
    from mllm_edge.errors import BackendError

    path = bundle / "connector.onnx"
    path.write_bytes(b"not a graph")
    edit(bundle, lambda m: m["files"]["connector.onnx"].update(to_json(file_entry(path))))
    with pytest.raises(BackendError, match=r"connector\.onnx"):
        VLM.load(bundle)


def test_graph_that_needs_a_newer_runtime(bundle: Path) -> None:
    from mllm_edge.errors import BackendError

    def raise_minimum(manifest: dict[str, Any]) -> None:
        manifest["components"]["decoder"]["variants"][0]["minimum"] = {"onnxruntime": "99.0"}

    edit(bundle, raise_minimum)
    with pytest.raises(BackendError, match=r"needs ONNX Runtime 99\.0"):
        VLM.load(bundle)


def test_a_bundle_that_a_killed_export_set_aside(bundle: Path) -> None:
    aside = bundle.rename(bundle.with_name(".bundle.old-123"))
    with pytest.raises(BundleError, match=r"an export that was killed .* left it as .*\.bundle\.old-123") as caught:
        Bundle.load(bundle)
    assert caught.value.fix == f"mv {aside} {bundle}"


def test_a_damaged_table_of_positions_is_named(bundle: Path) -> None:
    path = bundle / "table.npy"
    np.save(path, np.zeros((3, 3), np.float32))
    edit(bundle, lambda m: m["files"].update({"table.npy": to_json(file_entry(path))}))
    assert Bundle.load(bundle).array("table.npy").shape == (3, 3)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleError, match=r"table\.npy is damaged"):
        Bundle.load(bundle).array("table.npy")
