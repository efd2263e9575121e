"""Collection: samples run through the shipping runtime, and what every component was fed is kept on disk."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.data import Sample
from mllm_edge.calibration.findings import is_whole, save_arrays
from mllm_edge.errors import ContextError, DataError, ImageError
from mllm_edge.files import sync, write_whole
from mllm_edge.runtime.backends.base import Backend, Buffer, Session
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.prompt.sources import Video
from mllm_edge.runtime.vlm import VLM
from mllm_edge.spec import Variant, is_state

__all__ = [
    "Feeds",
    "answer_tokens",
    "answered_together",
    "is_recorded",
    "mark_recorded",
    "record",
]

_ANSWER_TOKENS = 64
_TOGETHER = 8  # samples that are asked before what they were fed is written
_CACHE_BYTES = 128 << 20  # of the decoder, while it answers several
_SHAPES = "state"  # of a decoder's state, in a file of what it was fed
_KEPT_BYTES = 64 << 20  # of what a component was fed


class Feeds:
    """What a component was fed, run by run, as files in `folder`. What is read is asked for again by every piece: as
    much of it as takes little memory stays there."""

    def __init__(self, folder: Path, chosen: Sequence[int] | None = None):
        """`chosen`: the numbers of some of the runs, which are all that it has then."""
        self.folder, self._chosen = folder, chosen
        self._kept: dict[int, dict[str, np.ndarray]] = {}
        self._room = _KEPT_BYTES

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.npz"))) if self._chosen is None else len(self._chosen)

    def spread(self, count: int) -> "Feeds":
        """So many of the runs, evenly spread; all where there are no more."""
        runs = len(self)
        return self if count >= runs else Feeds(self.folder, [i * runs // count for i in range(count)])

    def add(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Keep one run's inputs; of state, which is empty, only the shape."""
        kept = {name: array for name, array in feeds.items() if not is_state(name)}
        shapes = {name: (array.dtype.name, array.shape) for name, array in feeds.items() if is_state(name)}
        # In one entry: a file of a hundred takes milliseconds to open.
        kept[_SHAPES] = np.array(json.dumps(shapes))
        save_arrays(self.folder / f"{len(self):06d}.npz", kept, durable=False)

    def read(self, i: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The inputs called `names` of run i; not to be written to."""
        i = i if self._chosen is None else self._chosen[i]
        kept = self._kept.get(i)
        if kept is not None:
            return _chosen(kept, names)
        path = self.folder / f"{i:06d}.npz"
        with np.load(path) as data:
            if path.stat().st_size > self._room:
                return _chosen(data, names)
            self._kept[i], self._room = dict(data), self._room - path.stat().st_size
        return _chosen(self._kept[i], names)


def record(
    bundle: Bundle,
    backend: Backend,
    samples: Sequence[Sample],
    folder: Path,
    progress: Callable[[int], None] = lambda samples: None,
) -> None:
    """Run the samples and leave each component's inputs in `folder`/{component}; `progress(1)` after each sample.

    The decoder sees the prompt and the answer in one piece, from an empty cache; where a sample has no answer, the
    model's own greedy one. Raises DataError naming the sample that cannot be used.
    """
    recorder = _Recorder(backend, bundle, folder)
    with VLM(bundle, recorder) as vlm:
        for start in range(0, len(samples), _TOGETHER):
            recorder.decoder = False
            asked = [_ask(vlm, sample) for sample in samples[start : start + _TOGETHER]]
            answers = _answers(vlm, asked)
            recorder.decoder = True
            for one, answer in zip(asked, answers, strict=True):
                _write(vlm, one, answer)
                progress(1)


def mark_recorded(note: Path, folder: Path) -> None:
    """Write down, in `note`, that all samples are recorded in `folder`: what it names is on the disk."""
    files = sorted(folder.rglob("*.npz"))
    sync(files)
    write_whole(note, json.dumps([path.relative_to(folder).as_posix() for path in files]))


def is_recorded(note: Path, folder: Path) -> bool:
    """Whether `note` says that all samples are recorded in `folder`, and all of that is there and can be read."""
    try:
        names = json.loads(note.read_text(encoding="utf-8"))
        return all(is_whole(folder / name) for name in names)
    except (OSError, ValueError, TypeError):
        return False


def answer_tokens(vlm: VLM, sample: Sample) -> np.ndarray | None:
    """The ids of the sample's answer with the model's end, or None where it has none."""
    if sample.answer is None:
        return None
    ids = list(vlm.tokenizer.encode(sample.answer, add_special_tokens=False))
    return np.array([*ids, *sorted(vlm.stop_ids)[:1]], np.int64)


@dataclass(frozen=True, eq=False)
class _Asked:
    """A sample with its prompt as the decoder gets it, and its answer, if that is known. `room`: tokens that fit
    behind the prompt."""

    sample: Sample
    prompt: Encoded
    answer: np.ndarray | None
    room: int


@contextlib.contextmanager
def _naming(sample: Sample) -> Iterator[None]:
    """Say of which sample an error is."""
    try:
        yield
    except (ContextError, ImageError) as e:
        raise DataError(f"{sample.where}: {e.message}", e.fix) from e


def _ask(vlm: VLM, sample: Sample) -> _Asked:
    with _naming(sample):
        prompt = vlm.processor.process(sample.prompt, sample.images)
        encoded = vlm.encode(prompt)
        if sample.images and any(stage.shows == "video" for stage in vlm.spec.stages):
            # What runs for videos alone is shown the same pictures, as frames.
            vlm.encode(vlm.processor.process(sample.prompt, Video(sample.images)))
        room = vlm.context_length - len(encoded)
        return _Asked(sample, encoded, answer_tokens(vlm, sample), room)


def _answers(vlm: VLM, asked: Sequence[_Asked]) -> list[np.ndarray]:
    """Those that are known, and the model's own to the others."""
    found = {i: one.answer for i, one in enumerate(asked) if one.answer is not None}
    others = [i for i in range(len(asked)) if i not in found]
    together = answered_together(vlm, [asked[i].prompt for i in others], _ANSWER_TOKENS)
    found |= {others[n]: answer for n, answer in together.items()}
    for i, one in enumerate(asked):
        if i not in found:
            with _naming(one.sample):
                (found[i],) = vlm.greedy([one.prompt], min(_ANSWER_TOKENS, one.room))
    return [found[i] for i in range(len(asked))]


def answered_together(vlm: VLM, prompts: Sequence[Encoded], most: int) -> dict[int, np.ndarray]:
    """The model's own answers of up to `most` tokens, by the prompt's number: to several at once, of those that are
    plain and leave room for as many. The others are not among them."""
    alike = [i for i, prompt in enumerate(prompts) if prompt.is_plain and vlm.context_length - len(prompt) >= most]
    size = _batch(vlm, max((len(prompts[i]) for i in alike), default=0) + most)
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(alike), size):
        some = alike[start : start + size]
        found |= zip(some, vlm.greedy([prompts[i] for i in some], most), strict=True)
    return found


def _batch(vlm: VLM, tokens: int) -> int:
    """How many sequences of up to `tokens` tokens the decoder holds at once."""
    row = np.dtype(np.float32).itemsize * sum(spec.values(tokens) for spec in vlm.spec.state)
    return max(1, _CACHE_BYTES // max(1, row))


def _write(vlm: VLM, asked: _Asked, answer: np.ndarray) -> None:
    with _naming(asked.sample):
        answer = answer[: max(asked.room, 0)]
        # The rows that are projected are those that make the answer, and the one behind it: see `calibrate`.
        vlm.score(asked.prompt, np.append(answer, 0))


class _Recorder:
    """A backend whose sessions write down what they are fed."""

    def __init__(self, backend: Backend, bundle: Bundle, folder: Path):
        self.name, self.target, self._backend = backend.name, backend.target, backend
        self._components = {
            variant.file: name for name, c in bundle.manifest.components.items() for variant in c.variants
        }
        self._folder = folder
        self.decoder = False

    def open(self, path: Path, variant: Variant) -> Session:
        return _RecordingSession(self, self._components[variant.file], path, variant)

    def open_inner(self, path: Path, variant: Variant) -> Session:
        return self._backend.open(path, variant)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return self._backend.allocate(shape, dtype)

    def feeds(self, component: str) -> Feeds:
        return Feeds(self._folder / component)


class _RecordingSession:
    """Opens the graph when it first has to run: a decoder whose answers are all known never does."""

    limits: Mapping[str, int] = {}

    def __init__(self, recorder: _Recorder, component: str, path: Path, variant: Variant):
        self._recorder, self._component, self._path, self._variant = recorder, component, path, variant
        self._inner: Session | None = None
        self._bound: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._bound.update(inputs)
        self._outputs.update(outputs)
        if self._inner is not None:
            self._inner.bind(inputs, outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._bound.update(feeds)
        if self._component == "decoder" and self._recorder.decoder:
            self._recorder.feeds(self._component).add({n: _array(v) for n, v in self._bound.items()})
            if self._inner is not None:  # some are fed once, for all runs to come
                self._inner.bind(feeds, {})
            return {}
        if self._component != "decoder":
            self._recorder.feeds(self._component).add(feeds)
        if self._inner is None:
            self._inner = self._recorder.open_inner(self._path, self._variant)
            self._inner.bind({n: v for n, v in self._bound.items() if n not in feeds}, self._outputs)
        return self._inner.run(feeds)


def _array(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.array


def _chosen(kept: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays called `names`, state as zeros."""
    shapes = json.loads(str(kept[_SHAPES])) if any(map(is_state, names)) else {}
    zeros = {n: np.zeros(shapes[n][1], shapes[n][0]) for n in names if n in shapes}
    return {n: zeros[n] if n in zeros else kept[n] for n in names if n in zeros or n in kept}
