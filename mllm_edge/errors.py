"""Every error that mllm-edge raises on purpose.

```
MllmEdgeError
├── SourceError        a checkpoint that cannot be read (also ValueError)
│   ├── UnsupportedModelError   no family handles this architecture
│   ├── ConfigError             a config value that nobody handles
│   └── WeightsError            missing, unused, truncated or misshapen weights
├── ExportError        the export itself failed
│   ├── ParityError             the exported graphs disagree with the source model
│   ├── RecipeError             a recipe that cannot be read or names what the model does not have (also ValueError)
│   ├── AccuracyError           a quantized bundle loses more than was allowed
│   └── LockedError             another process works on the same directory
├── WriteError         a file that cannot be written: no space, no permission (also OSError)
├── BundleError        not a bundle, damaged, or made by a newer version (also ValueError)
├── DataError          calibration data that cannot be read (also ValueError)
├── ImageError         an image that cannot be decoded (also ValueError)
├── PromptError        messages, images and placeholders that do not fit together (also ValueError)
├── OptionError        an option of the wrong type or out of its range (also ValueError)
├── ContextError       more tokens than the context holds (also ValueError)
├── BackendError       a runtime that is missing or refuses a graph (also RuntimeError)
├── BusyError          a call that would have to wait for another one, and may not or cannot (also RuntimeError)
├── GivenUpError       an answer that a later call of its thread ended (also RuntimeError)
├── CancelledError     a call that its `Cancel` ended (also RuntimeError)
├── TimedOutError      a call that was not done in its time (also TimeoutError)
└── ClosedError        a model that was closed, before or during a call (also RuntimeError)
```

A message says what is wrong and where; `fix` holds the command or option that helps.
"""

__all__ = [
    "AccuracyError",
    "BackendError",
    "BundleError",
    "BusyError",
    "CancelledError",
    "ClosedError",
    "ConfigError",
    "ContextError",
    "DataError",
    "ExportError",
    "GivenUpError",
    "ImageError",
    "LockedError",
    "MllmEdgeError",
    "OptionError",
    "ParityError",
    "PromptError",
    "RecipeError",
    "SourceError",
    "TimedOutError",
    "UnsupportedModelError",
    "WeightsError",
    "WriteError",
]


class MllmEdgeError(Exception):
    """Base of all errors of this package; `fix` is one line that tells the user what to do."""

    def __init__(self, message: str, fix: str = ""):
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class SourceError(MllmEdgeError, ValueError):
    """A checkpoint directory or hub id that cannot be read."""


class UnsupportedModelError(SourceError):
    """No family handles this architecture."""


class ConfigError(SourceError):
    """A value in the checkpoint's configuration that no code handles."""


class WeightsError(SourceError):
    """Weights that are missing, unused, truncated or of the wrong shape."""


class ExportError(MllmEdgeError):
    """The export could not be finished; nothing was written."""


class ParityError(ExportError):
    """The exported graphs disagree with the source model beyond the tolerance."""


class RecipeError(ExportError, ValueError):
    """A recipe that cannot be read, or that names layers the model does not have."""


class AccuracyError(ExportError):
    """A quantized bundle loses more accuracy than was allowed."""


class LockedError(ExportError):
    """Another process works on the same directory."""


class WriteError(MllmEdgeError, OSError):
    """A file that cannot be written: no space, no permission, no such folder."""


class BundleError(MllmEdgeError, ValueError):
    """A directory that is no bundle, a damaged one, or one from a newer version."""


class DataError(MllmEdgeError, ValueError):
    """Calibration data that cannot be read or is too little."""


class ImageError(MllmEdgeError, ValueError):
    """An image that cannot be opened or decoded."""


class PromptError(MllmEdgeError, ValueError):
    """Messages, images and image placeholders that do not fit together."""


class OptionError(MllmEdgeError, ValueError):
    """An option of the wrong type, or outside its range."""


class ContextError(MllmEdgeError, ValueError):
    """Prompt, image tokens and answer together exceed the context."""


class BackendError(MllmEdgeError, RuntimeError):
    """A runtime that is not installed or refuses a graph."""


class BusyError(MllmEdgeError, RuntimeError):
    """A call that would have to wait for another one of the same model, and may not (`wait=False`) or cannot."""


class GivenUpError(MllmEdgeError, RuntimeError):
    """An unfinished answer that ended because its thread began another call."""


class CancelledError(MllmEdgeError, RuntimeError):
    """A call that was ended by the `Cancel` it was given."""


class TimedOutError(MllmEdgeError, TimeoutError):
    """A call that was not done within the `timeout` it was given, and has no part of a result to show."""


class ClosedError(MllmEdgeError, RuntimeError):
    """A call on a model that was closed, before the call or during it."""
