"""Messages, images and videos → the model's inputs: token ids, pixel values and where the features go."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

import numpy as np

from mllm_edge.errors import BundleError, OptionError, PromptError
from mllm_edge.runtime.prompt.control_tokens import ControlTokens, Piece, continued, encode_pieces
from mllm_edge.runtime.prompt.layout import (
    Layout,
    grid_positions,
    image_text,
    layout_of,
    video_layout,
)
from mllm_edge.runtime.prompt.shown import Shown, Viewer
from mllm_edge.runtime.prompt.sources import Kind, Source, as_sources, entry_source, in_order, kind_of, merged
from mllm_edge.runtime.prompt.stage_text import StageTokens
from mllm_edge.runtime.prompt.timing import Timing, timing_of
from mllm_edge.runtime.prompt.token_budget import FREE, TokenBudget, within
from mllm_edge.runtime.prompt.tokenizer import ChatTemplate, Tokenizer
from mllm_edge.spec import PIXELS, ImagePrompt, ImageSpec, ModelSpec, VideoSpec

__all__ = ["Message", "Messages", "Processor", "Prompt"]

Message = Mapping[str, Any]
Messages = str | Sequence[Message]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the model is run with.

    `text`: the rendered prompt, one placeholder per image or video. `token_ids` [S] int64, placeholders expanded.
    `shown`: the images and videos as they follow each other in the text. `image_positions` [N] int64: where in
    `token_ids` their tokens are, in order. `positions` [3, S] int64 for the decoder; None: the places in the sequence.
    `texts`: the text [1, tokens] int64 beside each slice, by its name (see `StageText`).
    """

    text: str
    token_ids: np.ndarray
    shown: tuple[Shown, ...]
    image_positions: np.ndarray
    positions: np.ndarray | None = None
    texts: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, shown: Shown) -> Prompt:
        """A prompt without a text, of one image alone: for the stages before the decoder."""
        return cls("", np.zeros(0, np.int64), (shown,), np.zeros(0, np.int64))

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Of each image and video."""
        return tuple(shown.layout for shown in self.shown)

    @cached_property
    def pixel_values(self) -> np.ndarray | None:
        """The slices (see `ImageSpec`) [slices, …] float32 of all of them; None without any, or where those of one are
        not known any more."""
        found = [shown.inputs[PIXELS] for shown in self.shown if shown.inputs is not None]
        return None if not found or len(found) < len(self.shown) else _joined(found)

    @property
    def keys(self) -> np.ndarray:
        """[S] int64: a number for each token, which are the same for the same beginnings of prompts: its id, and for an
        image's one of its content and the token's place in it, below zero."""
        keys, first = self.token_ids.copy(), 0
        for shown in self.shown:
            where = self.image_positions[first : first + shown.layout.tokens]
            keys[where] = shown.numbers(self.texts)
            first += len(where)
        return keys


class Processor:
    """Turns messages and images into a `Prompt`, equal to what the source model's own processor gives."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        fast_jpeg: bool = False,
        stage_tokens: StageTokens | None = None,
        model: str = "",
    ):
        """`template` None: the bundle has no chat template, and only plain strings and raw prompts are accepted.
        `fast_jpeg`: decode large JPEG files at a smaller scale, see `load_image`. `stage_tokens`: where stages get the
        text, too. `model`: whose encoded images are taken."""
        self._image, self._stage_tokens, self._model_type = spec.image, stage_tokens, spec.model_type
        self._viewer = None if spec.image is None else Viewer(spec.image, fast_jpeg, model)
        self._follows_grids = spec.positions.images == "grid"
        self._tokenizer = tokenizer
        self._template = template
        self._placeholder = spec.image.prompt.written if spec.image else None
        self._kinds = _placeholders(spec.image)
        self._written = re.compile("|".join(map(re.escape, sorted(self._kinds, key=len, reverse=True))) or r"(?!)")
        control = _control_tokens(spec.image, tokenizer, template)
        self._control = ControlTokens(control, control - tokenizer.special_tokens)
        self._takes_strings = template is not None and template.accepts_strings()
        self._takes_lists = template is not None and template.accepts_lists(self._placeholder)

    def process(
        self,
        messages: Messages,
        images: Source | Iterable[Source] = (),
        *,
        add_generation_prompt: bool = True,
        budget: TokenBudget = FREE,
    ) -> Prompt:
        """The prompt for `messages`: a string (one user message, the images before it), or messages in chat format.

        In chat format a message is {"role": …, "content": …}; the content is a string or a list of {"type": "text",
        "text": …}, {"type": "image"} and {"type": "video"} entries. An image entry may hold its image ("image", "path",
        "url" for a local path or data: URI, or "base64"), a video entry the list of its frames ("video"); the others
        take theirs from `images`, in order. `images` is one image or several, each as `load_image` takes it; a `Video`
        among them is a video. `budget`: the tokens that each image may have.

        A text that spells one of the model's control tokens (the end of a turn, an image placeholder) stays text.

        Raises PromptError when messages, images and template do not fit together; ImageError when an image cannot be
        decoded; OptionError for a budget that the model cannot keep.
        """
        given = as_sources(images)
        conversation, entries = self._parse(messages, [kind_of(source) for source in given])
        sources = merged(entries, given)
        kinds = [kind_of(source) for source in sources]
        pieces, add_special_tokens = self._render(conversation, kinds, add_generation_prompt)
        return self._assemble(pieces, self._shown(self._as_written(pieces, sources), budget), add_special_tokens)

    def sources(self, messages: Messages, images: Source | Iterable[Source] = ()) -> list[Source]:
        """What the entries of messages show, their own or of `images`, in their order; errors as of `process`."""
        given = as_sources(images)
        return merged(self._parse(messages, [kind_of(source) for source in given])[1], given)

    def process_text(self, text: str, images: Source | Iterable[Source] = (), budget: TokenBudget = FREE) -> Prompt:
        """The prompt for an already rendered `text` with one placeholder per image, such as "<image>Describe this."

        Raises PromptError when the number of placeholders is not the number of images; else as `process` does.
        """
        sources, pieces = as_sources(images), (Piece(text),)
        self._check_placeholders(pieces, [kind_of(source) for source in sources])
        return self._assemble(pieces, self._shown(self._as_written(pieces, sources), budget), None)

    def count_tokens(
        self,
        messages: Messages,
        image_sizes: Sequence[tuple[float, ...]] = (),
        *,
        add_generation_prompt: bool = True,
        raw: bool = False,
        budget: TokenBudget = FREE,
    ) -> int:
        """Number of tokens of the prompt that `process` would give for images of these (height, width) px sizes, and
        videos of (frames, height, width) or, where the prompt tells times, (frames, height, width, frames a second).

        Exact, and without pixels: image entries need no image, and given ones are not opened. The sizes, one per image
        in order, are those of the upright images. `raw`: `messages` is a rendered text, as for `process_text`.
        `budget`: the tokens that each image may have.
        """
        budgets = [budget] * len(image_sizes)
        return self.laid_out(messages, image_sizes, budgets, add_generation_prompt, raw)[0]

    def laid_out(
        self,
        messages: Messages,
        image_sizes: Sequence[tuple[Any, ...]],
        budgets: Sequence[TokenBudget],
        add_generation_prompt: bool = True,
        raw: bool = False,
    ) -> tuple[int, list[int], list[Layout]]:
        """`count_tokens`, and which of the images and videos follow each other in the text, with their layouts. Each
        has its budget; a video's fourth number may be its `Timing`."""
        kinds: list[Kind] = ["image" if len(size) == 2 else "video" for size in image_sizes]
        if raw:
            pieces: tuple[Piece, ...] = (Piece(str(messages)),)
            add_special_tokens = None
            self._check_placeholders(pieces, kinds)
        else:
            conversation, entries = self._parse(messages, kinds)
            if len(entries) != len(image_sizes):
                raise PromptError(
                    f"the messages have {len(entries)} images, and {len(image_sizes)} image sizes were given",
                    "give one (height, width) per image, in order",
                )
            pieces, add_special_tokens = self._render(conversation, kinds, add_generation_prompt)
        order = in_order(self._kinds_in(pieces), list(zip(kinds, range(len(kinds)), strict=True)))
        layouts = [self._layout(image_sizes[i], kinds.count("image"), budgets[i]) for i in order]
        return len(self._encode(pieces, layouts, add_special_tokens)), order, layouts

    def answer_tokens(self, prompt: Prompt, answer: Any, raw: bool = False) -> list[int]:
        """Token ids of an answer behind a prompt, with a blank before it where the prompt ends in a text without one
        (unless it is `raw`). Raises OptionError for an empty one, or one that spells a control token."""
        if not isinstance(answer, str) or not answer.strip():
            raise OptionError(f"an answer is {answer!r:.60}", "give a text that is not empty")
        if spelled := self.spelled(answer):
            raise OptionError(f"the answer {answer!r:.60} spells {spelled[0]!r}", "leave it out; ended=True is the end")
        last = self._tokenizer.added_tokens.get(int(prompt.token_ids[-1]))
        parted = raw or last is not None or answer[0].isspace() or prompt.text[-1:].isspace()
        return continued(self._tokenizer, answer if parted else f" {answer}")

    def show(self, source: Source, budget: TokenBudget = FREE) -> Shown:
        """One image or video as it is shown alone. Raises PromptError for a model that takes none, ImageError,
        OptionError for the budget."""
        self.require([kind_of(source)])
        assert self._viewer is not None
        return self._viewer.show([source], budget)[0]

    def spelled(self, text: str) -> list[str]:
        """The control tokens whose names a user's `text` spells, in order: they stay text."""
        return self._control.inside(text)

    # ------------------------------------------------------------ messages
    def _parse(
        self, messages: Messages, kinds: Sequence[Kind]
    ) -> tuple[list[dict[str, Any]], list[tuple[Kind, Source | None]]]:
        """Messages as the template may see them, without images, and what each entry of a kind to look at holds."""
        if isinstance(messages, str):
            text = {"type": "text", "text": messages}
            content: Any = [*({"type": kind} for kind in kinds), text] if kinds else messages
            messages = [{"role": "user", "content": content}]
        if not isinstance(messages, Sequence) or not messages:
            raise PromptError(f"messages is {messages!r:.60}", "pass a string or a non-empty list of messages")
        entries: list[tuple[Kind, Source | None]] = []
        conversation = [self._parse_message(message, i, entries) for i, message in enumerate(messages)]
        return conversation, entries

    def _parse_message(self, message: Any, index: int, entries: list[tuple[Kind, Source | None]]) -> dict[str, Any]:
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise PromptError(f"{where} is not a message", 'write {"role": "user", "content": …}')
        content = message["content"]
        if isinstance(content, str):
            pass
        elif isinstance(content, (list, tuple)):
            content = [self._parse_entry(entry, f"{where}.content[{i}]", entries) for i, entry in enumerate(content)]
        else:
            raise PromptError(f"{where}: content is {type(content).__name__}", "pass a string or a list of entries")
        try:  # anything but plain data stays away from the template
            plain = json.loads(json.dumps({key: value for key, value in message.items() if key != "content"}))
        except (TypeError, ValueError) as error:
            raise PromptError(f"{where}: {error}", "use only strings, numbers, lists and dicts") from error
        return {**plain, "content": content}

    def _parse_entry(self, entry: Any, where: str, entries: list[tuple[Kind, Source | None]]) -> dict[str, str]:
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if kind == "text" and isinstance(entry.get("text"), str):
            return {"type": "text", "text": entry["text"]}
        if kind in ("image", "image_url", "video"):
            shown: Kind = "video" if kind == "video" else "image"
            entries.append((shown, entry_source(entry)))
            return {"type": shown}
        raise PromptError(
            f"{where} is neither text nor image: {entry!r:.60}",
            'write {"type": "text", "text": …} or {"type": "image", "image": …}',
        )

    # ------------------------------------------------------------ text
    def _render(
        self, conversation: list[dict[str, Any]], kinds: Sequence[Kind], add_generation_prompt: bool
    ) -> tuple[tuple[Piece, ...], bool | None]:
        """The prompt's text in pieces that are tokenized apart (nearly always one), and whether to add special tokens
        around it (None: as generation.json says)."""
        self.require(kinds)
        marked, marks = self._control.mark(conversation)
        if self._template is None:
            text, add_special_tokens = self._render_plain(marked), None
        else:
            shaped = [{**message, "content": self._shape(message["content"])} for message in marked]
            text = self._template.render(shaped, add_generation_prompt)
            bos = self._tokenizer.bos_token
            add_special_tokens = False if bos and text.startswith(bos) else None
        pieces = self._control.pieces(text, marks)
        self._check_placeholders(pieces, kinds)
        return pieces, add_special_tokens

    def _shape(self, content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
        """`content` in a form that the template renders; as it is where the template's answer was no help."""
        if self._takes_strings == self._takes_lists:
            return content
        if isinstance(content, str):
            return content if self._takes_strings else [{"type": "text", "text": content}]
        return content if self._takes_lists else self._flatten(content, "\n")

    def _flatten(self, content: list[dict[str, str]], separator: str) -> str:
        inline = self._image.prompt.inline if self._image else ""
        shown: dict[str, str] = {kind: inline.replace("{image}", token) for token, kind in self._kinds.items()}
        if self._image is not None and self._image.video is not None and self._image.video.placeholder:
            shown["video"] = self._image.video.placeholder
        return separator.join(entry["text"] if entry["type"] == "text" else shown[entry["type"]] for entry in content)

    def _render_plain(self, conversation: Sequence[dict[str, Any]]) -> str:
        if len(conversation) != 1 or conversation[0]["role"] != "user":
            raise PromptError("this bundle has no chat template, so it takes no conversation", "pass one string")
        content = conversation[0]["content"]
        return content if isinstance(content, str) else self._flatten(content, "")

    def _check_placeholders(self, pieces: Sequence[Piece], kinds: Sequence[Kind]) -> None:
        self.require(kinds)
        written = self._kinds_in(pieces)
        for kind in get_args(Kind):
            placeholders, given = written.count(kind), kinds.count(kind)
            if placeholders != given:
                raise PromptError(
                    f"the prompt has {placeholders} {kind} placeholders, and {given} {kind}s were given",
                    f"give exactly one {kind} per placeholder, in order",
                )

    def _kinds_in(self, pieces: Sequence[Piece]) -> list[Kind]:
        """What the placeholders of a text stand for, one after the other."""
        return [self._kinds[m[0]] for piece in pieces if not piece.spelled for m in self._written.finditer(piece.text)]

    def _as_written(self, pieces: Sequence[Piece], sources: Sequence[Source]) -> list[Source]:
        """Sources in the order of their placeholders: a template may put all images before all videos."""
        return in_order(self._kinds_in(pieces), [(kind_of(source), source) for source in sources])

    def _encode(self, pieces: Sequence[Piece], layouts: Sequence[Layout], add_special_tokens: bool | None) -> list[int]:
        """Token ids of the pieces with the i-th placeholder expanded for the i-th image or video."""
        if self._image is not None:
            images = iter([layout.text for layout in layouts])
            pieces = [piece if piece.spelled else Piece(self._expanded(piece.text, images)) for piece in pieces]
        ids = encode_pieces(self._tokenizer, pieces, add_special_tokens)
        if not ids:
            raise PromptError("the prompt is empty", "pass some text")
        return ids

    def _expanded(self, text: str, images: Iterator[str]) -> str:
        made = self._written.sub(lambda _: next(images), text)
        border = self._image.prompt.border if self._image is not None else ""
        if not border:
            return made
        assert self._image is not None
        if not self._image.prompt.blank:
            return re.sub(rf" *{re.escape(border)} *", border, made).replace(border * 2, border)
        return re.sub(rf"{re.escape(border)}(?=[^\s<])", f"{border} ", made.replace(border * 2, border))

    # ------------------------------------------------------------ images
    def require(self, kinds: Sequence[Kind]) -> None:
        """Raises PromptError for kinds of which the model takes none, or not so many."""
        if kinds and self._image is None:
            raise PromptError(f"this model takes no images, and got {len(kinds)}", "pass text only")
        most, given = None if self._image is None else self._image.most_images, kinds.count("image")
        if most is not None and given > most:
            many = "one image" if most == 1 else f"{most} images"
            raise PromptError(f"this model takes {many} in a prompt, and got {given}", "ask about each by itself")
        if "video" in kinds and (self._image is None or self._image.video is None):
            count = kinds.count("video")
            what = f"this bundle takes no videos, and got {count}; its model is {self._model_type}"
            raise PromptError(what, "pass the frames as images")

    def _layout(self, size: tuple[Any, ...], images: int, budget: TokenBudget) -> Layout:
        assert self._image is not None
        if len(size) == 2:
            return layout_of(within(self._image, *size, budget, images), *size, images)
        frames, height, width, *fps = size
        given = fps[0] if fps else None
        timing = given if isinstance(given, Timing) else timing_of(frames, None, given, None)
        return video_layout(self._image, frames, height, width, timing)

    def _shown(self, sources: Sequence[Source], budget: TokenBudget) -> tuple[Shown, ...]:
        return () if self._viewer is None else self._viewer.show(sources, budget)

    def _assemble(self, pieces: Sequence[Piece], shown: tuple[Shown, ...], add_special_tokens: bool | None) -> Prompt:
        layouts = [one.layout for one in shown]
        token_ids = np.array(self._encode(pieces, layouts, add_special_tokens), np.int64)
        where, positions = np.zeros(0, np.int64), None
        if self._image is not None:
            video = self._image.video
            ids = (self._image.prompt.token_id, *((video.token_id,) if video is not None else ()))
            where = np.flatnonzero(np.isin(token_ids, ids))
            counts = [layout.tokens for layout in layouts]
            if len(where) != sum(counts):
                raise BundleError(
                    f"the prompt has {len(where)} image tokens, the images have {sum(counts)} features: tokenizer and "
                    f"image prompt disagree about {self._image.prompt.token!r}",
                    "export the bundle again",
                )
            if shown and self._follows_grids:
                positions = grid_positions(len(token_ids), where, layouts)
        text = "".join(piece.text for piece in pieces)
        return Prompt(text, token_ids, shown, where, positions, self._texts(pieces) if shown else {})

    def _texts(self, pieces: Sequence[Piece]) -> Arrays:
        """What stages get of the text."""
        if self._stage_tokens is None:
            return {}
        plain = [piece if piece.spelled else Piece(self._written.sub("", piece.text)) for piece in pieces]
        return {self._stage_tokens.spec.name: self._stage_tokens.ids(plain)}


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _placeholders(image: ImageSpec | None) -> dict[str, Kind]:
    """Token → what it stands for."""
    found: dict[str, Kind] = {} if image is None else {image.prompt.written: "image"}
    if image is not None and image.video is not None:
        found[image.video.written] = "video"
    return found


def _control_tokens(image: ImageSpec | None, tokenizer: Tokenizer, template: ChatTemplate | None) -> set[str]:
    """The added tokens that no text of a user's may become: those that stand for images, that the template writes, and
    that have a name, such as eos_token."""
    added = set(tokenizer.added_tokens.values())
    found = added & set(tokenizer.named_tokens)
    if image is not None:
        found |= {image.prompt.written, *_image_markers(image.prompt, added), *_video_markers(image.video, added)}
    if template is not None:
        written = template.written_text()
        found |= {token for token in added if token in written}
    return found


def _video_markers(video: VideoSpec | None, added_tokens: Iterable[str]) -> set[str]:
    """The added tokens that the text of a video has."""
    text = (
        "\0".join((video.written, video.token, video.begin, video.frame, video.between, video.close)) if video else ""
    )
    return {token for token in added_tokens if token.strip() and token in text}


def _image_markers(prompt: ImagePrompt, added_tokens: Iterable[str]) -> tuple[str, ...]:
    """The added tokens of the vocabulary that the expansion of images uses, the placeholder first."""
    others = prompt.inline, prompt.placeholder, prompt.beside, prompt.between, *prompt.reserved
    texts = prompt.single + image_text(prompt, 1, 1, 1, 1) + "\0".join(others)
    numbered = prompt.tile.replace("{image}", "")
    for row in range(1, 17):
        texts += "".join(numbered.replace("{row}", str(row)).replace("{col}", str(col)) for col in range(1, 17))
    used = sorted(token for token in added_tokens if token.strip() and token in texts)
    return (prompt.token, *(token for token in used if token != prompt.token))
