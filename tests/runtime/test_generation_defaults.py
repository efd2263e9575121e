"""The checkpoint's own generation settings are the defaults of a bundle: greedy answers are those of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mllm_edge import VLM
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.family import family_for
from mllm_edge.export.pipeline import export
from tests import tiny
from tests.families.parity import make_image

PROMPT, STEPS = "What is it?", 12


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any], list[int]]:
    """A checkpoint, its bundle, transformers' inputs and its plain greedy answer."""
    folder = tmp_path_factory.mktemp("defaults")
    model = tiny.save_tiny_idefics3(folder / "m")
    source = open_source(str(folder / "m"))
    processor = family_for(source).load_processor(source)
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=[make_image(97, 131, 0)], return_tensors="pt")
    export(str(folder / "m"), folder / "bundle", recipe_name="fp32", verify_mode="off")
    return folder / "m", folder / "bundle", inputs, _answer(model, inputs)


def _answer(model: Any, inputs: Any, **options: Any) -> list[int]:
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, **{"max_new_tokens": STEPS, **options})
    stops = model.generation_config.eos_token_id
    answer = ids[0, inputs["input_ids"].shape[1] :].tolist()
    stops = [stops] if isinstance(stops, int) else stops
    return answer[: next((i for i, token in enumerate(answer) if token in stops), len(answer))]


def settings(plain: list[int]) -> list[dict[str, Any]]:
    return [
        {"suppress_tokens": [plain[0], plain[2]]},
        {"begin_suppress_tokens": [plain[0]]},
        {"bad_words_ids": [[plain[0]], plain[2:4]]},
        {"repetition_penalty": 1.9},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": plain[3]},
        {"eos_token_id": plain[3], "min_new_tokens": 7},
        {"eos_token_id": [plain[3], plain[1]], "min_length": 4000},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [plain[1]]},
    ]


@pytest.mark.parametrize("i", range(10))
def test_greedy_answer_is_that_of_transformers(exported: Any, tmp_path: Path, i: int) -> None:
    checkpoint, _, inputs, plain = exported
    changed = settings(plain)[i]
    folder = _changed(checkpoint, tmp_path / "m", **changed)
    expected = _answer(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(), inputs)
    assert expected != plain
    export(str(folder), tmp_path / "bundle", recipe_name="fp32", verify_mode="off")
    with VLM.load(tmp_path / "bundle") as vlm:
        result = vlm.generate(PROMPT, make_image(97, 131, 0), max_new_tokens=STEPS)
        assert list(result.token_ids) == expected
        # Guesses change nothing, whatever may not come.
        assert (
            vlm.generate(PROMPT, make_image(97, 131, 0), max_new_tokens=STEPS, speculation=3).token_ids
            == result.token_ids
        )


def _changed(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    import shutil

    shutil.copytree(checkpoint, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def _with_defaults(bundle: Path, folder: Path, **defaults: Any) -> Path:
    """The bundle with other defaults in its generation.json, as an export would write them."""
    import shutil

    from mllm_edge.bundle import MANIFEST, Bundle, file_entries, write_manifest

    shutil.copytree(bundle, folder)
    path = folder / "generation.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "defaults": {**data["defaults"], **defaults}}))
    manifest = Bundle.load(bundle).manifest
    from dataclasses import replace

    (folder / MANIFEST).unlink()
    write_manifest(folder, replace(manifest, files=file_entries(folder)))
    return folder


def test_a_call_has_the_last_word(exported: Any, tmp_path: Path) -> None:
    _, bundle, _, plain = exported
    folder = _with_defaults(bundle, tmp_path / "b", repetition_penalty=1.9, max_new_tokens=3, stop_strings=["no such"])
    with VLM.load(folder) as vlm:
        image = make_image(97, 131, 0)
        assert len(vlm.generate(PROMPT, image).token_ids) == 3
        assert list(vlm.generate(PROMPT, image, max_new_tokens=STEPS).token_ids) != plain
        result = vlm.generate(PROMPT, image, max_new_tokens=STEPS, repetition_penalty=1.0)
        assert list(result.token_ids) == plain


def test_stop_strings(exported: Any, tmp_path: Path) -> None:
    _, bundle, _, _ = exported
    image = make_image(97, 131, 0)
    with VLM.load(bundle) as vlm:
        text = vlm.generate(PROMPT, image, max_new_tokens=STEPS).text
    stop = text[3:5]
    with VLM.load(_with_defaults(bundle, tmp_path / "b", stop_strings=[stop])) as vlm:
        result = vlm.generate(PROMPT, image, max_new_tokens=STEPS)
        assert result.finish_reason == "stop_string"
        assert result.text == text[: text.index(stop)]
        assert vlm.generate(PROMPT, image, max_new_tokens=STEPS, stop=()).text == text
        assert vlm.generate(PROMPT, image, max_new_tokens=STEPS, ignore_eos=True).text.startswith(text[:5])


def test_sampling_settings_serve_drawn_answers(exported: Any, tmp_path: Path) -> None:
    _, bundle, _, plain = exported
    image = make_image(97, 131, 0)
    with VLM.load(_with_defaults(bundle, tmp_path / "b", top_k=1)) as vlm:
        drawn = vlm.generate(PROMPT, image, max_new_tokens=STEPS, temperature=5.0, seed=1)
        assert list(drawn.token_ids) == plain  # of one token there is no choice
        free = vlm.generate(PROMPT, image, max_new_tokens=STEPS, temperature=5.0, top_k=0, seed=1)
        assert list(free.token_ids) != plain
