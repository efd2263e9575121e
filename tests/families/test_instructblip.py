"""InstructBLIP: the text that its Q-Former reads beside each image."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.errors import BundleError, PromptError
from mllm_edge.manifest_checks import check_manifest
from mllm_edge.runtime.planning.shapes import layouts_of, stage_runs
from tests.families.parity import Exported, export_tiny, make_image
from tests.tiny_blip import save_tiny_instructblip, word_tokenizer

IDS = "qformer_input_ids"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    with export_tiny(tmp_path_factory.mktemp("text"), save_tiny_instructblip) as found:
        yield found


@pytest.fixture(scope="module")
def vlm(exported: Exported) -> VLM:
    return exported.vlm("cpu")


TEXTS = ["", "What is it?", "  Blanks,\n\tlines  ", "a b<image>c <s>", "Überall Ünder 変 😀", "x" * 150, "UPPER ##ing"]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_the_second_tokenizer(vlm: VLM, text: str) -> None:
    prompt = vlm.processor.process(text, [make_image(9, 9, 0)])
    assert prompt.texts[IDS].tolist() == [word_tokenizer()(text)["input_ids"]]


def test_a_text_that_spells_a_token_of_the_second_tokenizer_stays_text(vlm: VLM) -> None:
    found = vlm.processor.process("is [SEP] a[MASK]", [make_image(9, 9, 0)]).texts[IDS][0].tolist()
    words = word_tokenizer()
    ends = words.convert_tokens_to_ids(["[CLS]", "[SEP]"])
    assert [found[0], found[-1]] == ends
    assert words.convert_ids_to_tokens(found[1:-1]) == words.tokenize("is [ sep ] a [ mask ]")


def test_a_text_alone_is_read_by_the_decoder_alone(vlm: VLM) -> None:
    assert vlm.processor.process("x" * 300).texts == {}


def test_too_long_a_text_is_refused(vlm: VLM) -> None:
    most = "a " * 198
    assert vlm.processor.process(most, [make_image(9, 9, 0)]).texts[IDS].shape == (1, 200)
    with pytest.raises(PromptError, match="201 tokens for what looks at images, which reads 200 at most"):
        vlm.processor.process(most + "a", [make_image(9, 9, 0)])


def test_unequal_texts_see_what_they_see_in_a_padded_batch(exported: Exported, vlm: VLM) -> None:
    texts, images = ["What?", "Is the picture brighter than the other?", ""], [make_image(40, 30, i) for i in range(3)]
    words = word_tokenizer()(texts, padding=True, return_tensors="pt")
    pixels = exported.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = exported.model.get_image_features(pixels, words["input_ids"], words["attention_mask"]).pooler_output
    for text, image, rows in zip(texts, images, expected.numpy(), strict=True):
        found = vlm.image_features(vlm.processor.process(text, [image]))
        assert np.abs(found - rows).max() <= 1e-4 * np.abs(rows).max()


def test_many_images_read_the_same_text(vlm: VLM) -> None:
    images = [make_image(20, 30, i) for i in range(11)]
    together = vlm.image_features(vlm.processor.process("What is it?", images))
    alone = [vlm.image_features(vlm.processor.process("What is it?", [image])) for image in images]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
    other = vlm.image_features(vlm.processor.process("Where?", images))
    assert np.abs(together - other).max() > 0.1


def test_profiles_guess_the_length_of_the_text(vlm: VLM) -> None:
    model = vlm.spec
    variants = {name: vlm.bundle.variant(name, "cpu") for name in vlm.bundle.manifest.components}
    layouts = layouts_of(model.image, [(30, 20)] * 2)
    (run,) = stage_runs(model, model.stages[1], variants, layouts, prompt_tokens=2 * 5 + 17)
    assert run == ({"tiles": 2, "words": 17}, 2)


@pytest.mark.parametrize("change", [{"file": "other.json"}, {"most": 0}, {"name": "pixel_values"}, {"name": "other"}])
def test_a_manifest_that_contradicts_itself(vlm: VLM, change: dict[str, str]) -> None:
    manifest = vlm.bundle.manifest
    assert manifest.model.image is not None
    assert manifest.model.image.text is not None
    image = replace(manifest.model.image, text=replace(manifest.model.image.text, **change))
    with pytest.raises(BundleError, match=r"other\.json|most|pixel_values|nothing gives|no stage takes"):
        check_manifest(replace(manifest, model=replace(manifest.model, image=image)))


def test_bundle_without_the_second_tokenizer(exported: Exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported.bundle, tmp_path / "bundle"))
    (folder / "qformer_tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"qformer_tokenizer\.json"):
        VLM(Bundle.load(folder), exported.vlm("cpu").backend)
