"""Decoding steps captured in CUDA graphs: at small batches the host takes longer to launch a step than the GPU to run it.

Between two changes of a cache's structure (windows grow, text leaves them, rows are selected, images arrive) a step of one token per row
does the same launches every time; only lengths differ, and these are on the device. So such a step is captured once and replayed; it reads
nothing on the host. Windows get room for a stretch of tokens first, and keep their text; when it is used up they get more while one step
runs as usual, after another one in which text that is to be coded leaves them, and the next stretch is captured.

Considered and left: pools, tables and work lists of fixed size, so that one graph lasts for ever, which would read padding in every step
and allocate for the longest answer; and `torch.compile`, which would compile anew for every model.

A model may have put something on the host into its launches, a position for instance. So the first replay that has moved on by a token is
compared with an ordinary step: where they differ, nothing is captured any more, and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from .cache_layer import RotateKLayer
from .recorder import CudaRecorder, Recorder

if TYPE_CHECKING:
    from .cache import RotateKCache

STRETCH, LEAST_STRETCH = 256, 32
"""Most and fewest tokens that windows get room for at a capture: an eighth of what the cache holds, for room costs memory."""
STEADY = 6  # steps of the same rows before a cache is taken for decoding: a capture takes about as long as ten, and answers may be short
SAME = 1e-3  # largest difference of logits, over the largest logit, that still is the same step

COPIED = ("input_ids", "position_ids", "cache_position", "mm_token_type_ids")  # tensors of one token per row, written before a replay
UNREAD = ("attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "image_sizes")
"""Arguments that a step over a compressed cache does not read, given positions: padding is not stored, and images are not new."""


@dataclass(frozen=True, slots=True)
class Call:
    """A forward call that could be captured.

    static: tensors that change from step to step. kept: settings. given: all arguments as they came.
    """

    cache: RotateKCache
    layers: list[RotateKLayer]
    forward: Callable[..., Any]
    given: Mapping[str, Any]
    static: dict[str, Tensor]
    kept: dict[str, Any]

    @classmethod
    def of(cls, cache: RotateKCache, forward: Callable[..., Any], given: Mapping[str, Any]) -> Call | None:
        """None where something in its arguments or its cache has to be read on the host."""
        parts, layers = _divided(given), _capturable(cache)
        return None if parts is None or layers is None else cls(cache, layers, forward, given, *parts)

    @property
    def structure(self) -> list[int | None]:
        """Of the layers' stores."""
        return [layer.segments.store.structure for layer in self.layers]

    @property
    def selected(self) -> list[int]:
        """How often the rows of each layer were selected: beams do so after every step."""
        return [layer.segments.store.selected for layer in self.layers]


def _divided(given: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors that change from step to step, and settings; without positions a model would count them on the host."""
    static: dict[str, Tensor] = {}
    kept: dict[str, Any] = {}
    for name, value in given.items():
        if name == "past_key_values" or value is None or (isinstance(value, dict) and not value):
            continue
        if name == "return_dict" and not value:
            return None  # a tuple has no names
        if name in COPIED and isinstance(value, Tensor) and value.shape[-1] == 1:
            static[name] = value
        elif name in UNREAD:
            continue
        elif isinstance(value, (bool, int)) and not name.startswith("output_"):
            kept[name] = value
        elif value is not False:
            return None
    return (static, kept) if {"input_ids", "position_ids"} <= set(static) else None


def _capturable(cache: RotateKCache) -> list[RotateKLayer] | None:
    """The layers of a cache whose steps need nothing from the host; None where some do."""
    layers = [layer for layer in cache.layers if isinstance(layer, RotateKLayer)]
    if len(layers) != len(cache.layers) or not all(layer.is_initialized and layer.backend.captures for layer in layers):
        return None
    first = layers[0].segments.store.device
    if any(layer.segments.begun or any(layer.segments.store.held) or layer.segments.store.device != first for layer in layers):
        return None
    return layers


@dataclass(slots=True)
class Captured:
    """One captured step of a cache."""

    recorder: Recorder
    static: dict[str, Tensor]  # what the step reads
    kept: dict[str, Any]  # its other arguments
    structure: list[int | None]  # of the layers' stores
    kind: type[ModelOutput]
    output: dict[str, Any]  # what it returns; None for the cache, which must not be kept alive by what is kept for it
    replays: int = 0

    def fits(self, call: Call) -> bool:
        """Whether this is that call's step: the same structure, shapes and settings, and room in the windows."""
        return self._is_of(call) and not self._no_room(call)

    def is_full(self, call: Call) -> bool:
        """Whether it would be that call's step if there were room in the windows."""
        return self._is_of(call) and self._no_room(call)

    def _is_of(self, call: Call) -> bool:
        shapes, before = ({name: (x.shape, x.dtype) for name, x in some.items()} for some in (call.static, self.static))
        return call.kept == self.kept and shapes == before and call.structure == self.structure

    def _no_room(self, call: Call) -> bool:
        window = call.layers[0].segments.store.window
        return bool(window.host.max() >= window.keys.shape[2])


@dataclass(slots=True)
class History:
    """What is known of a cache's last steps."""

    selected: list[int] = field(default_factory=list)
    steady: int = 0
    structure: list[int | None] = field(default_factory=list)  # once windows have room
    lengths: Tensor | None = None  # int32 [layers, B and more], likewise: the lengths of all of them
    captured: Captured | None = None
    earlier: Any = None  # the recorder of the last stretch


class DecodeGraphs:
    """Captured decoding of one enabled model; every cache has its own.

    Args:
        recorder: makes a `Recorder` on a device, given the one that it takes the place of.
    """

    def __init__(self, recorder: Callable[[torch.device, Any], Recorder] = CudaRecorder) -> None:
        self.recorder = recorder
        self.off = False
        self.compared = False
        self.no_room: WeakSet[RotateKCache] = WeakSet()
        self.histories: WeakKeyDictionary[RotateKCache, History] = WeakKeyDictionary()

    def step(self, cache: RotateKCache, forward: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """The model's output for one token of text per row, or None where the step has to run as usual.

        Args:
            forward: the model's own, called with keywords only.
            given: its arguments.
        """
        call = None if self.off or cache in self.no_room or torch.is_grad_enabled() else Call.of(cache, forward, given)
        if call is None:
            self.forget(cache)
            return None
        history = self.histories.setdefault(cache, History())
        if history.captured is not None:
            if history.captured.fits(call):
                return self._replayed(history.captured, call)
            # as a rule the room is used up: where text stays in the windows they get more at once, else this step runs as usual, and
            # text leaves them
            stays = history.captured.is_full(call) and all(layer.text_stays() for layer in call.layers)
            self.histories[cache] = history = History(call.selected, STEADY - 1, earlier=history.captured.recorder)
            if not stays:
                return None
        if (selected := call.selected) != history.selected or (history.lengths is not None and history.structure != call.structure):
            self.histories[cache] = History(selected, earlier=history.earlier)
            return None
        history.steady += 1
        if history.steady < STEADY:
            return None
        if history.lengths is None:  # this step runs as usual in the larger windows, so that every kernel is there when it is captured
            try:
                history.lengths = _reserve(call.layers)
            except torch.OutOfMemoryError:
                self.no_room.add(cache)
                self._say("there is no memory for more raw text in every row of this cache")
                return None
            history.structure = call.structure
            cache.state.keeps_text = True
            return None
        return self._captured(history, call)

    def forget(self, cache: RotateKCache) -> None:
        """A new turn comes: adapters may have been changed before it, so the next stretch is captured anew."""
        self.histories.pop(cache, None)

    def _captured(self, history: History, call: Call) -> Any:
        """Capture this step and run it."""
        recorder = self.recorder(call.layers[0].segments.store.device, history.earlier)
        inputs = {name: x.clone() for name, x in call.static.items()}
        lengths = history.lengths
        assert lengths is not None

        def step() -> Any:
            lengths.add_(1)
            return call.forward(**inputs, **call.kept, past_key_values=call.cache)

        try:
            with _capturing(call.cache):
                output = recorder.record(step)
        except RuntimeError as error:
            self._turn_off(f"this model's step cannot be captured in a CUDA graph ({(str(error) or repr(error)).splitlines()[0]})")
            return None
        # a tuple, or hidden states, if the config asks for them
        if not isinstance(output, ModelOutput) or any(isinstance(part, (tuple, list)) for part in output.values()):
            self._turn_off("this model's step returns more than logits by name")
            return None
        parts = {name: None if part is call.cache else part for name, part in output.items()}
        history.captured, history.earlier = Captured(recorder, inputs, call.kept, history.structure, type(output), parts), None
        return self._replayed(history.captured, call)

    def _replayed(self, done: Captured, call: Call) -> Any:
        for name, x in call.static.items():
            done.static[name].copy_(x)
        done.recorder.replay()
        done.replays += 1
        for layer in call.layers:
            layer.advance(1)
        parts = {name: x.clone() if isinstance(x, Tensor) else x for name, x in done.output.items()}
        output: Any = done.kind(**{name: call.cache if name == "past_key_values" else part for name, part in parts.items()})
        if self.compared or done.replays < 2:
            return output
        for layer in call.layers:
            layer.crop(-1)
        call.cache.state.keeps_text = True
        usual = call.forward(**call.given)
        self.compared = True
        if not _same(output.logits, usual.logits):
            self._turn_off("a captured step of this model differs from an ordinary one")
            self.forget(call.cache)
        return usual

    def _turn_off(self, reason: str) -> None:
        self.off = True
        self._say(reason)

    def _say(self, reason: str) -> None:
        warnings.warn(f"decoding without CUDA graphs, which is slower at small batches: {reason}", stacklevel=5)


def _same(got: Tensor, usual: Tensor) -> bool:
    """Whether logits are those of the same step; some may be infinite, of tokens that never come."""
    finite = usual.isfinite()
    difference = (got - usual).masked_fill(~finite, 0.0).abs().max()
    return bool((got.isfinite() == finite).all() & (difference <= SAME * usual.masked_fill(~finite, 0.0).abs().max()))


def _reserve(layers: list[RotateKLayer]) -> Tensor:
    """Room in every window, and the lengths of all layers in one tensor [layers, B and more], so that one launch counts a step in them."""
    store = layers[0].segments.store
    whole = -(-store.batch // 4) * 4  # int32: each layer's lengths begin at 16 bytes, as kernels are compiled for
    lengths = torch.zeros(len(layers), whole, dtype=torch.int32, device=store.device)
    room = min(STRETCH, max(LEAST_STRETCH, layers[0].logical_length // 8))
    for layer, own in zip(layers, lengths, strict=True):
        layer.segments.store.reserve(room, own[: store.batch])
        layer.segments.store.view(splits=layer.backend.needs_splits)
    return lengths


@contextmanager
def _capturing(cache: RotateKCache) -> Iterator[None]:
    cache.state.capturing = True
    try:
        yield
    finally:
        cache.state.capturing = False
