"""What a head matters: KL of the answer tokens when its Keys or Values are cut (DESIGN.md §4.4), with the cuts of cutter.py.

Energy says nothing across heads (measured: the plan of least logit error was the worse one by far), so this is the currency in which
heads are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from .batches import Encoded
from .cutter import Cutter, Prefilled
from .kernels.slabs import NIBBLE_UNIT, UNIT, Slabs
from .parallel import Processes
from .plan import HeadPlan, Plan

T = TypeVar("T")
NOTHING = 1e-6  # nats per answer token: what costs less without any direction is not measured with some


def levels_for(head_dim: int) -> tuple[Slabs, ...]:
    """What heads are cut to: nothing, and an eighth, a quarter and a half of the directions at 4 bit (whole steps of 16).

    Four bits, because that is where small budgets end; the errors of other precisions follow from these (cost_curves.py).
    """
    counts = {head_dim * part // (8 * NIBBLE_UNIT) * NIBBLE_UNIT for part in (0, 1, 2, 4)}
    if counts == {0}:
        return (Slabs(), Slabs(byte=UNIT))
    return tuple(Slabs(nibble=count) for count in sorted(counts))


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """`key`, `value`: by layer, KL per answer token when that side of one head alone is cut to each level, fp32 [Hkv, levels]. `bounded`:
    the share of all (document, head, side, level) whose figure is not its own but that of a lower level, because that one already cost at
    most `NOTHING`."""

    key: dict[int, Tensor]
    value: dict[int, Tensor]
    bounded: float


def measure(
    cutter: Cutter, items: Sequence[Encoded], levels: Sequence[Slabs], quiet: bool, batch_size: int = 1, together: Processes | None = None
) -> Sensitivities:
    """KL per answer token when the Keys or the Values of one head alone are cut.

    Levels are measured upwards. Where a document's answer loses at most `NOTHING` nats per token at one level, its higher levels are
    given that figure instead of being measured: more directions cost less but for noise of that size, so it is an upper bound, and no
    allocation looks at differences that small.

    Args:
        levels: what is kept, ascending.
        together: the processes whose documents count; `items` are this one's share.
    """
    geometry, together = cutter.geometry, together or Processes()
    sizes = [geometry.layers[i].kv_heads for i in geometry.compressible]
    total = torch.zeros(2, sum(sizes), len(levels), dtype=torch.float64)
    tokens = bounded = 0
    with tqdm(total=len(items) * sum(sizes), desc="sensitivities", unit="head", disable=None if not quiet else True, leave=False) as bar:
        for start in range(0, len(items), batch_size):
            doc = cutter.prefill(*items[start : start + batch_size])
            counts = doc.scored.sum(1).cpu()
            at = 0
            for layer, heads in zip(geometry.compressible, sizes, strict=True):
                found, own = _one_layer(cutter, doc, layer, heads, levels, NOTHING * counts)
                total[:, at : at + heads] += found.sum(-1)
                bounded += int((~own).sum())
                at += heads
                bar.update(heads * len(doc.items))
            tokens += int(counts.sum())
            del doc  # before the next batch is prefilled, so that two caches never stand side by side
    counted = together.sum(torch.tensor([tokens, bounded, len(items)]))
    kl = (together.sum(total) / counted[0].clamp_min(1)).float()
    share = float(counted[1] / (counted[2] * total.numel()).clamp_min(1))
    key, value = (dict(zip(geometry.compressible, side.split(sizes), strict=True)) for side in kl)
    return Sensitivities(key, value, share)


def _one_layer(cutter: Cutter, doc: Prefilled, layer: int, heads: int, levels: Sequence[Slabs], least: Tensor) -> tuple[Tensor, Tensor]:
    """KL of one layer's heads on one batch, fp64 [2, Hkv, levels, B], and which of them are measured or would have been alone, bool.

    Whether a document is measured depends on that document only, so that figures do not depend on who shares its batch.
    """
    raw = Slabs(cutter.geometry.layers[layer].head_dim)
    found = torch.zeros(2 * heads, len(levels), len(doc.items), dtype=torch.float64)
    own = torch.zeros_like(found, dtype=torch.bool)
    open_ = torch.ones(2 * heads, len(doc.items), dtype=torch.bool)
    for number, level in enumerate(levels):
        if number:
            found[:, number] = found[:, number - 1]
        own[:, number] = open_
        rows = open_.any(1).nonzero().flatten().tolist()
        if not rows:
            continue
        cuts = [HeadPlan(level, raw) if row < heads else HeadPlan(raw, level) for row in rows]
        got = cutter.kl_each(doc, [({layer: {row % heads: cut}}, ()) for row, cut in zip(rows, cuts, strict=True)])
        found[rows, number] = torch.where(open_[rows], got, found[rows, number])
        open_ &= found[:, number] > least
    shape = (2, heads, len(levels), len(doc.items))
    return found.view(shape), own.view(shape)


class JointCheck:
    """KL of whole plans on prefilled documents, which several processes may share: the main one asks, the others answer with it."""

    def __init__(self, cutter: Cutter, docs: Sequence[Prefilled], together: Processes | None = None) -> None:
        self.cutter, self.docs, self.together = cutter, docs, together or Processes()

    def __call__(self, plan: Plan) -> float:
        """KL per answer token; asked by the main process, inside `lead`."""
        return joint_kl(self.cutter, self.docs, self.together.broadcast(plan), self.together)

    def lead(self, search: Callable[[], T]) -> T:
        """What `search` finds in the main process, in all of them. One that decides keeps rounding from leading them apart."""
        if self.together.main:
            found = search()
            if self.together.size > 1:
                self.together.broadcast(("found", found))
            return found
        while True:
            asked: Any = self.together.broadcast(None)
            if isinstance(asked, tuple):
                result: T = asked[1]
                return result
            joint_kl(self.cutter, self.docs, asked, self.together)


def joint_kl(cutter: Cutter, docs: Sequence[Prefilled], plan: Plan, together: Processes | None = None) -> float:
    """KL per answer token of a whole plan; with several processes `docs` are this one's share."""
    cuts = {i: dict(enumerate(heads)) for i, heads in plan.items()}
    parts = []
    for doc in docs:
        with doc.at_home():
            parts.append(cutter.kl(doc, cuts))
    mine = torch.tensor([sum(kl for kl, _ in parts), sum(n for _, n in parts)], dtype=torch.float64)
    kl, tokens = (together or Processes()).sum(mine).tolist()
    return float(kl / max(tokens, 1))
