"""The compressed KV cache of one batch: transformers cache layers that hand out handles instead of Keys (cache_layer.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs

from ..errors import RotateKError, UsageError
from ..geometry import FULL_ATTENTION
from ..kernels.table import BLOCK
from .backends import Backend
from .cache_layer import RotateKLayer
from .coder import BeforeRopeCoder, Coder
from .handle import Handle
from .kept_tokens import KeptSegment
from .media import CallState
from .monitor import Monitor, stats, warn_of_drift
from .prepared import PreparedArtifact, PreparedLayer
from .token_selection import TokenSelector

__all__ = ["Handle", "RotateKCache", "RotateKLayer"]


class RotateKCache(Cache):
    """A cache for one batch of sequences. Full-attention layers are compressed, others keep their stock layer.

    Args:
        config: of the whole model.
        artifact: method, window and bases.
        backend: who computes attention over our own codes; a rival's segments are always read in torch.
        coder: a rival method that codes the images in place of ours; by default the one the artifact was compiled for, if any.

    Raises:
        UsageError: a rival with an artifact whose text is coded too (rivals code images only).
    """

    def __init__(self, config: Any, artifact: PreparedArtifact, backend: Backend, coder: Coder | None = None) -> None:
        coder = coder if coder is not None else artifact.coder
        if coder is not None and (span := artifact.artifact.method.span) != "visual":
            raise UsageError(f"method {coder.name} codes images only, but the artifact has span {span!r}; compile one with --span visual")
        text = config.get_text_config(decoder=True)
        types, kwargs = get_layer_types_and_kwargs(text)
        self.state = CallState(_selector(artifact), before_rope=isinstance(coder, BeforeRopeCoder))
        self.artifact = artifact
        self.rope_deltas: Tensor | None = None  # int64 [B, 1], what M-RoPE models keep beside the cache; known to `Document` caches alone
        self.weights: str | None = None  # identifies the model that read the tokens, likewise
        self.drift_said = False
        layers: list[Any] = []
        # transformers 5.17 returns one dict for all layers, 5.23 one for each
        per_layer = [kwargs] * len(types) if isinstance(kwargs, dict) else kwargs
        for index, (kind, options) in enumerate(zip(types, per_layer, strict=True)):
            if kind == FULL_ATTENTION:
                layers.append(self._make_layer(index, artifact, backend, coder))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**options))
        super().__init__(layers=layers)

    def _make_layer(self, index: int, artifact: PreparedArtifact, backend: Backend, coder: Coder | None) -> RotateKLayer:
        return RotateKLayer(index, artifact, self.state, backend, coder)

    def expect(self, lengths: dict[int, list[int]], chunked: bool) -> None:
        """A prompt comes next; see `CallState.expect`."""
        self.state.expect(lengths, chunked)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.select_rows(beam_idx.tolist())
        for layer in self.layers:
            layer.reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.select_rows(row for row in range(self._rows()) for _ in range(repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows: numbers, negative ones counted from the end, or one bool per row, as a stock cache takes them."""
        indices = torch.arange(self._rows(), device=indices.device)[indices]
        self.state.select_rows(indices.tolist())
        super().batch_select_indices(indices)

    def reset(self) -> None:
        selector = self.state.selector
        asked = self.state.before_rope is not None
        self.state = CallState(selector.fresh() if selector is not None else None, before_rope=asked)
        self.rope_deltas = None  # of what it held
        for layer in self.layers:
            if isinstance(layer, RotateKLayer):
                layer.state = self.state
        super().reset()

    def tokens(self) -> list[int]:
        """Tokens that each sequence holds, padding left out."""
        return next((layer.real.tolist() for layer in self.layers if isinstance(layer, RotateKLayer) and layer.is_initialized), [])

    def codes_text(self, more: Sequence[int]) -> list[bool]:
        """By row, whether text is coded while so many more tokens of it come one by one: in one call they see all of it raw."""
        for layer in self.layers:
            if isinstance(layer, RotateKLayer) and layer.is_initialized and layer.prepared.method.span == "all":
                window = layer.prepared.method.window
                over = [int(held) - window for held in layer.store.window.host]
                left = [n % BLOCK if n >= BLOCK else n for n in over]  # the next call codes the rest before it reads, whatever its length
                return [n + length >= BLOCK for n, length in zip(left, more, strict=True)]
        return [False] * len(more)

    def fork(self) -> RotateKCache:
        """A cheap copy that shares codes, scales, means and bases; both go on independently (fork.py)."""
        from .fork import fork

        copied: RotateKCache = fork(self)
        return copied

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the cache to one file, read by `load_cache` (saved.py); what cannot be saved is refused there."""
        from .saved import save_cache

        return save_cache(self, path, overwrite=overwrite)

    def unfinished(self) -> bool:
        """Whether an image may go on in the next call, and is held raw until then."""
        layers = (layer for layer in self.layers if isinstance(layer, RotateKLayer) and layer.is_initialized)
        return bool(self.state._open or self.state._coming) or any(layer.media.queries or any(layer.store.held) for layer in layers)

    def finish(self) -> None:
        """The image that was read last is complete: code what is still held raw of it."""
        scaling = self.state.scaling
        self.state = CallState(self.state.selector, before_rope=self.state.before_rope is not None)
        self.state.scaling = scaling
        for layer in self.layers:
            if isinstance(layer, RotateKLayer):
                layer.state = self.state
                if layer.is_initialized and any(layer.store.held):
                    layer.finish(range(layer.store.batch))

    def kept_tokens(self) -> dict[int, list[list[Tensor]]]:
        """Which tokens of each image are left: by layer and row, in order, int64 [1 or Hkv, n] of the image's tokens, ascending.

        One row of indices where all heads keep the same. Empty where no tokens are dropped.
        """
        kept = ((layer.index, layer.kept) for layer in self.layers if isinstance(layer, RotateKLayer) and layer.kept is not None)
        return {index: [[segment.indices() for segment in row] for row in tables.rows] for index, tables in kept}

    def kept_segments(self) -> list[KeptSegment]:
        """The tables of kept tokens, each once, also where layers share them."""
        tables = (layer.kept for layer in self.layers if isinstance(layer, RotateKLayer) and layer.kept is not None)
        return list({id(segment): segment for table in tables for segment in table.distinct()}.values())

    def stats(self) -> dict[str, Any]:
        """What coding discarded, and where it fell back.

        Returns:
            fallback_heads: (sequence, head, segment) triples whose Keys or Values kept more than planned.
            refreshes: how often the text of a sequence left the coordinates that it had been written in, over all layers; each takes a mean
            and scales beyond a KV budget.
            angle, calibrated_angle: degrees between the Keys and the directions that the plan keeps, here and on the calibration data; None
            where nothing is rotated. Here each head counts with its worst segment of its worst sequence, coded text included, so the figure
            can only grow while a cache goes on; then the median is taken over heads.
            deviation, usual_deviation: how unlike the calibration documents the most unlike image is, and how much is usual among them, in
            standard deviations (usual.py); None for short images and artifacts of few documents. unlike_calibration: whether that was, or
            for such artifacts the angle is, enough for a warning.
            layers: per layer and KV head the fallbacks, the worst error of Keys and of Values over what calibration expected
            (`key_error_over_expected`, `value_error_over_expected`), and `key_angle`.
        """
        blocks = [layer.blocks for layer in self.layers if isinstance(layer, RotateKLayer)]
        return stats(self._monitors(), sum(one.opened for one in blocks if one is not None))

    def _monitors(self) -> dict[int, tuple[PreparedLayer, Monitor]]:
        layers = [layer for layer in self.layers if isinstance(layer, RotateKLayer) and layer.is_initialized and layer.prepared.kinds]
        return {layer.index: (layer.prepared, layer.store.monitor) for layer in layers}

    def check_drift(self) -> None:
        """Warn once if the images that were coded are unlike the calibration documents."""
        if not self.drift_said:
            self.drift_said = warn_of_drift(self._monitors())

    def _rows(self) -> int:
        """B, or 0 before the first call."""
        return max((len(layer.real) for layer in self.layers if isinstance(layer, RotateKLayer)), default=0)


def _selector(artifact: PreparedArtifact) -> TokenSelector | None:
    """Who decides which image tokens stay, where the artifact drops some.

    Raises:
        RotateKError: the model's heads are spread over processes, which would not agree.
    """
    method = artifact.artifact.method
    if method.token_method is None or method.token_keep_ratio >= 1:
        return None
    if artifact.shard.size > 1:
        raise RotateKError("token selection needs all heads in one process; load the model without tensor parallelism")
    return TokenSelector(method.token_method, method.token_keep_ratio, artifact.artifact.geometry.compressible)
