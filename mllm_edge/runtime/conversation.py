"""A conversation: messages and their images, one answer after the other."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.bundle import CHAT_TEMPLATE
from mllm_edge.errors import PromptError
from mllm_edge.files import write_whole
from mllm_edge.runtime.options import Options
from mllm_edge.runtime.prompt.image import image_path, load_image
from mllm_edge.runtime.vlm import VLM, Chunk

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Conversation"]

_SAVED = "give a file that /save wrote"


class Conversation:
    """What was said so far, and the images that wait for the next message.

    Images are decoded when they are attached: the file may change afterwards. Raises PromptError for a bundle without a
    chat template.
    """

    def __init__(self, vlm: VLM, system: str | None = None):
        if CHAT_TEMPLATE not in vlm.bundle.manifest.files:
            raise PromptError(
                f"{vlm.bundle.path} has no chat template, so it holds no conversation",
                "ask single questions with `mllm-edge run`",
            )
        self._vlm = vlm
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._messages: list[dict[str, Any]] = list(self._first)
        self._waiting: list[dict[str, Any]] = []

    @property
    def waiting(self) -> int:
        """Images attached to the next message."""
        return len(self._waiting)

    def attach(self, path: str) -> None:
        """Add an image to the next message; raises ImageError."""
        self._waiting.append(_image(path))

    def ask(self, text: str, **options: "Unpack[Options]") -> Iterator[Chunk]:
        """Answer `text` piece by piece; options and errors are those of `VLM.stream`.

        After an error, or when nothing was said yet, conversation and waiting images are as before. An answer that is
        given up half-way stays in the conversation as far as it came.
        """
        question = {"role": "user", "content": [*self._waiting, {"type": "text", "text": text}]}
        said: list[str] = []
        finished = False
        try:
            for chunk in self._vlm.stream([*self._messages, question], **options):
                said.append(chunk.text)
                yield chunk
            finished = True
        finally:
            answer = "".join(said).strip()
            if answer or finished:
                self._messages += [question, {"role": "assistant", "content": answer}]
                self._waiting = []

    def messages(self) -> list[dict[str, Any]]:
        """The messages so far with the paths of their images, as `VLM.generate` takes them and as JSON holds them."""
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
        if not isinstance(data, list) or not all(isinstance(m, dict) and "content" in m for m in data):
            raise PromptError(f"{path}: not a list of messages", _SAVED)
        loaded = [{**message, "content": _decoded(message["content"])} for message in data]
        entries = [entry for m in loaded for entry in _entries(m)]
        if not all(isinstance(e, dict) and ("image" in e or e.get("type") != "image") for e in entries):
            raise PromptError(f"{path}: an image without its path, or an entry that is none", _SAVED)
        images = [entry["image"] for entry in entries if entry.get("type") == "image"]
        if loaded:
            self._vlm.count_tokens(loaded, [(image.height, image.width) for image in images])
        self._messages, self._waiting = loaded, []


def _image(path: str) -> dict[str, Any]:
    return {"type": "image", "image": load_image(path), "path": str(image_path(path).absolute())}


def _entries(message: dict[str, Any]) -> list[dict[str, Any]]:
    return message["content"] if isinstance(message["content"], list) else []


def _plain(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{k: v for k, v in entry.items() if k != "image"} for entry in content]


def _decoded(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [
        _image(e["path"]) if isinstance(e, dict) and e.get("type") == "image" and "path" in e else e for e in content
    ]
