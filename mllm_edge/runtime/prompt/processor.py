"""Messages and images → the model's inputs: token ids, pixel values and where the image features go."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mllm_edge.errors import BundleError, ImageError, PromptError
from mllm_edge.runtime.prompt.control_tokens import ControlTokens, Piece, encode_pieces
from mllm_edge.runtime.prompt.image import BGR, ImageSource, load_image
from mllm_edge.runtime.prompt.layout import Layout, grid_positions, image_text, layout_of
from mllm_edge.runtime.prompt.tokenizer import ChatTemplate, Tokenizer
from mllm_edge.runtime.prompt.transforms.apply import apply_transforms, first_size
from mllm_edge.runtime.prompt.transforms.tiles import filled
from mllm_edge.spec import ImagePrompt, ImageSpec, ModelSpec

__all__ = ["Message", "Messages", "Processor", "Prompt"]

Message = Mapping[str, Any]
Messages = str | Sequence[Message]

_PAYLOADS = ("image", "path", "url", "base64")


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the model is run with.

    `text`: the rendered prompt, one placeholder per image. `token_ids` [S] int64, placeholders expanded. `pixel_values`
    [slices, …] float32, the slices (see `ImageSpec`) of all images in order, or None without images. `image_positions`
    [N] int64: where in `token_ids` the image tokens are, in order. `layouts`: of each image. `positions` [3, S] int64
    for the decoder; None: the places in the sequence.
    """

    text: str
    token_ids: np.ndarray
    pixel_values: np.ndarray | None
    image_positions: np.ndarray
    layouts: tuple[Layout, ...]
    positions: np.ndarray | None = None


class Processor:
    """Turns messages and images into a `Prompt`, equal to what the source model's own processor gives."""

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer, template: ChatTemplate | None, fast_jpeg: bool = False):
        """`template` None: the bundle has no chat template, and only plain strings and raw prompts are accepted.
        `fast_jpeg`: decode large JPEG files at a smaller scale, see `load_image`."""
        self._image, self._fast_jpeg = spec.image, fast_jpeg
        self._follows_grids = spec.positions.images == "grid"
        self._tokenizer = tokenizer
        self._template = template
        self._placeholder = spec.image.prompt.token if spec.image else None
        control = _control_tokens(spec.image, tokenizer, template)
        self._control = ControlTokens(control, control - tokenizer.special_tokens)
        self._takes_strings = template is not None and template.accepts_strings()
        self._takes_lists = template is not None and template.accepts_lists(self._placeholder)

    def process(
        self,
        messages: Messages,
        images: ImageSource | Iterable[ImageSource] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """The prompt for `messages`: a string (one user message, the images before it), or messages in chat format.

        In chat format a message is {"role": …, "content": …}; the content is a string or a list of {"type": "text",
        "text": …} and {"type": "image"} entries. An image entry may hold its image ("image", "path", "url" for a local
        path or data: URI, or "base64"); the others take theirs from `images`, in order. `images` is one image or
        several, each as `load_image` takes it.

        A text that spells one of the model's control tokens (the end of a turn, an image placeholder) stays text.

        Raises PromptError when messages, images and template do not fit together; ImageError when an image cannot be
        decoded.
        """
        sources = _as_sources(images)
        conversation, inline = self._parse(messages, len(sources))
        sources = _merge(inline, sources)
        pieces, add_special_tokens = self._render(conversation, len(sources), add_generation_prompt)
        return self._assemble(pieces, self._load(sources), add_special_tokens)

    def process_text(self, text: str, images: ImageSource | Iterable[ImageSource] = ()) -> Prompt:
        """The prompt for an already rendered `text` with one placeholder per image, such as "<image>Describe this."

        Raises PromptError when the number of placeholders is not the number of images; ImageError as `process` does.
        """
        sources = _as_sources(images)
        pieces = (Piece(text),)
        self._check_placeholders(pieces, len(sources))
        return self._assemble(pieces, self._load(sources), None)

    def count_tokens(
        self,
        messages: Messages,
        image_sizes: Sequence[tuple[int, int]] = (),
        *,
        add_generation_prompt: bool = True,
        raw: bool = False,
    ) -> int:
        """Number of tokens of the prompt that `process` would give for images of these (height, width) px sizes.

        Exact, and without pixels: image entries need no image, and given ones are not opened. The sizes, one per image
        in order, are those of the upright images. `raw`: `messages` is a rendered text, as for `process_text`.
        """
        if raw:
            pieces: tuple[Piece, ...] = (Piece(str(messages)),)
            add_special_tokens = None
            self._check_placeholders(pieces, len(image_sizes))
        else:
            conversation, inline = self._parse(messages, len(image_sizes))
            if len(inline) != len(image_sizes):
                raise PromptError(
                    f"the messages have {len(inline)} images, and {len(image_sizes)} image sizes were given",
                    "give one (height, width) per image, in order",
                )
            pieces, add_special_tokens = self._render(conversation, len(inline), add_generation_prompt)
        count = len(image_sizes)
        layouts = [layout_of(self._image_spec(count), height, width, count) for height, width in image_sizes]
        return len(self._encode(pieces, layouts, add_special_tokens))

    def spelled(self, text: str) -> list[str]:
        """The control tokens whose names a user's `text` spells, in order: they stay text."""
        return self._control.inside(text)

    # ------------------------------------------------------------ messages
    def _parse(self, messages: Messages, image_count: int) -> tuple[list[dict[str, Any]], list[ImageSource | None]]:
        """Messages as the template may see them, without images, and the image (or None) of each image entry."""
        if isinstance(messages, str):
            text = {"type": "text", "text": messages}
            content: Any = [*({"type": "image"} for _ in range(image_count)), text] if image_count else messages
            messages = [{"role": "user", "content": content}]
        if not isinstance(messages, Sequence) or not messages:
            raise PromptError(f"messages is {messages!r:.60}", "pass a string or a non-empty list of messages")
        inline: list[ImageSource | None] = []
        conversation = [self._parse_message(message, i, inline) for i, message in enumerate(messages)]
        return conversation, inline

    def _parse_message(self, message: Any, index: int, inline: list[ImageSource | None]) -> dict[str, Any]:
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise PromptError(f"{where} is not a message", 'write {"role": "user", "content": …}')
        content = message["content"]
        if isinstance(content, str):
            pass
        elif isinstance(content, (list, tuple)):
            content = [self._parse_entry(entry, f"{where}.content[{i}]", inline) for i, entry in enumerate(content)]
        else:
            raise PromptError(f"{where}: content is {type(content).__name__}", "pass a string or a list of entries")
        try:  # anything but plain data stays away from the template
            plain = json.loads(json.dumps({key: value for key, value in message.items() if key != "content"}))
        except (TypeError, ValueError) as error:
            raise PromptError(f"{where}: {error}", "use only strings, numbers, lists and dicts") from error
        return {**plain, "content": content}

    def _parse_entry(self, entry: Any, where: str, inline: list[ImageSource | None]) -> dict[str, str]:
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if kind == "text" and isinstance(entry.get("text"), str):
            return {"type": "text", "text": entry["text"]}
        if kind in ("image", "image_url"):
            inline.append(_inline_image(entry))
            return {"type": "image"}
        raise PromptError(
            f"{where} is neither text nor image: {entry!r:.60}",
            'write {"type": "text", "text": …} or {"type": "image", "image": …}',
        )

    # ------------------------------------------------------------ text
    def _render(
        self, conversation: list[dict[str, Any]], image_count: int, add_generation_prompt: bool
    ) -> tuple[tuple[Piece, ...], bool | None]:
        """The prompt's text in pieces that are tokenized apart (nearly always one), and whether to add special tokens
        around it (None: as generation.json says)."""
        if image_count:
            self._image_spec(image_count)
        marked, marks = self._control.mark(conversation)
        if self._template is None:
            text, add_special_tokens = self._render_plain(marked), None
        else:
            shaped = [{**message, "content": self._shape(message["content"])} for message in marked]
            text = self._template.render(shaped, add_generation_prompt)
            bos = self._tokenizer.bos_token
            add_special_tokens = False if bos and text.startswith(bos) else None
        pieces = self._control.pieces(text, marks)
        self._check_placeholders(pieces, image_count)
        return pieces, add_special_tokens

    def _shape(self, content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
        """`content` in a form that the template renders; as it is where the template's answer was no help."""
        if self._takes_strings == self._takes_lists:
            return content
        if isinstance(content, str):
            return content if self._takes_strings else [{"type": "text", "text": content}]
        return content if self._takes_lists else self._flatten(content, "\n")

    def _flatten(self, content: list[dict[str, str]], separator: str) -> str:
        image = self._image.prompt.inline.replace("{image}", self._image.prompt.token) if self._image else ""
        return separator.join(image if entry["type"] == "image" else entry["text"] for entry in content)

    def _render_plain(self, conversation: Sequence[dict[str, Any]]) -> str:
        if len(conversation) != 1 or conversation[0]["role"] != "user":
            raise PromptError("this bundle has no chat template, so it takes no conversation", "pass one string")
        content = conversation[0]["content"]
        return content if isinstance(content, str) else self._flatten(content, "")

    def _check_placeholders(self, pieces: Sequence[Piece], image_count: int) -> None:
        if image_count:
            self._image_spec(image_count)
        written = [piece.text for piece in pieces if not piece.spelled]
        placeholders = sum(text.count(self._placeholder) for text in written) if self._placeholder else 0
        if placeholders != image_count:
            raise PromptError(
                f"the prompt has {placeholders} image placeholders, and {image_count} images were given",
                "give exactly one image per placeholder, in order",
            )

    def _encode(self, pieces: Sequence[Piece], layouts: Sequence[Layout], add_special_tokens: bool | None) -> list[int]:
        """Token ids of the pieces with the i-th placeholder expanded for the i-th image."""
        if self._image is not None:
            images = iter([layout.text for layout in layouts])
            pieces = [piece if piece.spelled else Piece(self._expanded(piece.text, images)) for piece in pieces]
        ids = encode_pieces(self._tokenizer, pieces, add_special_tokens)
        if not ids:
            raise PromptError("the prompt is empty", "pass some text")
        return ids

    def _expanded(self, text: str, images: Iterator[str]) -> str:
        assert self._placeholder is not None
        first, *rest = text.split(self._placeholder)
        return first + "".join(next(images) + after for after in rest)

    # ------------------------------------------------------------ images
    def _image_spec(self, image_count: int) -> ImageSpec:
        if self._image is None:
            raise PromptError(f"this model takes no images, and {image_count} were given", "pass text only")
        return self._image

    def _load(self, sources: Sequence[ImageSource]) -> list[tuple[Layout, np.ndarray]]:
        """The layout and the pixel values of each image."""
        processed = []
        for i, source in enumerate(sources):
            spec = self._image_spec(len(sources))
            try:
                layout, pixel_values = self._decoded(source, spec, len(sources))
            except ImageError as error:
                if len(sources) == 1:
                    raise
                raise ImageError(f"image {i + 1} of {len(sources)}: {error.message}", error.fix) from error
            if pixel_values.shape[1:] != spec.shape:
                raise BundleError(
                    f"the transforms give tiles of {pixel_values.shape[1:]}, the model takes {spec.shape}",
                    "export the bundle again",
                )
            processed.append((layout, pixel_values))
        return processed

    def _decoded(self, source: ImageSource, spec: ImageSpec, images: int) -> tuple[Layout, np.ndarray]:
        transforms, sizes = spec.transforms_for(images), list[tuple[int, int]]()

        def wanted(height: int, width: int) -> tuple[int, int] | None:
            size = first_size(height, width, transforms)
            sizes.extend([(height, width)] if size else [])
            return size

        image = load_image(source, wanted) if self._fast_jpeg else load_image(source)
        height, width = sizes[0] if sizes else (image.height, image.width)
        layout, pixels = layout_of(spec, height, width, images), apply_transforms(image, transforms, (height, width))
        return layout, pixels if spec.tiles is None else filled(pixels, layout.slices)

    def _assemble(
        self, pieces: Sequence[Piece], images: list[tuple[Layout, np.ndarray]], add_special_tokens: bool | None
    ) -> Prompt:
        layouts = tuple(layout for layout, _ in images)
        token_ids = np.array(self._encode(pieces, layouts, add_special_tokens), np.int64)
        where, positions = np.zeros(0, np.int64), None
        if self._image is not None:
            where = np.flatnonzero(token_ids == self._image.prompt.token_id)
            counts = [layout.tokens for layout in layouts]
            if len(where) != sum(counts):
                raise BundleError(
                    f"the prompt has {len(where)} image tokens, the images have {sum(counts)} features: tokenizer and "
                    f"image prompt disagree about {self._image.prompt.token!r}",
                    "export the bundle again",
                )
            if images and self._follows_grids:
                starts = where[np.cumsum([0, *counts[:-1]])]
                positions = grid_positions(len(token_ids), starts.tolist(), layouts)
        pixels = [pixel_values for _, pixel_values in images]
        pixel_values = None if not pixels else pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
        text = "".join(piece.text for piece in pieces)
        return Prompt(text, token_ids, pixel_values, where, layouts, positions)


def _control_tokens(image: ImageSpec | None, tokenizer: Tokenizer, template: ChatTemplate | None) -> set[str]:
    """The added tokens that no text of a user's may become: those that stand for images, that the template writes, and
    that have a name, such as eos_token."""
    added = set(tokenizer.added_tokens.values())
    found = added & set(tokenizer.named_tokens)
    if image is not None:
        found |= set(_image_markers(image.prompt, added))
    if template is not None:
        written = template.written_text()
        found |= {token for token in added if token in written}
    return found


def _image_markers(prompt: ImagePrompt, added_tokens: Iterable[str]) -> tuple[str, ...]:
    """The added tokens of the vocabulary that the expansion of images uses, the placeholder first."""
    texts = prompt.single + image_text(prompt, 1, 1, 1, 1) + "\0".join((prompt.inline, *prompt.reserved))
    numbered = prompt.tile.replace("{image}", "")
    for row in range(1, 17):
        texts += "".join(numbered.replace("{row}", str(row)).replace("{col}", str(col)) for col in range(1, 17))
    used = sorted(token for token in added_tokens if token.strip() and token in texts)
    return (prompt.token, *(token for token in used if token != prompt.token))


def _as_sources(images: Any) -> list[ImageSource]:
    """`images` as a list: one image alone is not a sequence of images, even where Python could iterate over it."""
    if images is None:
        return []
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, BGR)) or hasattr(
        images, "read"
    ):
        return [images]
    if isinstance(images, np.ndarray) and images.ndim < 4:
        return [images]
    if not isinstance(images, Iterable):
        raise ImageError(f"images is {type(images).__name__}", "pass one image, or several in a list")
    return list(images)


def _inline_image(entry: Mapping[str, Any]) -> ImageSource | None:
    """The image that an image entry holds, or None."""
    if entry["type"] == "image_url":
        url = entry.get("image_url")
        return url.get("url") if isinstance(url, Mapping) else url
    key = next((key for key in _PAYLOADS if entry.get(key) is not None), None)
    if key is None:
        return None
    if key != "base64":
        return entry[key]
    data = entry[key]
    return f"data:;base64,{data.decode('ascii', 'replace') if isinstance(data, (bytes, bytearray)) else data}"


def _merge(inline: list[ImageSource | None], given: list[ImageSource]) -> list[ImageSource]:
    """The image of every image entry: its own, or the next of `given`."""
    empty = sum(source is None for source in inline)
    if empty != len(given):
        raise PromptError(
            f"the messages have {empty} image entries without an image, and {len(given)} images were given",
            "give exactly one image per image entry, in order",
        )
    rest = iter(given)
    return [next(rest) if source is None else source for source in inline]
