"""Keys before RoPE, for coders that work there (`coder.BeforeRopeCoder`): what a layer's k_proj put out, and what turns it into its Keys.

A Key is RoPE(norm(x W_k)), the norm only in models that have one (Qwen3). `watching` puts hooks on the attention modules for one forward
call: one reads what `k_proj` puts out, one the cosines and sines that the model passes, so M-RoPE needs no positions here. Caches whose
coder does not ask have no hooks and hold nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..geometry import Geometry
from .segments import Run, columns

TOLERANCE = 1 / 32  # of the largest Key: rounding of a 16-bit model, far below any other layout


@dataclass(frozen=True, slots=True, eq=False)
class Turning:
    """How tokens' projections become Keys: cos and sin [..., T, D] as the model passes them, and the layer's k-norm if it has one."""

    cos: Tensor
    sin: Tensor
    norm: nn.Module | None

    @torch.no_grad()
    def of(self, keys: Tensor) -> Tensor:
        """Keys after RoPE, fp32, of projections [Hkv, T, D]."""
        keys = keys.float()
        if self.norm is not None:
            keys = self.norm(keys).float()
        return turned(keys, self.cos.float(), self.sin.float())

    def __deepcopy__(self, memo: dict[int, object]) -> Turning:
        return self  # nothing is ever written in place, and the norm is the model's

    def each(self, change: Callable[[Tensor], Tensor]) -> Turning:
        """With cos and sin [T, D] changed alike."""
        return replace(self, cos=change(self.cos), sin=change(self.sin))


@dataclass(frozen=True, slots=True, eq=False)
class BeforeRope:
    """Tokens of one layer: keys [B, Hkv, T, D] as k_proj put them out, cos and sin [B or 1, T, D]; of one row without B."""

    keys: Tensor
    turning: Turning

    def __deepcopy__(self, memo: dict[int, object]) -> BeforeRope:
        return self

    def row(self, row: int) -> BeforeRope:
        return BeforeRope(self.keys[row], self.turning.each(lambda x: x[min(row, len(x) - 1)]))

    def columns(self, runs: Sequence[Run]) -> BeforeRope:
        """The columns of these runs of one row."""
        return BeforeRope(columns(self.keys, runs), self.turning.each(lambda x: columns(x.unsqueeze(0), runs)[0]))

    def only(self, places: Tensor) -> BeforeRope:
        """The tokens int64 [n] of one row."""
        return BeforeRope(self.keys[:, places], self.turning.each(lambda x: x[places]))

    def then(self, later: BeforeRope) -> BeforeRope:
        """One row's tokens, and further ones behind them."""
        cos, sin = torch.cat([self.turning.cos, later.turning.cos]), torch.cat([self.turning.sin, later.turning.sin])
        return BeforeRope(torch.cat([self.keys, later.keys], 1), replace(self.turning, cos=cos, sin=sin))

    def own(self) -> BeforeRope:
        """A copy that keeps no larger tensor alive."""
        return BeforeRope(self.keys.clone(), self.turning.each(Tensor.clone))

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.turning.cos, self.turning.sin]

    def check(self, layer: int, keys: Tensor) -> None:
        """Refuse a layer whose Keys [Hkv, T, D] are made in another way.

        Raises:
            UsageError: naming the layer.
        """
        error, largest = (self.turning.of(self.keys) - keys.float()).abs().amax(), keys.float().abs().amax()
        if not bool(error <= TOLERANCE * largest):
            raise UsageError(
                f"the Keys of layer {layer} are not its k_proj, k-norm and RoPE one after another (off by {float(error):.3g} of at most "
                f"{float(largest):.3g}), so they cannot be rebuilt from before RoPE; choose another method"
            )


def turned(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) in the rotate-half layout: channel j < D/2 and j + D/2 are a pair; [..., T, D], cos and sin [T, D]."""
    first, second = keys.chunk(2, -1)
    return keys * cos + torch.cat([-second, first], -1) * sin


def key_projections(model: nn.Module, geometry: Geometry) -> dict[int, Any]:
    """The attention modules of the layers whose cache is compressed, by layer.

    Raises:
        UsageError: Keys that are not one plain projection, an optional norm of each head, and RoPE in the rotate-half layout over all
            channels.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    found = {}
    for module in model.modules():
        if type(getattr(module, "config", None)) is type(text) and hasattr(module, "layer_idx") and hasattr(module, "k_proj"):
            found[int(module.layer_idx)] = module  # type: ignore[arg-type]
    name = type(model).__name__
    for layer in geometry.compressible:
        shape = geometry.layers[layer]
        projection: Any = getattr(found.get(layer), "k_proj", None)
        width = getattr(projection, "out_features", None)
        if width != shape.kv_heads * shape.head_dim:
            seen = "has no k_proj" if projection is None else f"has a k_proj of {width} channels, not {shape.kv_heads * shape.head_dim}"
            raise UsageError(f"Keys before RoPE cannot be seen: layer {layer} of {name} {seen}; choose another method")
        norm: Any = getattr(found[layer], "k_norm", None)
        if norm is not None and getattr(norm, "weight", torch.empty(0)).shape != (shape.head_dim,):
            raise UsageError(f"Keys before RoPE cannot be rebuilt: the k-norm of {name} is not one of each head; choose another method")
    rope = getattr(text, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", None))
    if share not in (None, 1, 1.0):
        raise UsageError(f"Keys before RoPE cannot be rebuilt: RoPE of {name} turns a share {share} of the channels; choose another method")
    first = geometry.compressible[0]
    if not _by_halves(found[first], geometry.layers[first].head_dim):
        raise UsageError(f"Keys before RoPE cannot be rebuilt: RoPE of {name} pairs neighbouring channels; choose another method")
    return {layer: found[layer] for layer in geometry.compressible}


def _by_halves(module: nn.Module, dim: int) -> bool:
    """Whether the modelling file's own RoPE is `turned`; tried on numbers, because no config says it."""
    own = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if own is None:
        return True  # `BeforeRope.check` looks at the Keys themselves
    draw = torch.Generator().manual_seed(0)
    keys, angles = torch.randn(1, 1, 3, dim, generator=draw), torch.randn(1, 3, dim // 2, generator=draw).repeat(1, 1, 2)
    got = own(keys, keys, angles.cos(), angles.sin())[1]
    return torch.allclose(got, turned(keys, angles.cos(), angles.sin()), atol=1e-4)


@contextmanager
def watching(modules: Mapping[int, Any], seen: dict[int, BeforeRope], mine: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Note into `seen` what these attention modules' Keys are before RoPE, by layer, during one forward call.

    Args:
        mine: whether the call that a hook runs in is the one to be watched, where other threads may call the model meanwhile.

    Raises:
        UsageError: from within the call, where the model passes no cosines and sines of the whole head.
    """
    handles = []
    for layer, module in modules.items():
        angles: list[tuple[Tensor, Tensor]] = []

        def before(module: Any, args: Any, kwargs: Any, angles: list[tuple[Tensor, Tensor]] = angles) -> None:
            if not mine():
                return
            given = kwargs.get("position_embeddings")
            if given is None or given[0].shape[-1] != module.head_dim:
                width = "none" if given is None else f"those of {given[0].shape[-1]} of {module.head_dim} channels"
                raise UsageError(f"Keys before RoPE need cosines of every channel, the model passes {width}; choose another method")
            angles[:] = [given]

        def after(_: Any, args: Any, out: Tensor, layer: int = layer, module: Any = module, angles: list[Any] = angles) -> None:
            if mine():
                keys = out.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
                cos, sin = angles[0]
                seen[layer] = BeforeRope(keys, Turning(cos, sin, getattr(module, "k_norm", None)))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.k_proj.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
