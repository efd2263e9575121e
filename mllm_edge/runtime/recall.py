"""What a model remembers between calls: features of images, and beginnings of prompts in the decoder's cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.prefix import Prefixes
from mllm_edge.runtime.encode import Components, assembled, looked_at, spans_of
from mllm_edge.runtime.encoded_image import FeatureCache
from mllm_edge.runtime.prompt.processor import Prompt
from mllm_edge.runtime.prompt.shown import Shown
from mllm_edge.runtime.trace import Trace

__all__ = ["PREFIX_CACHE", "Recall", "Reused"]

PREFIX_CACHE = 128 << 20  # bytes of snapshots, where a caller does not say otherwise


class Recall:
    """Encodes prompts, and knows what of them need not be looked at or run again."""

    def __init__(
        self,
        components: Components,
        arrays: Mapping[str, np.ndarray],
        embed: Callable[[np.ndarray], np.ndarray],
        decoder: Decoder,
        image_cache: int,
        prefix_cache: int,
    ):
        """`image_cache`, `prefix_cache`: bytes; the rest as for `encoded`."""
        self._components, self._arrays, self._embed = components, arrays, embed
        self._features = FeatureCache(image_cache)
        self._crossed: tuple[tuple[int, ...], Mapping[str, np.ndarray]] = ((), {})
        self.prefixes = Prefixes(decoder, components.model, prefix_cache)

    def look(self, shown: Shown, trace: Trace) -> Shown:
        """An image with the features that the stages make of it, without its pixels. Where the stages get the text of
        a prompt, too, the pixels stay, and the features are left for later."""
        image = self._components.model.image
        if shown.features is not None:
            return shown
        if image is not None and image.text is not None:
            return replace(shown, known=shown.key)
        (rows,) = looked_at(self._components, Prompt.of(shown), self._arrays, trace)
        return replace(shown, inputs=None, features=rows, known=shown.key)

    def encode(self, prompt: Prompt, trace: Trace) -> Encoded:
        """All that a prompt is to the decoder."""
        return self._encode(self._known(prompt), trace, 0)

    def reused(self, prompt: Prompt, trace: Trace) -> "Reused":
        """The same, with what the decoder holds of it, whose images are not looked at."""
        prompt, image, keys = self._known(prompt), self._components.model.image, prompt.keys
        end = len(keys) if prompt.positions is None else int(prompt.positions.max()) + 1
        count, shown = self.prefixes.usable(keys, spans_of(image, prompt), end), tuple(o.key for o in prompt.shown)
        crossing = image is not None and image.into == "cross_attention"
        cross = self._crossed[1] if crossing and shown and self._crossed[0] == shown else None
        whole = self._encode(prompt, trace, 0 if crossing and cross is None else count, cross)
        if crossing and shown:
            self._crossed = shown, whole.cross
        return Reused(self.prefixes, whole, keys, count, _last_image(prompt))

    def _encode(
        self, prompt: Prompt, trace: Trace, held: int, cross: Mapping[str, np.ndarray] | None = None
    ) -> Encoded:
        ends = np.cumsum([layout.tokens for layout in prompt.layouts])
        left_out = [i for i, end in enumerate(ends.tolist()) if prompt.image_positions[end - 1] < held]
        found = looked_at(self._components, prompt, self._arrays, trace, left_out=left_out)
        for one, rows in zip(prompt.shown, found, strict=True):
            if rows and one.features is None and not prompt.texts:
                self._features.put(one, rows)
        return assembled(self._components, prompt, found, self._embed, self._arrays, trace, cross=cross)

    def _known(self, prompt: Prompt) -> Prompt:
        """With the features of images that were seen before."""
        if not self._features.budget or prompt.texts:
            return prompt
        return replace(prompt, shown=tuple(map(self._recalled, prompt.shown)))

    def _recalled(self, shown: Shown) -> Shown:
        rows = None if shown.features is not None else self._features.get(shown)
        return shown if rows is None else replace(shown, features=rows, known=shown.key)


def _last_image(prompt: Prompt) -> int:
    """How many tokens there are up to the end of the last image."""
    return int(prompt.image_positions[-1]) + 1 if len(prompt.image_positions) else 0


class Reused:
    """An encoded prompt of which the decoder holds the first `count` tokens."""

    def __init__(self, prefixes: Prefixes, encoded: Encoded, keys: np.ndarray, count: int, last_image: int):
        """`keys`: see `Prompt.keys`; `last_image`: how many tokens there are up to the end of the last image."""
        self._prefixes, self._keys, self._last_image = prefixes, keys, last_image
        self.encoded, self.count = encoded, count

    def resume(self, room: int) -> None:
        """Make the decoder hold them, and have room for the prompt and `room` tokens more."""
        self._prefixes.resume(self._keys, self.count, self.encoded, room)

    @property
    def pieces(self) -> Sequence[slice]:
        """What is left to run: in two parts, where state cannot be rewound and the last image ends within it."""
        stops = [self.count, len(self._keys)]
        if not self._prefixes.rewindable and self.count < self._last_image < len(self._keys):
            stops.insert(1, self._last_image)
        return [slice(start, stop) for start, stop in pairwise(stops)]

    def ran(self, stop: int | None = None) -> None:
        """The prompt's first `stop` tokens have been run, or all. Where state cannot be rewound they are kept."""
        self._prefixes.hold(self._keys[:stop])
        if not self._prefixes.rewindable:
            self._prefixes.keep()

    def held(self, ids: Sequence[int]) -> None:
        """The answer has these `ids` so far; the cache holds as many of them and the prompt as it has places filled."""
        self._prefixes.hold(np.concatenate([self._keys, np.array(ids, np.int64)]))
