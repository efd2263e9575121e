"""A manifest whose parts contradict each other, or are of the wrong kind, is named: never another error."""

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.cli import main
from mllm_edge.errors import BundleError, MllmEdgeError
from mllm_edge.export.pipeline import export
from mllm_edge.export.targets import TARGETS
from mllm_edge.manifest_checks import DIALECTS
from tests.tiny_florence2 import save_tiny_florence2
from tests.tiny_mllama import save_tiny_mllama

PICTURE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
DELETE = object()
VALUES: list[Any] = [
    DELETE,
    None,
    True,
    -1,
    0,
    1,
    7,
    10**12,
    10**400,
    0.5,
    1e300,
    "",
    "x",
    "../x",
    "\ud800",
    [],
    [0],
    [[]],
    {},
    {"x": 1},
]
SAMPLES = 500


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose manifest each test writes anew."""
    return Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("mutated") / "bundle"))


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((tiny_bundle / "manifest.json").read_text())
    del data["checksum"]  # what was edited is taken to be meant
    return data


def nodes(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a JSON value."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from nodes(value, (*path, key))


def mutated(data: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(data)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    if value is DELETE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


def use(bundle: Path) -> None:
    """What a user does; any answer is right, and so is a named error."""
    with contextlib.suppress(MllmEdgeError), VLM.load(bundle, threads=1) as vlm:
        vlm.generate("Hi", PICTURE if vlm.spec.image else (), max_new_tokens=2)


def check(bundle: Path, data: dict[str, Any], name: str = "manifest.json") -> None:
    (bundle / name).write_text(json.dumps(data))
    use(bundle)


def test_the_targets_are_those_of_the_exporter() -> None:
    assert DIALECTS == TARGETS


@pytest.mark.parametrize("seed", range(4))
def test_any_change_is_named_or_does_no_harm(bundle: Path, manifest: dict[str, Any], seed: int) -> None:
    chosen, places = random.Random(seed), list(nodes(manifest))
    for _ in range(SAMPLES // 4):
        path, value = chosen.choice(places), chosen.choice(VALUES)
        try:
            check(bundle, mutated(manifest, path, value))
        except Exception as e:
            raise AssertionError(f"{path} = {value!r}") from e


@pytest.mark.parametrize("name", ["generation.json", "tokenizer.json"])
def test_any_change_of_the_texts(bundle: Path, manifest: dict[str, Any], tiny_bundle: Path, name: str) -> None:
    data = json.loads((tiny_bundle / name).read_text())
    chosen, places = random.Random(0), list(nodes(data))
    for _ in range(60):
        path, value = chosen.choice(places), chosen.choice(VALUES)
        (bundle / name).write_text(json.dumps(mutated(data, path, value)))
        size = (bundle / name).stat().st_size
        try:
            check(bundle, mutated(manifest, ("files", name), {"nbytes": size, "sha256": ""}))
        except Exception as e:
            raise AssertionError(f"{path} = {value!r}") from e
    shutil.copy(tiny_bundle / name, bundle / name)


def decoder(m: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = m["components"]["decoder"]["variants"][0]
    return found


def drop(tensors: list[dict[str, Any]], name: str) -> None:
    tensors[:] = [tensor for tensor in tensors if tensor["name"] != name]


def added(name: str, size: int) -> dict[str, Any]:
    return {"name": name, "dtype": "float32", "shape": ["batch", "sequence", size]}


def several(m: dict[str, Any], resolutions: list[list[int]]) -> None:
    """Other transforms for several images."""
    fitted = {"op": "select_resolution", "resolutions": resolutions, "size": 64, "resample": "bicubic"}
    m["model"]["image"]["several"] = [fitted, *m["model"]["image"]["transforms"][-2:]]


def windows(side: int) -> dict[str, Any]:
    return {"op": "grid_windows", "side": side, "names": ["a", "b", "c"]}


def split_large(m: dict[str, Any], **changes: Any) -> None:
    """Large images in tiles of two by two cells."""
    sizes = {"cell": 16, "min_cells": 1, "max_cells": 9, "large": 2.0, "thinnest": 8, "size": 32}
    tiles = {"min_tiles": 2, "max_tiles": 4, "overview": True, "resample": "bilinear"}
    split = {"op": "split_large", **sizes, **tiles, **changes}
    m["model"]["image"]["transforms"] = [split, *m["model"]["image"]["transforms"][-2:]]


def merged(*sides: int) -> list[dict[str, Any]]:
    return [{"op": "grid_merge", "side": side, "names": [f"m{i}"]} for i, side in enumerate(sides)]


def learned(side: int, dim: int) -> dict[str, Any]:
    return {"op": "learned_positions", "file": "tokenizer.json", "side": side, "dim": dim, "names": ["a"]}


def view(m: dict[str, Any], **changes: Any) -> None:
    """A further view of images, which are cut."""
    image = m["model"]["image"]
    image["views"] = [{"name": "large", "transforms": image["transforms"][-2:], "height": 64, "width": 64, **changes}]


CONTRADICTIONS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("there is no decoder", lambda m: m["components"].pop("decoder")),
    ("there is no vision_encoder", lambda m: m["components"].pop("vision_encoder")),
    ("there is no connector", lambda m: m["components"].pop("connector")),
    ("takes no images, and has 2 stages", lambda m: m["model"].update(image=None)),
    ("takes images, and has 0 stages", lambda m: m["model"].update(stages=[])),
    ("no stage runs connector", lambda m: m["model"]["stages"].pop()),
    (
        "the stages are vision_encoder, connector, vision_encoder",
        lambda m: m["model"]["stages"].append(m["model"]["stages"][0]),
    ),
    (
        "no stage has the output image_features",
        lambda m: m["components"]["connector"]["variants"][0]["outputs"][0].update(name="x"),
    ),
    (r"image\.features is 0", lambda m: m["model"]["image"].update(features=0)),
    ("images are fitted into one of no resolutions", lambda m: several(m, resolutions=[])),
    (r"a resolution of \[64, 65\] px", lambda m: several(m, resolutions=[[64, 65]])),
    (r"a resolution of \[640000, 640000\] px", lambda m: several(m, resolutions=[[640000, 640000]])),
    (r"a resolution of \[64\] px", lambda m: several(m, resolutions=[[64]])),
    (r"pack\.most is 0", lambda m: m["model"]["image"].update(pack=[{"op": "shrink", "most": 0}])),
    ("windows of 0 cells", lambda m: m["model"]["image"].update(tables=[windows(0)])),
    ("merged cells' side is 0", lambda m: m["model"]["image"].update(tables=merged(0))),
    ("the table grid_merge, which follows their grid", lambda m: m["model"]["image"].update(tables=merged(2))),
    ("merged more than once", lambda m: m["model"]["image"].update(tables=merged(2, 2))),
    ("windows of 1000 cells", lambda m: m["model"]["image"].update(tables=[windows(1000)])),
    ("features are packed, and 3 of a tile", lambda m: m["model"]["image"].update(features=3, pack=[{"op": "unpad"}])),
    (
        "newline.npy is not in the manifest",
        lambda m: m["model"]["image"].update(pack=[{"op": "row_end", "file": "newline.npy"}]),
    ),
    (r"transforms\[0\]\.large is 0", lambda m: split_large(m, large=0.0)),
    ("5 to 4 tiles", lambda m: split_large(m, min_tiles=5)),
    ("10 to 9 cells", lambda m: split_large(m, min_cells=10)),
    ("cut into 1 tiles of 32 px and cells of 16 px", lambda m: split_large(m, min_tiles=1)),
    ("cut into 2 tiles of 33 px and cells of 16 px", lambda m: split_large(m, size=33)),
    ("learned positions' side is 0", lambda m: m["model"]["image"].update(tables=[learned(0, 4)])),
    ("learned positions' dim is -4", lambda m: m["model"]["image"].update(tables=[learned(3, -4)])),
    (
        "places.npy is not in the manifest",
        lambda m: m["model"]["image"].update(tables=[{**learned(3, 4), "file": "places.npy"}]),
    ),
    ("the view large is not transformed", lambda m: view(m, transforms=[])),
    (r"large\.width is 0", lambda m: view(m, width=0)),
    ("several inputs of images are called .*pixel_values", lambda m: view(m, name="pixel_values")),
    (r"large is made of whole images, and these are cut \(split_tiles\)", view),
    ("it takes no attention_bias", lambda m: m["model"]["image"].update(both_ways="image")),
    ("decoder has no variants", lambda m: m["components"]["decoder"].update(variants=[])),
    ("decoder has several variants for cpu", lambda m: m["components"]["decoder"]["variants"].append(decoder(m))),
    ("decoder for gpu: no such target", lambda m: decoder(m).update(target="gpu")),
    ("its dialect is opset17, not contrib", lambda m: decoder(m).update(dialect="opset17")),
    ("its kv_mode is append, not in_place", lambda m: decoder(m).update(kv_mode="append")),
    ("its kv_mode is None, not in_place", lambda m: decoder(m).pop("kv_mode")),
    ("it has no input inputs_embeds", lambda m: drop(decoder(m)["inputs"], "inputs_embeds")),
    ("it has no input seqlens_k", lambda m: drop(decoder(m)["inputs"], "seqlens_k")),
    (r"it has no input past_key_values\.0\.key", lambda m: drop(decoder(m)["inputs"], "past_key_values.0.key")),
    (r"it has no output present\.0\.value", lambda m: drop(decoder(m)["outputs"], "present.0.value")),
    ("it has no output logits", lambda m: drop(decoder(m)["outputs"], "logits")),
    ("it has no input cos", lambda m: drop(decoder(m)["inputs"], "cos")),
    ("no stage takes pixel_values", lambda m: m["components"]["vision_encoder"]["variants"][0].update(inputs=[])),
    (
        "connector for cpu: nothing gives its input x",
        lambda m: m["components"]["connector"]["variants"][0]["inputs"][0].update(name="x"),
    ),
    (
        r"decoder for cpu: nothing gives its input deepstack\.0",
        lambda m: decoder(m)["inputs"].append(added("deepstack.0", 64)),
    ),
    (
        r"decoder for cpu: it has no input deepstack\.0, which a stage makes",
        lambda m: m["components"]["connector"]["variants"][0]["outputs"].append(added("deepstack.0", 64)),
    ),
    (
        r"decoder for cpu: deepstack\.0 ends with 64, it is given 65",
        lambda m: (
            decoder(m)["inputs"].append(added("deepstack.0", 64)),
            m["components"]["connector"]["variants"][0]["outputs"].append(added("deepstack.0", 65)),
        ),
    ),
    ("context_length is 0", lambda m: m["model"].update(context_length=0)),
    ("hidden_size is -64", lambda m: m["model"].update(hidden_size=-64)),
    ("vocab_size is .*, and there are 3 embeddings", lambda m: m["model"]["embedding"].update(rows=3)),
    (r"nothing\.npy is not in the manifest's list", lambda m: m["model"]["embedding"].update(file="nothing.npy")),
    ("of -5 bytes|: -5 bytes|manifest says -5", lambda m: m["files"]["tokenizer.json"].update(nbytes=-5)),
    ("digits of checksums do not fit", lambda m: m["files"]["tokenizer.json"].update(block=1)),
    ("does not fit 1 layers", lambda m: m["model"]["state"][0].update(layers=[0])),
    ("the model says 3 heads", lambda m: m["model"]["state"][0]["shape"].__setitem__(0, 3)),
    ("with 0 ropes", lambda m: m["model"]["positions"].update(ropes=[])),
    ("with the table ''", lambda m: m["model"]["positions"].update(kind="learned", ropes=[])),
    ("theta 0", lambda m: m["model"]["positions"]["ropes"][0].update(theta=0)),
    ("images are not transformed", lambda m: m["model"]["image"].update(transforms=[])),
    ("not in an order that can be", lambda m: m["model"]["image"]["transforms"].reverse()),
    ("image token", lambda m: m["model"]["image"]["prompt"].update(token_id=10**6)),
    ("nested deeper than", lambda m: m["recipe"].update(x=json.loads("[" * 90 + "]" * 90))),
]


@pytest.mark.parametrize(("words", "change"), CONTRADICTIONS, ids=[words for words, _ in CONTRADICTIONS])
def test_a_contradiction_is_named(
    bundle: Path, manifest: dict[str, Any], words: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    changed = copy.deepcopy(manifest)
    change(changed)
    (bundle / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(BundleError, match=words) as caught:
        VLM.load(bundle)
    assert str(bundle) in caught.value.message or "manifest" in caught.value.message


@pytest.fixture(scope="module")
def crossing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose decoder looks at images by cross-attention."""
    folder = tmp_path_factory.mktemp("crossing")
    save_tiny_mllama(folder / "model")
    export(str(folder / "model"), folder / "bundle", recipe_name="fp32", verify_mode="off")
    return folder / "bundle"


def image(m: dict[str, Any], **changes: Any) -> None:
    m["model"]["image"].update(changes)


def cross_kv(m: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = m["components"]["cross_kv"]["variants"][0]
    return found


PARTS = ("key", "value")
CROSSING: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("there is no cross_kv", lambda m: m["components"].pop("cross_kv")),
    ("cross_kv run for whole prompts, and others behind", lambda m: m["model"]["stages"].reverse()),
    ("cross_kv for cpu: nothing gives its input x", lambda m: cross_kv(m)["inputs"][0].update(name="x")),
    (
        "cross_kv for cpu: nothing gives its input pixel_values",
        lambda m: cross_kv(m)["inputs"][0].update(name="pixel_values"),
    ),
    ("is given 3 axes", lambda m: cross_kv(m)["inputs"][0].update(shape=[1, 64])),
    (r"decoder for cpu: nothing gives its input cross\.1\.key", lambda m: drop(cross_kv(m)["outputs"], "cross.1.key")),
    (r"it is given \['batch', 2, 'features', 8\]", lambda m: cross_kv(m)["outputs"][0]["shape"].__setitem__(3, 8)),
    ("features go into tokens", lambda m: image(m, into="tokens")),
    ("features go into cross_attention", lambda m: drop(decoder(m)["inputs"], "cross_attention_bias")),
    ("images have 3 tiles, and the transforms make up to 4", lambda m: image(m, tiles=3)),
    ("images have 0 tiles", lambda m: image(m, tiles=0)),
    ("images have aspect_ratio_id, and no stage runs", lambda m: [s.update(per="slice") for s in m["model"]["stages"]]),
    ("packed or cut into cells", lambda m: image(m, pack=[{"op": "unpad"}], features=9)),
    ("a canvas of up to 1025 tiles", lambda m: m["model"]["image"]["transforms"][0].update(max_tiles=1025)),
    ("a canvas of up to 4 tiles of 9999 px", lambda m: m["model"]["image"]["transforms"][0].update(size=9999)),
    ("grids of up to 5 tiles are numbered", lambda m: m["model"]["image"]["tables"][0].update(max_tiles=5)),
    ("makes 1 inputs, and 2 have names", lambda m: m["model"]["image"]["tables"][0].update(names=["a", "b"])),
]


@pytest.mark.parametrize(("words", "change"), CROSSING, ids=[words for words, _ in CROSSING])
def test_a_contradiction_about_cross_attention_is_named(
    crossing: Path, words: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    text = (crossing / "manifest.json").read_text()
    data = json.loads(text)
    del data["checksum"]
    change(data)
    try:
        (crossing / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(BundleError, match=words):
            VLM.load(crossing)
    finally:
        (crossing / "manifest.json").write_text(text)


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose prompts a text encoder reads."""
    folder = tmp_path_factory.mktemp("reading")
    save_tiny_florence2(folder / "model")
    export(str(folder / "model"), folder / "bundle", recipe_name="fp32", verify_mode="off")
    return folder / "bundle"


def encoder(m: dict[str, Any], **changes: Any) -> None:
    m["model"]["text_encoder"].update(changes)


def read(m: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = m["components"]["text_encoder"]["variants"][0]
    return found


READING: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("there is no text_encoder", lambda m: m["components"].pop("text_encoder")),
    ("text_encoder is not, and .* run for whole prompts", lambda m: m["model"].pop("text_encoder")),
    ("no stage runs cross_kv", lambda m: m["model"]["stages"].pop()),
    (
        "text_encoder is stated, and .* run for whole prompts",
        lambda m: m["model"]["stages"].insert(2, m["model"]["stages"].pop()),
    ),
    (r"start is \[\], of 280 tokens", lambda m: encoder(m, start=[])),
    (r"start is \[280\], of 280 tokens", lambda m: encoder(m, start=[280])),
    ("text_encoder: positions of kind none", lambda m: m["model"]["text_encoder"]["positions"].update(kind="none")),
    ("are those of a decoder", lambda m: m["model"]["text_encoder"]["positions"].update(windows=[4])),
    (
        "nothing.npy is not in the manifest",
        lambda m: m["model"]["text_encoder"]["positions"].update(table="nothing.npy"),
    ),
    ("text_encoder for cpu: nothing gives its input x", lambda m: read(m)["inputs"][0].update(name="x")),
    ("attention_bias has the shape .*, it is given 4 axes", lambda m: read(m)["inputs"][1].update(shape=[1, 64])),
    ("nothing gives its input encoder_hidden_states", lambda m: read(m)["outputs"][0].update(name="x")),
    ("reads features of images, and they go into cross_attention", lambda m: image(m, into="cross_attention")),
    ("it looks at nothing", lambda m: [drop(decoder(m)["inputs"], f"cross.{i}.{p}") for i in (0, 1) for p in PARTS]),
    (
        "no stage has the output image_features",
        lambda m: m["components"]["connector"]["variants"][0]["outputs"][0].update(name="x"),
    ),
]


@pytest.mark.parametrize(("words", "change"), READING, ids=[f"{i}-{words}" for i, (words, _) in enumerate(READING)])
def test_a_contradiction_about_a_text_encoder_is_named(
    reading: Path, words: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    test_a_contradiction_about_cross_attention_is_named(reading, words, change)


def test_any_change_of_a_model_with_a_text_encoder(reading: Path, tmp_path: Path) -> None:
    any_change(reading, tmp_path, "text_encoder")


def test_any_change_of_a_model_with_cross_attention(crossing: Path, tmp_path: Path) -> None:
    any_change(crossing, tmp_path, "image")


def any_change(source: Path, folder: Path, part: str) -> None:
    """Of a part of the model, and what its prompts are looked at by."""
    bundle = Path(shutil.copytree(source, folder / "bundle"))
    data = json.loads((source / "manifest.json").read_text())
    del data["checksum"]
    places = [path for path in nodes(data) if path[:1] == ("model",) and path[1:2] in ((part,), ("stages",))]
    places += [p for p in nodes(data) if p[:2] in (("components", "cross_kv"), ("components", "text_encoder"))]
    chosen = random.Random(0)
    for _ in range(150):
        path, value = chosen.choice(places), chosen.choice(VALUES)
        try:
            check(bundle, mutated(data, path, value))
        except Exception as e:
            raise AssertionError(f"{path} = {value!r}") from e


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "nested too deep|not valid JSON"),
        ('{"schema": 1, "schema": 1}', "the key 'schema' is there twice"),
        ('{"schema": NaN}', "NaN is no number"),
        ('{"schema": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_json_that_is_none(bundle: Path, text: str, words: str) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=words):
        Bundle.load(bundle)


def test_a_damaged_digit_of_the_manifest_is_named(bundle: Path, tiny_bundle: Path) -> None:
    text = (tiny_bundle / "manifest.json").read_bytes()
    chosen = random.Random(0)
    places = [i for i in range(len(text)) if chr(text[i]).isalnum()]
    for place in chosen.sample(places, 100):
        other = ord("1") if text[place] != ord("1") else ord("2")
        (bundle / "manifest.json").write_bytes(text[:place] + bytes([other]) + text[place + 1 :])
        if place > text.index(b'"checksum": "') and place < text.index(b'"checksum": "') + 26:
            continue  # the size that it is said to have: all else is as it was
        with pytest.raises(BundleError):
            Bundle.load(bundle)
    (bundle / "manifest.json").write_bytes(text)
    Bundle.load(bundle)


@pytest.mark.parametrize("part", ["recipe", "parity", "accuracy", "provenance"])
@pytest.mark.parametrize("value", [{}, {"x": None}, {"targets": 3}, {"errors": [1]}, {"tools": 1}, {"limits": "x"}])
def test_inspect_shows_or_names(
    bundle: Path, manifest: dict[str, Any], part: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from click.testing import CliRunner

    (bundle / "manifest.json").write_text(json.dumps(mutated(manifest, (part,), value)))
    result = CliRunner().invoke(main, ["inspect", str(bundle)])
    assert result.exit_code in (0, 1)
    assert result.exception is None or isinstance(result.exception, SystemExit)
