"""A conversation in one file: its messages, its encoded images, and what the decoder holds of it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Protocol

import numpy as np

from mllm_edge.bundle import Bundle
from mllm_edge.errors import PromptError
from mllm_edge.files import write_whole
from mllm_edge.runtime.decode.decoder import DecoderSnapshot
from mllm_edge.runtime.decode.state import Snapshot
from mllm_edge.runtime.encoded_image import encoded_bytes
from mllm_edge.runtime.prompt.sources import EncodedImage, Source
from mllm_edge.runtime.trace import Trace

__all__ = ["Model", "load_state", "save_state"]

_FIX = "give a file that save_state wrote, and the bundle and backend that it was made with"


class Model(Protocol):
    """What a conversation asks: a `VLM`, whose methods these are."""

    bundle: Bundle
    identity: str
    context_length: int

    @property
    def stream(self) -> Callable[..., Iterator[Any]]: ...

    @property
    def score_answers(self) -> Callable[..., Any]: ...

    def encode_image(
        self,
        image: Source,
        trace: Trace | None = None,
        *,
        max_image_tokens: int | None = None,
        min_image_tokens: int | None = None,
    ) -> EncodedImage: ...

    def load_image(self, path: str | os.PathLike[str] | IO[bytes]) -> EncodedImage: ...

    def count_tokens(self, prompt: Any, image_sizes: Sequence[tuple[float, ...]] = ()) -> int: ...

    def room(self, prompt: Any) -> int: ...

    def held(self, messages: Any) -> tuple[np.ndarray, DecoderSnapshot] | None: ...

    def hold(self, keys: np.ndarray, snapshot: DecoderSnapshot) -> None: ...


def save_state(
    vlm: Model, messages: list[dict[str, Any]], plain: list[dict[str, Any]], path: str | os.PathLike[str]
) -> None:
    """Write `messages`, whose images are encoded, and as `plain` JSON has them; raises WriteError."""
    found = vlm.held(messages) if messages else None
    about = {"model": vlm.identity, "messages": plain, "lengths": None if found is None else found[1].cache.lengths}
    arrays: dict[str, np.ndarray] = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
    if found is not None:
        keys, snapshot = found
        arrays["keys"] = keys
        arrays |= {f"rows/{i}": rows for i, rows in enumerate(snapshot.cache.rows)}
        arrays |= {f"recurrent/{i}": rows for i, rows in enumerate(snapshot.cache.recurrent)}
    for i, image in enumerate(_images(messages)):
        arrays[f"image/{i}"] = np.frombuffer(encoded_bytes(image), np.uint8)
    with io.BytesIO() as file:
        np.savez(file, allow_pickle=False, **arrays)
        write_whole(os.fspath(path), file.getvalue())


def load_state(vlm: Model, path: str | os.PathLike[str]) -> tuple[Any, list[EncodedImage]]:
    """The plain messages and the encoded images of a file that `save_state` wrote; what the decoder held is kept for
    the next turn. Raises PromptError for a file that is none, or is another model's."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays["about"].tobytes())
        messages, lengths, model = about["messages"], about["lengths"], about["model"]
    except OSError as e:
        raise PromptError(f"{path}: cannot be read ({e.strerror or e})", _FIX) from None
    except Exception as e:
        raise PromptError(f"{path}: not a saved conversation ({type(e).__name__})", _FIX) from None
    if model != vlm.identity:
        raise PromptError(f"{path}: a conversation with another bundle, or on another target", _FIX)
    images = [vlm.load_image(io.BytesIO(arrays[name].tobytes())) for name in _numbered(arrays, "image")]
    if lengths is not None:
        rows, recurrent = (tuple(arrays[n] for n in _numbered(arrays, kind)) for kind in ("rows", "recurrent"))
        vlm.hold(arrays["keys"], DecoderSnapshot(Snapshot(tuple(lengths), rows, recurrent), None, {}, 0))
    return messages, images


def _images(messages: list[dict[str, Any]]) -> list[EncodedImage]:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [e[e["type"]] for content in contents for e in content if e["type"] in ("image", "video")]


def _numbered(arrays: dict[str, np.ndarray], kind: str) -> list[str]:
    names = [f"{kind}/{i}" for i in range(len(arrays))]
    return [name for name in names if name in arrays]
