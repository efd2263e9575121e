"""A conversation: messages and their images, one answer after the other."""

import base64
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from PIL import Image

from mllm_edge.bundle import CHAT_TEMPLATE
from mllm_edge.errors import OptionError, PromptError
from mllm_edge.files import write_whole
from mllm_edge.runtime.answer import Chunk
from mllm_edge.runtime.arguments import first, given_trace
from mllm_edge.runtime.decode.scores import AnswerScore
from mllm_edge.runtime.numbers import whole
from mllm_edge.runtime.options import MAX_NEW_TOKENS, Options
from mllm_edge.runtime.prompt.image import image_path, load_image
from mllm_edge.runtime.prompt.sources import EncodedImage, Source, Video, VideoFile, entry_source, kind_of
from mllm_edge.runtime.saved_state import Model, load_state, save_state

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Conversation", "WhenFull"]

WhenFull = Literal["error", "drop_oldest"]

_SAVED = "give a file that /save wrote"
_KINDS = ("image", "video")
_ANY_VIDEO = (2, 64, 64, 1.0)  # a size, where only the messages are looked at


class Conversation:
    """What was said so far, and the images that wait for the next message.

    Images are decoded when they are attached: the file may change afterwards; a video file is when it is asked about.
    Each is looked at once, and a turn runs only what is new: what the decoder holds of the turns before it stays as
    long as no other call needs its place (`prefix_cache` of `VLM.load` keeps that of others). Raises PromptError for a
    bundle without a chat template.
    """

    def __init__(self, vlm: Model, system: str | None = None, when_full: WhenFull = "error"):
        """`when_full`: what happens to a turn that leaves no room for its answer (as many tokens as it may have, or a
        quarter of the context, if that is less). error: the answer is short, or there is a ContextError. drop_oldest:
        the oldest turns are forgotten, each with its images and its answer, until a quarter of the context is free;
        `Result.dropped_turns` tells how many. The system message stays. So much at once, for what is behind a dropped
        turn has to be run again. Raises OptionError."""
        if when_full not in get_args(WhenFull):
            raise OptionError(f"when_full is {when_full!r:.60}", f"choose from {', '.join(get_args(WhenFull))}")
        if CHAT_TEMPLATE not in vlm.bundle.manifest.files:
            raise PromptError(
                f"{vlm.bundle.path} has no chat template, so it holds no conversation",
                "ask single questions with `mllm-edge run`",
            )
        self._vlm, self._when_full = vlm, when_full
        self._first = [] if system is None else [{"role": "system", "content": system}]
        # By the identity of what an entry holds, which is kept beside it: another's could be the same once it is gone.
        self._seen: dict[int, tuple[Any, EncodedImage]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._messages: list[dict[str, Any]] = list(self._first)
        self._waiting: list[dict[str, Any]] = []

    @property
    def waiting(self) -> int:
        """Images and videos attached to the next message."""
        return len(self._waiting)

    @property
    def waiting_kinds(self) -> set[str]:
        """What of: "image", "video"."""
        return {entry["type"] for entry in self._waiting}

    @property
    def turns(self) -> int:
        """Questions that were asked."""
        return sum(message["role"] == "user" for message in self._messages)

    def attach(self, image: Source) -> None:
        """Add an image (a path, an array, a `Video`, an encoded image, …) to the next message; raises ImageError."""
        self._waiting.append(_entry(image))

    def fork(self) -> "Conversation":
        """Another conversation that goes on from here; the two share what was run so far."""
        other = copy(self)
        other._messages, other._waiting = list(self._messages), list(self._waiting)
        other._seen = dict(self._seen)
        return other

    def truncate(self, turns: int) -> None:
        """Forget all behind the first `turns` questions and their answers; raises OptionError for more than there are.
        Images that wait stay."""
        left = whole("turns", turns, 0, self.turns)
        for end, message in enumerate(self._messages):
            if message["role"] == "user":
                if not left:
                    self._messages = self._messages[:end]
                    return
                left -= 1

    def ask(self, text: str, **options: "Unpack[Options]") -> Iterator[Chunk]:
        """Answer `text` piece by piece; options and errors are those of `VLM.stream`. Bounds on image tokens are for
        images that were not seen before: those of earlier turns stay as they are.

        After an error, or when nothing was said yet, conversation and waiting images are as before. An answer that is
        given up half-way stays in the conversation as far as it came.
        """
        options["trace"] = given_trace(options.get("trace"))
        options.setdefault("reuse", True)
        kept, asked, dropped = self._with_question(text, options, options.get("max_new_tokens"))
        rest: Options = {**options, "max_image_tokens": None, "min_image_tokens": None}
        said: list[str] = []
        finished = False
        try:
            for chunk in self._vlm.stream(asked, **rest):
                said.append(chunk.text)
                yield _told(chunk, dropped)
            finished = True
        finally:
            answer = "".join(said).strip()
            if answer or finished:
                self._said(kept, answer)

    def score_answers(
        self, text: str, *, answers: Sequence[str], keep: bool = False, **options: Any
    ) -> list[AnswerScore]:
        """How likely each of some answers to `text` is, behind all that was said; options and errors are those of
        `VLM.score_answers`. Of the turns before nothing is run again.

        The conversation and its waiting images are as before, and the same question may be asked; where the context is
        full, turns are dropped for this call alone. `keep`: the question becomes a turn, the likeliest answer (the
        first of several that are) its answer.
        """
        options["trace"] = given_trace(options.get("trace"))
        options.setdefault("reuse", True)
        longest = max((len(answer.encode()) for answer in answers if isinstance(answer, str)), default=0)
        kept, asked, _ = self._with_question(text, options, longest + 2)  # tokens at most: its bytes, a blank, an end
        rest = {**options, "max_image_tokens": None, "min_image_tokens": None}
        scores: list[AnswerScore] = self._vlm.score_answers(asked, answers=answers, **rest)
        if keep:
            self._said(kept, max(scores, key=lambda score: score.share).answer.strip())
        return scores

    def _with_question(
        self, text: str, options: Mapping[str, Any], most: int | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
        """The messages with a new question, as they are kept and with encoded images, and how many turns were dropped
        for an answer of `most` tokens."""
        question = {"role": "user", "content": [*self._waiting, {"type": "text", "text": text}]}
        asked = [self._looked_at(message, options) for message in (*self._messages, question)]
        dropped = self._too_old(asked, most) if self._when_full == "drop_oldest" else 0
        return _without_turns([*self._messages, question], dropped), _without_turns(asked, dropped), dropped

    def _said(self, asked: Sequence[dict[str, Any]], answer: str) -> None:
        """The conversation is these messages and the answer from now on."""
        self._messages = [*asked, {"role": "assistant", "content": answer}]
        self._waiting = []
        self._forget_images()

    def _too_old(self, asked: list[dict[str, Any]], most: int | None) -> int:
        """How many of the first turns have to go for the last one's answer."""
        quarter, turns = self._vlm.context_length // 4, sum(m["role"] == "user" for m in asked)
        wanted = first(most, self._vlm.bundle.generation().defaults.max_new_tokens, MAX_NEW_TOKENS)
        if self._vlm.room(asked) >= min(quarter, whole("max_new_tokens", wanted, 1)):
            return 0
        rooms = ((n, self._vlm.room(_without_turns(asked, n))) for n in range(1, turns))
        return next((n for n, room in rooms if room >= quarter), turns - 1)

    def _forget_images(self) -> None:
        """Let go of what was made of images that are not shown any more."""
        shown = {id(entry[entry["type"]]) for m in self._messages for entry in _entries(m) if entry["type"] in _KINDS}
        self._seen = {key: value for key, value in self._seen.items() if key in shown}

    def messages(self) -> list[dict[str, Any]]:
        """The messages so far as `VLM.generate` takes them and as JSON holds them: images with their paths, or as data
        URLs. Raises PromptError for one whose pixels are not known any more."""
        return [{**message, "content": _plain(message["content"])} for message in self._messages]

    def save(self, path: str) -> None:
        """Write `messages()` to a JSON file, whole or not at all; raises WriteError."""
        write_whole(path, json.dumps(self.messages(), indent=1, ensure_ascii=False) + "\n")

    def load(self, path: str) -> None:
        """Go on with a conversation that `save` wrote; raises PromptError or ImageError before any change."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise PromptError(f"{path}: cannot be read ({e.strerror or e})", _SAVED) from None
        except (ValueError, RecursionError) as e:
            raise PromptError(f"{path}: not valid JSON ({e})", _SAVED) from None
        self._take(path, data)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation with its images and with what the decoder holds of it to one file, whole or not at
        all; raises WriteError."""
        messages = [self._looked_at(message, {}) for message in self._messages]
        stated = [{**message, "content": _stated(message["content"])} for message in self._messages]
        save_state(self._vlm, messages, stated, path)

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Go on with a conversation that `save_state` wrote: nothing of it is looked at or run again, as long as
        `prefix_cache` holds it. Raises PromptError or ImageError, before any change, for a file of another bundle."""
        data, images = load_state(self._vlm, path)
        self._take(os.fspath(path), data, images)
        entries = [entry for message in self._messages for entry in _entries(message) if entry["type"] in _KINDS]
        for entry, image in zip(entries, images, strict=True):
            source = entry.setdefault(entry["type"], image)
            self._seen[id(source)] = source, image

    def _take(self, path: str, data: Any, images: Sequence[EncodedImage] = ()) -> None:
        """Go on with messages that were read from a file; with the encoded `images` of all that they show, if known."""
        if not isinstance(data, list) or not all(isinstance(m, dict) and "content" in m for m in data):
            raise PromptError(f"{path}: not a list of messages", _SAVED)
        loaded = [{**message, "content": _decoded(message["content"])} for message in data]
        entries = [entry for m in loaded for entry in _entries(m)]
        known = bool(images)
        if not all(isinstance(e, dict) and (known or e.get("type") not in _KINDS or e["type"] in e) for e in entries):
            raise PromptError(f"{path}: an image without its path, or an entry that is none", _SAVED)
        if loaded and not known:
            shown = [entry[entry["type"]] for entry in entries if entry.get("type") in _KINDS]
            self._vlm.count_tokens(loaded, [_ANY_VIDEO if kind_of(one) == "video" else one.size[::-1] for one in shown])
        self._messages, self._waiting = loaded, []

    def _looked_at(self, message: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """The message with encoded images; each is looked at once."""
        if not isinstance(message["content"], list):
            return message
        return {**message, "content": [self._encoded(entry, options) for entry in message["content"]]}

    def _encoded(self, entry: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        kind = entry["type"]
        if kind not in _KINDS:
            return entry
        source = entry[kind]
        if id(source) not in self._seen:
            self._seen[id(source)] = (
                source,
                self._vlm.encode_image(
                    source,
                    options.get("trace"),
                    max_image_tokens=options.get("max_image_tokens"),
                    min_image_tokens=options.get("min_image_tokens"),
                ),
            )
        return {"type": kind, kind: self._seen[id(source)][1]}


def _entry(source: Source) -> dict[str, Any]:
    """What a message holds of an image or a video."""
    if isinstance(source, VideoFile) and isinstance(source.file, (str, os.PathLike)):
        return {"type": "video", "video": source, "path": str(image_path(source.file).absolute()), **source.stated}
    if isinstance(source, (Video, VideoFile, EncodedImage)):
        return {"type": kind_of(source), kind_of(source): source}
    entry = {"type": "image", "image": load_image(source)}
    if not isinstance(source, (str, os.PathLike)) or str(source).lower().startswith("data:"):
        return entry
    return {**entry, "path": str(image_path(source).absolute())}


def _without_turns(messages: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The messages without the first `count` turns: questions, and all that follows each."""
    begins = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return [*messages[: begins[0]], *messages[begins[count] :]] if count else list(messages)


def _told(chunk: Chunk, dropped: int) -> Chunk:
    """The chunk, whose result tells how many turns were dropped."""
    if chunk.result is None or not dropped:
        return chunk
    return replace(chunk, result=replace(chunk.result, dropped_turns=dropped))


def _entries(message: dict[str, Any]) -> list[dict[str, Any]]:
    return message["content"] if isinstance(message["content"], list) else []


def _plain(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [_plain_entry(entry) for entry in content]


def _stated(content: Any) -> Any:
    """As JSON has it, without what only an encoded image tells."""
    if isinstance(content, str):
        return content
    pictured = [e.get("type") not in _KINDS or isinstance(e[e["type"]], Image.Image) for e in content]
    return [_plain_entry(e) if plain else {"type": e["type"]} for e, plain in zip(content, pictured, strict=True)]


def _plain_entry(entry: dict[str, Any]) -> dict[str, Any]:
    if entry.get("type") not in _KINDS or "path" in entry:
        return {key: value for key, value in entry.items() if key not in _KINDS}
    source = entry[entry["type"]]
    if not isinstance(source, Image.Image):
        raise PromptError(f"{source!r} is no picture that a file of messages holds", "use save_state")
    with io.BytesIO() as file:
        source.save(file, "PNG")
        return {"type": "image", "url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}


def _decoded(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [_decoded_entry(entry) for entry in content]


def _decoded_entry(entry: Any) -> Any:
    if not isinstance(entry, dict) or entry.get("type") not in _KINDS or not {"path", "url"} & entry.keys():
        return entry
    source = entry_source(entry)
    return entry if source is None else _entry(source)
