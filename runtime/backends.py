"""Who computes attention over the compact cache: `torch` (the specification), `triton` (the kernel), `reconstruct` (for debugging)."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import RotateKError
from ..kernels.decode_torch import (
    Partials,
    append_newest,
    decode_attention_reconstruct,
    finish,
    merge_partials,
    partials_of,
    reconstruct,
    segment_partials,
)
from ..kernels.table import CacheView

BACKENDS = ("auto", "triton", "torch", "reconstruct")
MOST_ROWS = 64  # queries times group that one decode call takes
QUERIES_AT_ONCE = 256  # bounds the logits of a long extension


class Backend(Protocol):
    """How a cache layer gets its attention. Shapes as in kernels/decode_torch.py."""

    name: str
    needs_splits: bool
    captures: bool  # whether `decode` can be captured in a CUDA graph: the host decides nothing in it

    def most_queries(self, group: int) -> int:
        """Most new text tokens that are appended to the window first and attended there."""

    def decode(self, query: Tensor, view: CacheView, scaling: float, keys: Tensor, values: Tensor) -> Tensor:
        """The T new tokens `keys`, `values` [B, Hkv, T, D] are written to the end of the window, whose lengths count them, and attended."""

    def extend(self, query: Tensor, view: CacheView, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """The T new tokens are `keys`, `values` [B, Hkv, T, D], not stored yet; mask as in `visible_new`."""


class TorchBackend:
    """The specification, on any device."""

    name = "torch"
    needs_splits = False
    captures = False

    def most_queries(self, group: int) -> int:
        return max(1, MOST_ROWS // group)

    def decode(self, query: Tensor, view: CacheView, scaling: float, keys: Tensor, values: Tensor) -> Tensor:
        append_newest(view, keys, values)
        return finish(self.stored(query, view, scaling, causal_window=True)).to(query.dtype)

    def stored(self, query: Tensor, view: CacheView, scaling: float, causal_window: bool) -> Partials:
        """Unfinished attention over everything stored; arguments and result as `segment_partials`."""
        return segment_partials(query, view, scaling, causal_window)

    def extend(self, query: Tensor, view: CacheView, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        visible = visible_new(mask, query.shape[2], query.device)
        chunks = range(0, query.shape[2], QUERIES_AT_ONCE)
        parts = [slice(start, start + QUERIES_AT_ONCE) for start in chunks]
        return torch.cat([self._extend(query[:, :, p], view, keys, values, visible[:, :, p], scaling) for p in parts], dim=2)

    def _extend(self, query: Tensor, view: CacheView, keys: Tensor, values: Tensor, visible: Tensor, scaling: float) -> Tensor:
        old = self.stored(query, view, scaling, causal_window=False)
        batch, heads, new, dim = query.shape
        dtype = old[2].dtype
        rows = query.to(dtype).reshape(batch, keys.shape[1], -1, new, dim)  # [B, Hkv, G, T, D]
        logits = scaling * rows @ keys.to(dtype).unsqueeze(2).mT
        logits = logits.masked_fill(~visible.unsqueeze(2), -torch.inf)
        m, mass, acc = partials_of(logits, values.to(dtype).unsqueeze(2))
        fresh = m.reshape(batch, heads, new), mass.reshape(batch, heads, new), acc.reshape(batch, heads, new, dim)
        return finish(merge_partials([old, fresh])).to(query.dtype)


class TritonBackend(TorchBackend):
    """The Triton kernel for decoding; shapes it does not take, and extensions with images or padding, go to torch."""

    name = "triton"
    needs_splits = True
    captures = True

    def __init__(self) -> None:
        from ..kernels import decode_ops  # registers an operator, which must be there before anything is compiled

        self.operator = decode_ops.decode

    def decode(self, query: Tensor, view: CacheView, scaling: float, keys: Tensor, values: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.operator(query, view, scaling, keys, values)
        from ..kernels.decode import decode_attention, supported

        reason = supported(query, view)
        if reason is None:
            return decode_attention(query, view, scaling, new=(keys, values))
        warnings.warn(f"decoding with the torch backend instead of Triton: {reason}", stacklevel=2)
        return super().decode(query, view, scaling, keys, values)


class ReconstructBackend(TorchBackend):
    """Rebuild Keys and Values at full width and call torch's attention; for debugging, it saves nothing."""

    name = "reconstruct"

    def decode(self, query: Tensor, view: CacheView, scaling: float, keys: Tensor, values: Tensor) -> Tensor:
        append_newest(view, keys, values)
        return decode_attention_reconstruct(query, view, scaling)

    def extend(self, query: Tensor, view: CacheView, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        batch, heads, new, _ = query.shape
        visible = visible_new(mask, new, query.device).expand(batch, 1, new, new)
        group = heads // keys.shape[1]
        outputs = []
        for b, row in enumerate(reconstruct(view)):
            per_head = []
            for h, (old_keys, old_values) in enumerate(row):
                k = torch.cat([old_keys, keys[b, h].to(old_keys.dtype)])
                v = torch.cat([old_values, values[b, h].to(old_values.dtype)])
                stored = torch.ones(new, old_keys.shape[0], dtype=torch.bool, device=query.device)
                allowed = torch.cat([stored, visible[b, 0]], dim=1)
                q = query[b, h * group : (h + 1) * group].to(k.dtype)
                per_head.append(scaled_dot_product_attention(q, k.expand(group, -1, -1), v.expand(group, -1, -1), allowed, scale=scaling))
            outputs.append(torch.cat(per_head))
        return torch.stack(outputs).to(query.dtype)


def visible_new(mask: Tensor | None, new: int, device: torch.device) -> Tensor:
    """Which of the T new tokens each new query sees: bool [B or 1, 1, T, T].

    Args:
        mask: transformers' [B, 1, T, past + T], flash attention's [B, past + T] (1 = real), or None, which means causal.

    A row that sees no new token (padding) is let see itself, so that nothing becomes NaN; its output is never read.
    """
    if mask is None:
        return torch.ones(new, new, dtype=torch.bool, device=device).tril()[None, None]
    if mask.dim() == 2:  # flash attention's: which tokens are real
        causal = torch.ones(new, new, dtype=torch.bool, device=device).tril()
        visible = causal & (mask[:, None, None, -new:] != 0)
        return visible | (torch.eye(new, dtype=torch.bool, device=device) & ~visible.any(-1, keepdim=True))
    visible = mask[..., -new:]
    if visible.dtype != torch.bool:
        visible = visible == 0
    return visible | (torch.eye(new, dtype=torch.bool, device=device) & ~visible.any(-1, keepdim=True))


def triton_missing() -> str | None:
    """Why the Triton kernel cannot run on this machine, in words, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def choose_backend(name: str, device: torch.device) -> Backend:
    """The backend called `name`; `auto` takes Triton on a CUDA device that can run it and torch elsewhere.

    Raises:
        RotateKError: `triton` was asked for and cannot run here.
    """
    if name not in BACKENDS:
        raise RotateKError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if name == "triton":
        reason = triton_missing() or (None if device.type == "cuda" else f"the model is on {device}")
        if reason:
            raise RotateKError(f"--backend triton cannot run: {reason}; use --backend torch or auto")
        return TritonBackend()
    if name == "reconstruct":
        return ReconstructBackend()
    if name == "auto" and device.type == "cuda" and triton_missing() is None:
        return TritonBackend()
    return TorchBackend()
