"""What is not a library's own error stays what it is: memory, Ctrl-C, the caller's exceptions."""

import contextlib
import importlib
import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from mllm_edge import VLM
from mllm_edge.errors import BackendError, ImageError
from mllm_edge.runtime.backends import installed
from mllm_edge.runtime.backends.onnxruntime_cpu import import_onnxruntime
from mllm_edge.runtime.foreign import pass_on
from mllm_edge.runtime.prompt.image import load_image

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs POSIX signals")


class Deadline(Exception):
    """The caller's own."""


class Late(ValueError):
    """The caller's own, of a kind that decoders raise as well."""


ERRORS = [Deadline, Late, TimeoutError, ValueError, OSError, RuntimeError, KeyboardInterrupt, ImportError, TypeError]


@contextmanager
def handler(error: type[BaseException], kind: str = "function") -> Iterator[None]:
    def fail(number: int, frame: FrameType | None) -> None:
        raise error("by a signal")

    class Handler:
        def __call__(self, *arguments: Any) -> None:
            raise error("by a signal")

    made = {"function": fail, "partial": partial(lambda _, *given: fail(*given), 0), "object": Handler()}[kind]
    before = signal.signal(signal.SIGALRM, made)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


@contextmanager
def alarm_at(matches: Callable[[FrameType], bool]) -> Iterator[None]:
    """A signal arrives when such a function begins."""

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and matches(frame):
            sys.setprofile(None)
            signal.raise_signal(signal.SIGALRM)

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("function", ["open", "load", "load_prepare", "getexif"])
def test_a_signal_while_an_image_is_decoded(error: type[BaseException], function: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png())
    for source in (path, path.read_bytes()):

        def there(frame: FrameType) -> bool:
            return frame.f_code.co_name == function and frame.f_globals["__name__"].startswith("PIL")

        with handler(error), pytest.raises(error, match="by a signal") as caught, alarm_at(there):
            load_image(source)
        assert type(caught.value) is error


@pytest.mark.parametrize("error", [Deadline, Late, TimeoutError, MemoryError])
@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_file_of_the_callers_own_that_fails(error: type[Exception], after: int) -> None:
    class File(io.BytesIO):
        left = after

        def read(self, *count: Any) -> bytes:
            self.left -= 1
            if self.left < 0:
                raise error("of the file")
            return super().read(*count)

    with pytest.raises(error, match="of the file"):
        load_image(File(png()))


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
def test_memory_that_is_used_up(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any) -> None:
        raise error

    # As if it came from Pillow itself.
    code = "def load(self):\n    raise error"
    space: dict[str, Any] = {"error": error, "__name__": "PIL.ImageFile"}
    exec(code, space)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", space["load"])
    with pytest.raises(MemoryError, match="not enough memory to decode the image"):
        load_image(png())


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_warning_that_was_made_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(ImageError, match="too large"):
        load_image(png())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_mutated_images_raise_image_errors_alone(kind: str) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png((24, 24)))).save(buffer, kind)
    data, random = buffer.getvalue(), np.random.default_rng(1)
    for _ in range(130):
        broken = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 8)):
            broken[place] = random.integers(256)
        if random.random() < 0.3:
            del broken[int(random.integers(len(broken))) :]
        with contextlib.suppress(ImageError):
            assert load_image(bytes(broken)).mode == "RGB"


def test_a_truncated_image_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="truncated or damaged"):
        load_image(png()[:1000])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


# ---------------------------------------------------------------- imports and sessions
@pytest.mark.parametrize("kind", ["function", "partial", "object"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("error", [*ERRORS, ModuleNotFoundError])
def test_a_signal_while_an_engine_is_imported(
    error: type[BaseException], wrapped: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "import signal\nsignal.raise_signal(signal.SIGALRM)\n"
    if wrapped:  # as pybind11 does it
        body = f"try:\n    {body.splitlines()[0]}; {body.splitlines()[1]}\nexcept BaseException as e:\n"
        body += "    raise ImportError('initialization failed') from e\n"
    (tmp_path / "engine_stand_in.py").write_text(body)
    (tmp_path / "onnxruntime.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    for work in (lambda: installed._probe("engine_stand_in"), lambda: import_onnxruntime("pip install it")):
        with handler(error, kind), pytest.raises(error, match="by a signal") as caught:
            work()
        assert type(caught.value) is error


def test_an_engine_that_is_broken_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine_stand_in.py").write_text("raise RuntimeError('no driver')")
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libfoo.so')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    try:
        raise Deadline  # what is being handled already has nothing to do with it
    except Deadline:
        engine = installed._probe("engine_stand_in")
        assert engine is not None
        assert engine.problem == "no driver"
        with pytest.raises(BackendError, match=r"libfoo\.so"):
            import_onnxruntime("pip install it")


@pytest.mark.parametrize("error", [Deadline, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("function", ["run_with_iobinding", "render", "push", "__init__"])
def test_a_signal_within_a_call(tiny_bundle: Path, error: type[BaseException], function: str) -> None:
    libraries = ("onnxruntime", "jinja2", "mllm_edge.runtime.prompt.tokenizer")
    with VLM.load(tiny_bundle) as vlm:
        expected = vlm.generate("Hi", max_new_tokens=4).token_ids

        def there(frame: FrameType) -> bool:
            return frame.f_code.co_name == function and frame.f_globals["__name__"].startswith(libraries)

        def work() -> None:
            vlm.generate("Hi", max_new_tokens=4)
            VLM.load(tiny_bundle)

        with handler(error), pytest.raises(error, match="by a signal"), alarm_at(there):
            work()
        assert vlm.generate("Hi", max_new_tokens=4).token_ids == expected


def test_what_is_passed_on() -> None:
    for error in (MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            pass_on(error)
    try:
        importlib.import_module("nothing_of_this_name")
    except ImportError as e:
        pass_on(e)


@pytest.mark.parametrize(("path", "own"), [("av/container/core.py", True), ("camera/grab.py", False)])
def test_compiled_modules_are_known_by_their_paths(path: str, own: bool) -> None:
    """Frames of Cython have no module's name."""
    code = compile("def read():\n    raise ValueError('no such data')\n", path, "exec")
    scope: dict[str, Any] = {}
    exec(code, scope)
    with pytest.raises(ValueError, match="no such data") as caught:
        scope["read"]()
    trace = caught.value.__traceback__
    assert trace is not None
    error = caught.value.with_traceback(trace.tb_next)  # without this file's
    with contextlib.nullcontext() if own else pytest.raises(ValueError, match="no such data"):
        pass_on(error, "av")
