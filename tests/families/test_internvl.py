"""InternVL in both layouts: parity over a table of tiny configurations, and what only this family has."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.families.internvl import FAMILY
from mllm_edge.export.pipeline import export
from tests.families.parity import Exported, export_tiny, make_image
from tests.families.rows.internvl import CHAT
from tests.tiny_internvl import save_tiny_internvl, save_tiny_internvl_chat


@pytest.mark.parametrize("name", CHAT)
def test_reference_of_the_original_layout_is_the_model_itself(tmp_path: Path, name: str) -> None:
    saved = save_tiny_internvl_chat(tmp_path / "chat", **CHAT[name]).state_dict()
    loaded = FAMILY.load_model(open_source(str(tmp_path / "chat"))).state_dict()
    assert loaded.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(loaded[key], tensor), key


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("chat"), save_tiny_internvl_chat)


def test_prompt_of_an_original_checkpoint(chat: Exported) -> None:
    with VLM.load(chat.bundle) as vlm:
        asked = vlm.processor.process("What is it?", [make_image(40, 40, 0)]).text
        system, _, rest = asked.partition("<|im_end|>\n")
        assert system.startswith("<|im_start|>system\n你是书生·万象")
        assert rest == "<|im_start|>user\n<IMG_CONTEXT>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
            {"role": "user", "content": "Bye."},
        ]
        turns = [("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi."), ("user", "Bye.")]
        expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
        assert vlm.processor.process(messages).text == f"{expected}<|im_start|>assistant\n"


def test_older_templates_have_no_line_break_between_turns(tmp_path: Path) -> None:
    exported = export_tiny(
        tmp_path, save_tiny_internvl_chat, internlm2=True, top={"system_message": 'It\'s "one".\nTwo.'}
    )
    with VLM.load(exported.bundle) as vlm:
        text = vlm.processor.process("Hi").text
    assert text == (
        '<|im_start|>system\nIt\'s "one".\nTwo.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n'
    )


def test_original_code_makes_the_prompt_whatever_the_tokenizer_has(tmp_path: Path) -> None:
    save_tiny_internvl_chat(tmp_path / "a", template="the decoder's own", top={"system_message": None})
    save_tiny_internvl_chat(tmp_path / "b", template="the decoder's own")
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    texts = []
    for name in ("a", "b"):
        export(str(tmp_path / name), tmp_path / f"{name}.bundle", verify_mode="off")
        with VLM.load(tmp_path / f"{name}.bundle") as vlm:
            texts.append(vlm.processor.process("Hi").text)
    assert texts[0].startswith("<|im_start|>system\n你是书生·万象")
    assert texts[0].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert texts[1] == "Hi!"


def test_template_of_the_tokenizer_serves_an_unknown_one_even_if_it_reads_strings_only(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    exported = export_tiny(tmp_path, save_tiny_internvl_chat, template=template, top={"template": "unheard-of"})
    with VLM.load(exported.bundle) as vlm:
        image = make_image(64, 64, 0)
        asked = vlm.processor.process("What is it?", [image, image])
        assert asked.text == "<user><IMG_CONTEXT>\n<IMG_CONTEXT>\nWhat is it?"
        assert len(asked.image_positions) == 2 * 5 * 16


def test_an_original_checkpoint_stops_at_the_end_of_a_turn(chat: Exported, tmp_path: Path) -> None:
    with VLM.load(chat.bundle) as vlm:
        assert vlm.tokenizer.encode("<|im_end|>")[0] in vlm.stop_ids
    save_tiny_internvl_chat(tmp_path / "more", internlm2=True, text={"eos_token_id": 2})
    export(str(tmp_path / "more"), tmp_path / "bundle", verify_mode="off")
    assert set(Bundle.load(tmp_path / "bundle").generation().eos_token_ids) == {2, 297}


def test_tiles_stand_between_two_words_and_are_counted_beforehand(chat: Exported) -> None:
    with VLM.load(chat.bundle) as vlm:
        for (height, width), tiles in {(20, 20): 1, (64, 64): 5, (30, 90): 4, (300, 40): 7}.items():
            asked = vlm.processor.process("Hi", [make_image(height, width, 0)])
            assert len(asked.pixel_values) == tiles
            assert len(asked.image_positions) == tiles * 16
            assert np.array_equal(np.diff(asked.image_positions), np.ones(tiles * 16 - 1))
            first, last = asked.image_positions[[0, -1]]
            around = [vlm.tokenizer.token(int(asked.token_ids[i])) for i in (first - 1, last + 1)]
            assert around == ["<img>", "</img>"]
            assert vlm.count_tokens("Hi", [(height, width)]) == len(asked.token_ids)


def test_layers_behind_the_chosen_one_are_left_out(tmp_path: Path) -> None:
    sizes = {}
    for layer in (1, -1):
        save_tiny_internvl(tmp_path / str(layer), config={"vision_feature_layer": layer})
        sizes[layer] = export(str(tmp_path / str(layer)), tmp_path / "out", dry_run=True).components["vision_encoder"]
    assert sizes[1] < 0.6 * sizes[-1]  # one layer of three, and what the layers share
