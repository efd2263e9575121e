"""The command `mllm-edge`: one verb, one module, imported only when that verb is asked for."""

import difflib
import errno
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

try:
    import click

    from mllm_edge import __version__
    from mllm_edge.cli.output import note
    from mllm_edge.cli.signals import Interrupted, interrupted_message, was_interrupted
    from mllm_edge.errors import MllmEdgeError, OptionError
except KeyboardInterrupt:  # there is no command yet that could say it
    sys.stderr.write("interrupted: the command was stopped\n")
    sys.exit(130)

__all__ = ["VERBS", "main"]

_STOPPED = interrupted_message("the command")
# Repeated here so that the overview imports no verb; a test compares them with the verbs' own help.
VERBS = {
    "export": "Export a checkpoint to a bundle.",
    "quantize": "Quantize a bundle with calibration data.",
    "build": "Build a bundle's TensorRT engines.",
    "run": "Ask a bundle a question about images and videos.",
    "chat": "Talk with a bundle about images and videos.",
    "inspect": "Show what is in a bundle.",
    "profile": "Measure latency, throughput and memory.",
    "compare": "Compare two bundles, or a bundle and its source.",
    "doctor": "Tell which targets work here, or whether a checkpoint exports.",
    "families": "List the models that can be exported.",
    "completion": "Print the completion script of a shell.",
}


class _Notes(logging.Handler):
    """Warnings as plain lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


_NOTES = _Notes()


class _Failure(click.ClickException):
    """An error that is told in two lines: what is wrong, and what to do."""

    def __init__(self, message: str, fix: str = ""):
        super().__init__(message)
        self._fix = fix

    def show(self, file: Any = None) -> None:
        note(f"error: {self.message}")
        if self._fix:
            note(f"  fix: {self._fix}")


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in VERBS and not name.startswith("-"):
            near = difflib.get_close_matches(name, VERBS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(VERBS)}"
            ctx.fail(f"no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        logger = logging.getLogger("mllm_edge")
        logger.setLevel(logging.WARNING)
        logger.addHandler(_NOTES)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # an answer may hold characters that an old locale cannot write
                stream.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except Interrupted as e:
            note(e.message)
            ctx.exit(e.exit_code)
        except KeyboardInterrupt:
            note(_STOPPED)
            ctx.exit(130)
        except Exception as e:
            if was_interrupted(e):  # a library made another error of it, mostly while it was imported
                note(_STOPPED)
                ctx.exit(130)
            return self._tell(ctx, e)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _ending():
            return super().make_context(*args, **extra)

    def _main_shell_completion(self, *args: Any, **extra: Any) -> None:
        with _ending():
            super()._main_shell_completion(*args, **extra)

    def _tell(self, ctx: click.Context, error: Exception) -> NoReturn:
        """Raise the error as a user is told of it."""
        try:
            raise error
        except OptionError as e:
            if ctx.params["debug"]:
                raise
            raise click.UsageError(e.message) from e
        except MllmEdgeError as e:
            if ctx.params["debug"]:
                raise
            raise _Failure(e.message, e.fix) from e
        except MemoryError as e:
            if ctx.params["debug"]:
                raise
            raise _Failure(str(e) or "not enough memory", "close other programs, or use a smaller model") from e
        except OSError as e:
            if ctx.params["debug"] or e.errno == errno.EPIPE:  # a closed pipe ends the command quietly, in click
                raise
            raise _Failure(f"{e.filename}: {e.strerror}" if e.filename else str(e)) from e


@contextmanager
def _ending() -> Iterator[None]:
    """Ctrl-C ends what click does before the command as it ends the command."""
    try:
        yield
    except KeyboardInterrupt:
        note(_STOPPED)
        sys.exit(130)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="mllm-edge")
@click.option("--debug", is_flag=True, envvar="MLLM_EDGE_DEBUG", help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Vision-language models on edge devices: export a checkpoint to a bundle, run it without torch.

    Answers go to standard output, everything else to standard error.
    """
