"""What a layer of the compressed cache gives to the attention function in place of Keys and Values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .segments import Step

if TYPE_CHECKING:
    from .cache_layer import RotateKLayer


class Handle:
    """What `update` returns in place of Keys and Values; only the attention function `rotatek` understands it.

    Any other attention function fails on it at once (it is no tensor), rather than computing with rotated Keys.
    """

    def __init__(self, layer: RotateKLayer, step: Step, keys: Tensor, values: Tensor, appended: bool) -> None:
        self.layer, self.step, self.appended = layer, step, appended  # appended: the window counts these tokens already
        self.keys: Tensor | None = keys
        self.values: Tensor | None = values

    @property
    def first(self) -> bool:
        """Nothing was stored before this call: the stock kernel sees all there is."""
        return not self.appended and self.layer.logical_length == self.step.length

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention over the stored tokens and this call's: query [B, Hq, T, D] -> [B, Hq, T, D]. Not for `first` calls."""
        backend = self.layer.backend
        assert self.keys is not None and self.values is not None, "the handle was used after its commit"
        if self.appended:
            return backend.decode(query, self.layer.store.view(splits=backend.needs_splits), scaling, self.keys, self.values)
        return backend.extend(query, self.layer.store.view(splits=False), self.keys, self.values, mask, scaling)

    def commit(self, query: Tensor, scaling: float | None = None) -> None:
        """Code complete segments of this call, append its text to the window, and free the raw tensors.

        Args:
            scaling: of the logits, by default D^-0.5; for methods that look at attention.
        """
        if not self.appended:
            assert self.keys is not None and self.values is not None, "the handle was committed before"
            self.layer.state.scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
            self.layer.commit(query, self.keys, self.values, self.step)
        self.keys = self.values = None
