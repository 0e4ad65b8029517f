"""What a plan costs: KL of the next token between the dense model and the same model with some layers pruned, on documents read once.

What enters every layer of the dense model is kept, so that trying a plan whose first pruned layer is i computes nothing below it, and
neither pages nor embeddings again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .batches import Encoded
from .errors import RotateKError
from .geometry import Geometry
from .rap_plan import RapLayer
from .rap_reading import Read, patched, read
from .rereading import decoder_layers


@dataclass(slots=True)
class Trace:
    """A batch as the dense model read it. entries: what enters each layer [B, T, hidden]; arguments: the layers' other arguments;
    reference: log-probabilities [scored tokens, V]."""

    batch: Read
    entries: list[Tensor]
    arguments: list[dict[str, Any]]
    reference: Tensor


class Layers:
    """The decoder layers of a text model, run one by one."""

    def __init__(self, model: Any, geometry: Geometry) -> None:
        found = decoder_layers(model, len(geometry.layers))
        owners = [m for m in model.modules() if found and getattr(m, "layers", None) is not None and list(_list(m.layers)) == found]
        self.head = model.get_output_embeddings()
        if found is None or not owners or getattr(owners[0], "norm", None) is None or self.head is None:
            raise RotateKError(f"RAP does not know how {type(model).__name__} builds its layers; use --method rotatek")
        self.model, self.geometry, self.layers, self.norm = model, geometry, found, owners[0].norm

    def trace(self, batch: Read) -> tuple[list[Tensor], list[dict[str, Any]], Tensor]:
        """Entries, arguments and the logits [B, L, V] of the last L columns of one forward pass."""
        entries: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def note(module: Any, args: Any, kwargs: Any) -> None:
            entries.append(args[0] if args else kwargs["hidden_states"])
            arguments.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in self.layers]
        try:
            logits = self.model(**batch.inputs, logits_to_keep=batch.last).logits
        finally:
            for hook in hooks:
                hook.remove()
        return entries, arguments, logits

    def step(self, index: int, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """What leaves one layer."""
        out = self.layers[index](hidden, **arguments)
        return out[0] if isinstance(out, tuple) else out

    def logits(self, hidden: Tensor, last: int) -> Tensor:
        """Logits [B, L, V] of what leaves the last layer."""
        out: Tensor = self.head(self.norm(hidden[:, -last:]))
        return out


class Measure:
    """KL(dense || pruned) per scored token in nats: `measure(layers)` for a plan's layers, all others dense.

    Raises:
        RotateKError: a model whose layers cannot be run by themselves.
    """

    def __init__(self, model: Any, items: Sequence[Encoded], geometry: Geometry, batch_size: int, pad_id: int, quiet: bool = True) -> None:
        self.model, self.geometry, self.layers = model, geometry, Layers(model, geometry)
        self.traces: list[Trace] = []
        bar = tqdm(total=len(items), desc="reading", unit="doc", disable=None if not quiet else True, leave=False)
        with bar, torch.inference_mode():
            for start in range(0, len(items), batch_size):
                batch = read(model, items[start : start + batch_size], geometry, pad_id)
                entries, arguments, logits = self.layers.trace(batch)
                trace = Trace(batch, entries, arguments, torch.empty(0))
                trace.reference = self._scored(trace, logits)
                again = self._scored(trace, self._from(trace, len(entries) - 1))
                if not torch.allclose(again, trace.reference, atol=1e-2):
                    raise RotateKError(f"{type(model).__name__} does more between its layers than RAP knows; use --method rotatek")
                self.traces.append(trace)
                bar.update(len(batch.real))

    @torch.inference_mode()
    def __call__(self, layers: Mapping[int, RapLayer], most: float = float("inf")) -> float:
        """KL per scored token; some figure above `most` as soon as it must be above."""
        tokens = sum(len(trace.reference) for trace in self.traces)
        total = 0.0
        with patched(self.model, layers, self.geometry):
            for trace in self.traces if layers else []:
                got = self._scored(trace, self._from(trace, min(layers)))
                total += float((trace.reference.exp() * (trace.reference - got)).sum().clamp_min(0))
                if total > most * tokens:
                    break
        return total / max(tokens, 1)

    @property
    def documents(self) -> int:
        """How many it measures on."""
        return sum(len(trace.batch.real) for trace in self.traces)

    def first(self, count: int) -> Measure:
        """The same on its first batches, so many as hold `count` documents; nothing is read again."""
        held, part = 0, copy.copy(self)
        part.traces = []
        for trace in self.traces:
            if held < count:
                part.traces.append(trace)
                held += len(trace.batch.real)
        return part

    def _from(self, trace: Trace, start: int) -> Tensor:
        hidden = trace.entries[start]
        for index in range(start, len(trace.entries)):
            hidden = self.layers.step(index, hidden, trace.arguments[index])
        return self.layers.logits(hidden, trace.batch.last)

    def _scored(self, trace: Trace, logits: Tensor) -> Tensor:
        scored = trace.batch.scored[:, -logits.shape[1] :].to(logits.device)
        return logits[scored].float().log_softmax(-1)


def _list(modules: Any) -> list[Any]:
    return list(modules) if isinstance(modules, torch.nn.ModuleList) else []
