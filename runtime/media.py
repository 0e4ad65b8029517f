"""Where one image or clip ends and the next begins, also over several forward calls.

Placeholder tokens alone do not tell two images that stand side by side from one, nor an image that a prefill chunk cuts from a
complete one. The model's own encoders do: `get_image_features` and `get_video_features` return one tensor per image or clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .segments import IMAGE, TEXT, VIDEO, Run, Step, plain_step, runs_of

if TYPE_CHECKING:
    from .before_rope import BeforeRope
    from .token_selection import TokenSelector

MODALITIES = {"image": IMAGE, "video": VIDEO}
ENCODERS = {f"get_{name}_features": kind for name, kind in MODALITIES.items()}  # methods of a model's inner part, by what they encode


def encoded_lengths(output: Any, kind: int) -> list[int] | None:
    """Tokens of each image or clip that an encoder returned, in order of their placeholders; None where it does not say.

    A list has one [tokens, hidden] tensor each. One stacked tensor is one row per clip, but for images it may be one per tile, which
    says nothing about where an image ends.
    """
    features = getattr(output, "pooler_output", None)
    if isinstance(features, (list, tuple)) and all(isinstance(f, Tensor) and f.dim() >= 2 for f in features):
        return [f.numel() // f.shape[-1] for f in features]
    if isinstance(features, Tensor) and features.dim() == 3 and kind == VIDEO:
        return [features.shape[1]] * features.shape[0]
    return None


def encoded_features(output: Any) -> list[Tensor]:
    """What an encoder made of each image or clip, in order of their placeholders; empty where it does not say which is which."""
    features = getattr(output, "pooler_output", None)
    return list(features) if isinstance(features, (list, tuple)) and all(isinstance(f, Tensor) for f in features) else []


def features_of(encoded: Any) -> dict[int, list[Tensor]]:
    """As `encoded_features` for the argument `mm_encoder_outputs` of `forward`: modality -> encoder output."""
    return {kind: encoded_features(encoded.get(name)) for name, kind in MODALITIES.items()} if isinstance(encoded, Mapping) else {}


def lengths_of(encoded: Any) -> dict[int, list[int]]:
    """As `encoded_lengths` for the argument `mm_encoder_outputs` of `forward`: modality -> encoder output."""
    if not isinstance(encoded, Mapping):
        return {}
    found = {kind: encoded_lengths(encoded.get(name), kind) for name, kind in MODALITIES.items()}
    return {kind: lengths for kind, lengths in found.items() if lengths}


def at_text_positions(positions: Tensor | None, kinds: np.ndarray) -> bool:
    """Whether the images of a call stand where text would: all axes of M-RoPE count alike. None is so too: the model will count itself.

    Args:
        positions: [3 or 4, B, T]; the first of 4 is of text.
        kinds: int8 [B, T] as `read_kinds` has them.
    """
    media = torch.from_numpy(kinds > TEXT)
    if int(media.sum()) < 2:
        return False  # nothing, or an image of one token, whose axes are alike
    if positions is None or positions.dim() < 3:
        return True
    axes = positions[-3:].expand(-1, *kinds.shape)[:, media.to(positions.device)]
    return bool((axes == axes[:1]).all())


class Unsettled(Protocol):
    """A cache layer that has begun to code segments."""

    def settle(self) -> None:
        """Decide about them and store them; nothing to do if that was done before."""


class CallState:
    """What the forward call under way consists of, shared by all layers of one cache.

    `begin` says what is known before the call; encoders that run inside it `announce` lengths; the first layer that asks gets the
    `Step` made. Between calls it is remembered which rows are in the middle of an image.
    """

    def __init__(self, selector: TokenSelector | None = None, *, before_rope: bool = False) -> None:
        self.step: Step | None = None
        self.selector = selector
        self.keeps_features = selector is not None  # of the call under way, for a selector or for a recording
        self.features: dict[int, list[Tensor]] = {}  # by modality, what the encoder returned of each image
        # by layer, of the call under way; None where no coder and no recording asks
        self.before_rope: dict[int, BeforeRope] | None = {} if before_rope else None
        self.scaling = 1.0  # of the call's logits, where a handle was committed
        self.capturing = False  # the call is recorded, not run: layers count nothing (graphs.py)
        self.keeps_text = False  # nothing leaves the windows in this call (graphs.py)
        self._kinds: np.ndarray | None = None
        self._shape: tuple[int, int] | None = None
        self._lengths: dict[int, list[int]] = {}  # of this call
        self._chunked = False
        self._coming: dict[int, list[int]] = {}  # tokens still to come of images and clips that arrive in chunks, the first ones first
        self._open: dict[int, int] = {}  # row -> kind of the medium it is in the middle of
        self._started: set[int] = set()  # kinds whose first entry of `_coming` has begun
        self._unsettled: list[Unsettled] = []

    def expect(self, lengths: dict[int, list[int]], chunked: bool) -> None:
        """A prompt will arrive, in chunks or not, with media of these lengths; those of a chunk's own encoder output are pieces then."""
        self._chunked = chunked
        self._coming = {kind: list(tokens) for kind, tokens in lengths.items()} if chunked else {}
        self._started = set()

    def begin(self, shape: tuple[int, int], kinds: np.ndarray | None, lengths: dict[int, list[int]]) -> None:
        """A call of `shape` (B, T) begins; kinds int8 [B, T] as `read_kinds` has them."""
        self.keeps_text = False
        self._shape, self._kinds, self._lengths, self.step = shape, kinds, {} if self._chunked else dict(lengths), None
        self.features = {}
        self._forget_before()

    def announce(self, kind: int, lengths: list[int]) -> None:
        """An encoder ran inside the call."""
        self._lengths[kind] = lengths

    def show(self, features: dict[int, list[Tensor]]) -> None:
        """What an encoder made of the call's images, for those who look at it; in chunks it is not known which image a piece is of."""
        if self.keeps_features and not self._chunked:
            self.features |= features

    def later(self, layer: Unsettled) -> None:
        """A layer has begun to code this call's segments. It settles once the next layer has begun, so that no device has to wait."""
        waiting, self._unsettled = self._unsettled, [layer]
        for other in waiting:
            other.settle()

    def settle(self) -> None:
        """Settle what is left, the last layer as a rule."""
        waiting, self._unsettled = self._unsettled, []
        for layer in waiting:
            layer.settle()

    def end(self) -> None:
        """The call is over."""
        self.settle()
        if self.selector is not None:
            self.selector.end({*self._open, *(self.step.unfinished if self.step is not None else ())})
        self._shape = self._kinds = self.step = None
        self._lengths, self.features = {}, {}
        self._forget_before()

    def _forget_before(self) -> None:
        if self.before_rope:
            self.before_rope = {}

    def of(self, batch: int, length: int) -> Step:
        """The step of the call under way.

        Raises:
            RuntimeError: nobody announced the call; images cannot be told from text then.
        """
        if self.step is None and self._shape == (batch, length):
            self.step = self._make()
        if self.step is not None and (self.step.batch, self.step.length) == (batch, length):
            return self.step
        if length == 1:
            return plain_step(batch, length)
        raise RuntimeError(
            "a RotateKCache was used outside of rotatek_compile.enable(): token kinds are unknown; "
            "call the model inside `with enable(...)`, or use a model from rotatek_compile.load()"
        )

    def select_rows(self, rows: Iterable[int]) -> None:
        """Rows were repeated, dropped or reordered."""
        rows = list(rows)
        self._open = {new: self._open[old] for new, old in enumerate(rows) if old in self._open}
        if self.selector is not None:
            self.selector.select_rows(rows)

    # -- making the step ------------------------------------------------------------------------------------------------------

    def _make(self) -> Step:
        assert self._shape is not None
        batch, length = self._shape
        if self._kinds is None and not self._open:
            return plain_step(batch, length)
        kinds = self._kinds if self._kinds is not None else np.zeros(self._shape, np.int8)
        if self._coming and batch == 1:
            if all(sum(self._coming.get(kind, ())) >= (kinds == kind).sum() for kind in (IMAGE, VIDEO)):
                return self._chunk(kinds)
            self._coming = {}  # not the lengths of these placeholders
        media = self._told_apart(kinds)
        rows = tuple(runs_of(row, None if media is None else media[b]) for b, row in enumerate(kinds))
        going_on = frozenset(row for row, kind in self._open.items() if rows[row] and rows[row][0].kind == kind)
        self._open = {}
        if media is None:  # an image that the call ends with may go on in the next one
            self.features = {}  # of which image each is is not known
            ends = {b: row[-1] for b, row in enumerate(rows) if row}
            self._open = {b: run.kind for b, run in ends.items() if run.kind > TEXT and run.end == length}
        return Step(batch, length, rows, going_on, frozenset(self._open))

    def _told_apart(self, kinds: np.ndarray) -> np.ndarray | None:
        """Number of the image or clip of every token [B, T], from this call's lengths; None where they do not fit its tokens."""
        if self._open:
            return None
        media = np.full(kinds.shape, -1)
        first = 0
        for kind in (IMAGE, VIDEO):
            places = np.flatnonzero(kinds == kind)
            lengths = self._lengths.get(kind, [])
            if not places.size:
                continue
            if sum(lengths) != places.size:
                return None
            ends = np.cumsum(lengths)
            row_of = places // kinds.shape[1]
            if any(row_of[end - n] != row_of[end - 1] for end, n in zip(ends, lengths, strict=True) if n):
                return None  # an image does not go on in the next row, so these are not the lengths of its placeholders
            media.flat[places] = first + np.repeat(np.arange(len(lengths)), lengths)
            first += len(lengths)
        return media

    def _chunk(self, kinds: np.ndarray) -> Step:
        """One row, whose media were told beforehand and arrive piece by piece."""
        row, media, number = kinds[0], np.full(kinds.shape[1], -1), 0
        going_on = bool(self._open)
        current: dict[int, int] = {}
        for place in np.flatnonzero(row > TEXT):
            kind = int(row[place])
            queue = self._coming[kind]
            if kind not in current:
                current[kind], number = number, number + 1
            media[place] = current[kind]
            queue[0] -= 1
            self._started.add(kind)
            if queue[0] == 0:
                queue.pop(0)
                self._started.discard(kind)
                del current[kind]
        self._open = {0: max(self._started)} if self._started else {}
        if not any(self._coming.values()):
            self._coming = {}
        runs: tuple[Run, ...] = runs_of(row, media)
        return Step(1, len(row), (runs,), frozenset({0} if going_on else ()), frozenset(self._open))
