"""Messages and images against the source library's own processor, and what cannot be processed."""

import base64
import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_edge.errors import BundleError, ImageError, PromptError
from mllm_edge.runtime.prompt.processor import Processor
from mllm_edge.runtime.prompt.tokenizer import ChatTemplate
from mllm_edge.spec import Resize

from . import reference
from .reference import NAMED_TOKENS, TEMPLATE, host_tokenizer, image_processor, image_spec, model_spec, picture

TOKENS_PER_TILE = 4
CORE = reference.byte_level_bpe()
TOKENIZER = host_tokenizer(CORE)
IMAGE_ID = TOKENIZER.token_id("<image>")
STRING_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def pair(tile=64, longest_edge=256, split=True, tokens_per_tile=TOKENS_PER_TILE):
    """Our processor and the source library's, configured alike."""
    source = image_processor(tile, longest_edge, split)
    ours = Processor(
        model_spec(image_spec(source, IMAGE_ID, tokens_per_tile)), TOKENIZER, ChatTemplate(TEMPLATE, NAMED_TOKENS)
    )
    return ours, reference.source_processor(source, reference.byte_level_bpe(), tokens_per_tile)


OURS, SOURCE = pair()
WHOLE, WHOLE_SOURCE = pair(split=False)


def text_only(template=TEMPLATE):
    return Processor(model_spec(None), TOKENIZER, ChatTemplate(template, NAMED_TOKENS))


def with_template(source):
    image = image_spec(image_processor(64, 256, True), IMAGE_ID, TOKENS_PER_TILE)
    template = None if source is None else ChatTemplate(source, NAMED_TOKENS)
    return Processor(model_spec(image), TOKENIZER, template)


def source_messages(messages, images):
    """The messages with `images` put into their image entries, as the source library wants them."""
    rest = iter(images)
    return [
        {**m, "content": [{"type": "image", "image": next(rest)} if e["type"] == "image" else e for e in m["content"]]}
        for m in messages
    ]


def user(*content):
    entries = [{"type": "image"} if entry is IMAGE else {"type": "text", "text": entry} for entry in content]
    return {"role": "user", "content": entries}


IMAGE = object()


def grids(prompt):
    return [(layout.rows, layout.cols) for layout in prompt.layouts]


def assert_equal(prompt, expected, tokens_per_tile=TOKENS_PER_TILE):
    """Token ids identical; pixels identical, which is within 1/255 grey level."""
    assert prompt.token_ids.dtype == np.int64
    assert prompt.token_ids.tolist() == expected["input_ids"][0]
    assert prompt.image_positions.dtype == np.int64
    np.testing.assert_array_equal(prompt.image_positions, np.flatnonzero(prompt.token_ids == IMAGE_ID))
    if "pixel_values" not in expected:
        assert prompt.pixel_values is None
        assert prompt.layouts == ()
        assert len(prompt.image_positions) == 0
        return
    pixels = np.concatenate([np.asarray(image) for image in expected["pixel_values"]])
    assert prompt.pixel_values.dtype == np.float32
    np.testing.assert_array_equal(prompt.pixel_values, pixels)
    assert len(prompt.image_positions) == len(pixels) * tokens_per_tile
    assert sum(layout.slices for layout in prompt.layouts) == len(pixels)
    for layout in prompt.layouts:
        assert layout.slices == (1 if (layout.rows, layout.cols) == (1, 1) else layout.rows * layout.cols + 1)


# ---------------------------------------------------------------- equality with the source library
SIZES = [(64, 64), (256, 256), (108, 192), (3, 5), (5, 3), (1, 1), (301, 77), (20, 2000), (600, 5), (257, 255)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_one_image_of_any_size(size, split):
    ours, source = (OURS, SOURCE) if split else (WHOLE, WHOLE_SOURCE)
    image = picture(*size)
    messages = [user(IMAGE, "What is on the belt?")]
    expected = source.apply_chat_template(
        source_messages(messages, [image]),
        tokenize=True,
        return_dict=True,
        return_tensors=None,
        add_generation_prompt=True,
    )
    assert_equal(ours.process(messages, [image]), expected)
    assert_equal(ours.process("What is on the belt?", [image]), expected)
    assert ours.count_tokens(messages, [size]) == len(expected["input_ids"][0])


def test_full_hd_at_the_model_s_own_size():
    ours, source = pair(512, 2048, tokens_per_tile=64)
    image = picture(1080, 1920)
    expected = source(text="<image>Describe the image.", images=[image])
    prompt = ours.process_text("<image>Describe the image.", image)
    assert_equal(prompt, expected, 64)
    assert grids(prompt) == [(3, 4)]
    assert ours.count_tokens("<image>Describe the image.", [(1080, 1920)], raw=True) == len(prompt.token_ids)


def test_one_tile_is_not_cut():
    ours, source = pair(64, 64)
    prompt = ours.process_text("<image>What?", [picture(30, 40)])
    assert_equal(prompt, source(text="<image>What?", images=[picture(30, 40)]))
    assert grids(prompt) == [(1, 1)]


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_several_images_of_different_size_and_several_turns(split):
    ours, source = (OURS, SOURCE) if split else (WHOLE, WHOLE_SOURCE)
    images = [picture(50, 200, 1), picture(40, 40, 2), picture(300, 20, 3)]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        user("Compare ", IMAGE, " with ", IMAGE, ". Grüße 🙂"),
        {"role": "assistant", "content": [{"type": "text", "text": "Two crates."}]},
        user("And this?\n\n", IMAGE),
    ]
    for add_generation_prompt in (True, False):
        expected = source.apply_chat_template(
            source_messages(messages, images),
            tokenize=True,
            return_dict=True,
            return_tensors=None,
            add_generation_prompt=add_generation_prompt,
        )
        prompt = ours.process(messages, images, add_generation_prompt=add_generation_prompt)
        assert len(prompt.layouts) == 3
        assert prompt.text.count("<image>") == 3
        # The source library pads the images of one prompt into one array of tiles; here they follow each other.
        assert_equal(prompt, expected)
        sizes = [(image.height, image.width) for image in images]
        count = ours.count_tokens(messages, sizes, add_generation_prompt=add_generation_prompt)
        assert count == len(prompt.token_ids)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("Only text.", []),
        ("<image>", [(33, 44)]),
        ("a <image>\n<image> b<image>c", [(33, 44), (8, 300), (64, 64)]),
        ("<|im_start|>User:<image>What?<end_of_utterance>\nAssistant:", [(100, 100)]),
        ("<row_1_col_1> <global-img> {image} {row}", []),
    ],
)
def test_raw_text(text, sizes):
    images = [picture(*size) for size in sizes]
    expected = SOURCE(text=text, images=images) if images else SOURCE(text=[text])
    prompt = OURS.process_text(text, images)
    assert_equal(prompt, expected)
    assert prompt.text == text
    assert OURS.count_tokens(text, sizes, raw=True) == len(prompt.token_ids)


def test_text_only_messages():
    messages = [
        user("How many parts?"),
        {"role": "assistant", "content": [{"type": "text", "text": "17"}]},
        user("Sure?"),
    ]
    expected = SOURCE.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors=None, add_generation_prompt=True
    )
    assert_equal(OURS.process(messages), expected)
    assert_equal(text_only().process(messages), expected)
    assert OURS.count_tokens(messages) == text_only().count_tokens(messages) == len(expected["input_ids"][0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=3), st.text(max_size=20))
def test_any_sizes_and_text(sizes, text):
    text = text.replace("<", "")
    images = [picture(*size) for size in sizes]
    raw = "<image>" * len(images) + text
    prompt = OURS.process_text(raw, images)
    assert_equal(prompt, SOURCE(text=raw, images=images))
    assert OURS.count_tokens(raw, sizes, raw=True) == len(prompt.token_ids)


def test_features_go_where_the_placeholders_are_in_order():
    prompt = OURS.process_text("<image><image>", [picture(64, 256), picture(10, 10)])
    assert grids(prompt) == [(1, 4), (4, 4)]
    positions = prompt.image_positions
    assert (np.diff(positions) > 0).all()
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    assert [len(run) for run in runs] == [TOKENS_PER_TILE] * (5 + 17)


def test_special_tokens_are_not_added_twice():
    """A tokenizer that adds <s>, and a template that writes it already."""
    core = reference.byte_fallback_bpe()
    tokenizer = host_tokenizer(core, special_tokens={"bos_token": "<s>"})
    written = Processor(model_spec(None), tokenizer, ChatTemplate("<s>{{ messages[0].content }}"))
    left_out = Processor(model_spec(None), tokenizer, ChatTemplate("{{ messages[0].content }}"))
    for processor in (written, left_out):
        assert processor.process("the belt").token_ids.tolist().count(1) == 1
        assert processor.count_tokens("the belt") == len(processor.process("the belt").token_ids)


# ---------------------------------------------------------------- forms of input
def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_images_in_the_messages(tmp_path):
    image = picture(40, 70)
    path = tmp_path / "frame.png"
    path.write_bytes(png(image))
    data = base64.b64encode(png(image)).decode()
    expected = OURS.process("What?", [image])
    entries = [
        {"type": "image", "image": image},
        {"type": "image", "image": np.asarray(image)},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": str(path)},
        {"type": "image", "url": f"data:image/png;base64,{data}"},
        {"type": "image", "base64": data},
        {"type": "image", "image": None, "path": path},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "image_url", "image_url": str(path)},
    ]
    for entry in entries:
        prompt = OURS.process([{"role": "user", "content": [entry, {"type": "text", "text": "What?"}]}])
        np.testing.assert_array_equal(prompt.token_ids, expected.token_ids)
        np.testing.assert_array_equal(prompt.pixel_values, expected.pixel_values)
        assert OURS.count_tokens(
            [{"role": "user", "content": [entry, {"type": "text", "text": "What?"}]}], [(40, 70)]
        ) == len(expected.token_ids)


def test_images_given_both_ways_keep_their_order():
    a, b, c = (picture(64, 64 * n, n) for n in (1, 2, 3))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image", "image": b}, {"type": "image"}]}]
    prompt = OURS.process(messages, [a, c])
    expected = OURS.process([{"role": "user", "content": [{"type": "image"}] * 3}], [a, b, c])
    assert grids(prompt) == [(4, 4), (2, 4), (2, 4)]
    np.testing.assert_array_equal(prompt.pixel_values, expected.pixel_values)


def test_one_image_need_not_be_a_list(tmp_path):
    image = picture(30, 30)
    path = tmp_path / "a.png"
    path.write_bytes(png(image))
    expected = OURS.process("Q", [image]).pixel_values
    for one in (image, np.asarray(image), str(path), path, png(image), io.BytesIO(png(image))):
        np.testing.assert_array_equal(OURS.process("Q", one).pixel_values, expected)
    frames = np.stack([np.asarray(image)] * 2)
    assert len(OURS.process("Q", frames).layouts) == 2
    assert len(OURS.process("Q", iter([image, image])).layouts) == 2
    assert OURS.process("Q", None).pixel_values is None


def test_strings_reach_a_template_for_lists():
    expected = OURS.process([user("Hello")])
    for messages in ("Hello", [{"role": "user", "content": "Hello"}]):
        np.testing.assert_array_equal(OURS.process(messages).token_ids, expected.token_ids)


def test_lists_reach_a_template_for_strings():
    processor = with_template(STRING_TEMPLATE)
    prompt = processor.process([user(IMAGE, "What?"), {"role": "assistant", "content": "x"}], [picture(9, 9)])
    assert prompt.text == "user: <image>\nWhat?\nassistant: x\n"
    assert text_only(STRING_TEMPLATE).process("What?").text == "user: What?\n"


def test_without_a_template_a_string_comes_after_its_images():
    processor = with_template(None)
    assert processor.process("What?", [picture(9, 9)] * 2).text == "<image><image>What?"
    assert processor.process("What?").text == "What?"
    with pytest.raises(PromptError, match="no chat template"):
        processor.process([user("a"), user("b")])


def test_other_keys_of_a_message_reach_the_template():
    processor = text_only("{{ messages[0].name }}{{ messages[0].calls[0].id }}")
    assert processor.process([{"role": "user", "content": "", "name": "Ann", "calls": [{"id": 7}]}]).text == "Ann7"


def test_the_caller_s_messages_stay_as_they_are():
    messages = [user(IMAGE, "What?")]
    before = repr(messages)
    OURS.process(messages, [picture(9, 9)])
    assert repr(messages) == before


def test_braces_in_the_text_are_text():
    expected = SOURCE(text="<image>{image} {row}{{ 1 }} {% x", images=[picture(9, 9)])
    assert_equal(OURS.process_text("<image>{image} {row}{{ 1 }} {% x", [picture(9, 9)]), expected)
    assert "{{ 1 }} {% x" in OURS.process("{{ 1 }} {% x").text


# ---------------------------------------------------------------- what does not fit together
@pytest.mark.parametrize(
    "marker", ["<image>", "<fake_token_around_image>", "<global-img>", "<row_2_col_3>", "<row_6_col_6>"]
)
def test_image_markers_in_the_text_stay_text(marker):
    shapes = [
        lambda text: ([user(text)], []),
        lambda text: ([{"role": "system", "content": [{"type": "text", "text": text}]}, user("Hi.")], []),
        lambda text: ([user(IMAGE, text)], [picture(9, 9)]),
        lambda text: (text, [picture(9, 9)]),
    ]
    for shape in shapes:
        text = f"what does {marker} mean?"
        messages, images = shape(text)
        prompt, plain = OURS.process(messages, images), OURS.process(*shape("what does this mean?"))
        assert text in prompt.text
        assert text in TOKENIZER.decode(prompt.token_ids, skip_special_tokens=False)
        assert _special(prompt) == _special(plain)
        assert OURS.count_tokens(messages, [(9, 9)] * len(images)) == len(prompt.token_ids)


def _special(prompt):
    """The special tokens of a prompt, in order."""
    return [i for i in prompt.token_ids.tolist() if i in TOKENIZER.special_ids]


def test_words_that_only_look_like_markers_are_fine():
    for text in ("<img>", "<row_99_col_1>", "image", "<|im_end|>", "plain", "a <", "<tool call>", "row 1 col 1"):
        assert text in OURS.process(text).text
    assert "<image>" in text_only().process("<image>").text


@pytest.mark.parametrize(("entries", "images"), [(1, 0), (0, 1), (2, 1), (1, 3)])
def test_numbers_of_images_that_differ_are_both_told(entries, images):
    messages = [user(*[IMAGE] * entries, "What?")]
    with pytest.raises(PromptError, match=rf"\b{entries} image entries.* {images} images"):
        OURS.process(messages, [picture(9, 9)] * images)
    with pytest.raises(PromptError, match=rf"\b{entries} image placeholders.* {images} images"):
        OURS.process_text("<image>" * entries + "x", [picture(9, 9)] * images)
    with pytest.raises(PromptError, match=rf"\b{entries} images.* {images} image sizes"):
        OURS.count_tokens(messages, [(9, 9)] * images)


def test_a_template_that_drops_images():
    processor = with_template("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}")
    with pytest.raises(PromptError, match="0 image placeholders, and 1 images"):
        processor.process("What?", [picture(9, 9)])


def test_images_for_a_model_without():
    for call in (
        lambda: text_only().process("What?", [picture(9, 9)]),
        lambda: text_only().process([user(IMAGE)], [picture(9, 9)]),
        lambda: text_only().process_text("<image>", [picture(9, 9)]),
        lambda: text_only().count_tokens("What?", [(9, 9)]),
    ):
        with pytest.raises(PromptError, match="takes no images, and got 1"):
            call()


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "non-empty"),
        (None, "None"),
        (3, "3"),
        ([3], r"messages\[0\]"),
        (["Hello"], r"messages\[0\]"),
        ([{"content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": 1, "content": "x"}], "role"),
        ([{"role": "user", "content": None}], "NoneType"),
        ([{"role": "user", "content": 5}], "int"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "neither text nor image"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "neither text nor image"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "video"),
        ([{"role": "user", "content": "x", "name": object()}], "object"),
        ([{"role": "user", "content": "half \ud83d"}], "Unicode"),
    ],
)
def test_messages_that_are_none(messages, told):
    with pytest.raises(PromptError, match=told):
        OURS.process(messages)


def test_an_empty_prompt():
    with pytest.raises(PromptError, match="empty"):
        OURS.process_text("")
    with pytest.raises(PromptError, match="empty"):
        OURS.count_tokens("", raw=True)


def test_the_image_that_cannot_be_read_is_named():
    with pytest.raises(ImageError, match=r"^image 2 of 3: .*not an image"):
        OURS.process("What?", [picture(9, 9), b"broken", picture(9, 9)])
    with pytest.raises(ImageError, match=r"^image bytes"):
        OURS.process("What?", [b"broken"])
    with pytest.raises(ImageError, match="0×9"):
        OURS.count_tokens("What?", [(0, 9)])


def test_bundles_that_contradict_themselves():
    spec = model_spec(image_spec(image_processor(64, 256, True), IMAGE_ID, TOKENS_PER_TILE))
    template = ChatTemplate(TEMPLATE, NAMED_TOKENS)
    wrong_size = dataclasses.replace(spec.image, transforms=(Resize(32, 32, "bicubic"),))
    with pytest.raises(BundleError, match=r"\(3, 32, 32\).*\(3, 64, 64\)"):
        Processor(dataclasses.replace(spec, image=wrong_size), TOKENIZER, template).process("Q", [picture(9, 9)])
    wrong_id = dataclasses.replace(spec.image, prompt=dataclasses.replace(spec.image.prompt, token_id=699))
    with pytest.raises(BundleError, match=r"0 image tokens.* 68 features"):
        Processor(dataclasses.replace(spec, image=wrong_id), TOKENIZER, template).process("Q", [picture(9, 9)])
