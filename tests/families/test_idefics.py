"""IDEFICS: which image a token looks at, and the word around images."""

from collections.abc import Iterator

import pytest

from mllm_edge import VLM
from tests.families.parity import Exported, check_messages, export_tiny, make_image
from tests.tiny_idefics import save_tiny_idefics

FAKE = "<fake_token_around_image>"
SHOWN = f"{FAKE}<image>{FAKE}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    with export_tiny(tmp_path_factory.mktemp("every_layer"), save_tiny_idefics) as found:
        yield found


@pytest.fixture(scope="module")
def vlm(exported: Exported) -> VLM:
    return exported.vlm("cpu")


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ("", "What?", f"User:{SHOWN}What?"),
        ("", "  What?", f"User:{SHOWN}What?"),
        ("Look ", " there", f"User: Look{SHOWN}there"),
        ("(", "", f"User: ({SHOWN}<end_of_utterance>"),
        ("", "\n What?", f"User:{SHOWN}\n What?"),
    ],
)
def test_words_around_images(exported: Exported, vlm: VLM, before: str, after: str, text: str) -> None:
    entries = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
    messages = [{"role": "user", "content": [entry for entry in entries if entry.get("text") != ""]}]
    check_messages(exported, messages, [(40, 50)])
    ids = vlm.processor.process(messages, [make_image(40, 50, 0)]).token_ids
    assert vlm.tokenizer.decode(ids, skip_special_tokens=False).startswith(f"<s>{text}")


@pytest.mark.parametrize("between", ["", " "])
def test_images_that_touch_share_a_word(exported: Exported, vlm: VLM, between: str) -> None:
    gap = [{"type": "text", "text": between}] if between else []
    content = [{"type": "image"}, *gap, {"type": "image"}, {"type": "text", "text": "Same?"}]
    messages = [{"role": "user", "content": content}]
    check_messages(exported, messages, [(40, 50), (30, 90)])
    ids = vlm.processor.process(messages, [make_image(40, 50, 0)] * 2).token_ids
    assert ids.tolist().count(vlm.tokenizer.token_id(FAKE)) == 3


def test_a_conversation(exported: Exported) -> None:
    """Each token looks at the last image before it, and those at the beginning at none."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Look."}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
        {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "image"}]},
    ]
    check_messages(exported, messages, [(40, 50), (20, 21)])
