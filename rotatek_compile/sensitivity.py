"""What a head matters: KL of the answer tokens when its Keys are cut to a few directions (DESIGN.md §4.4), with the cuts of cutter.py.

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

from .allocate import Plan
from .batches import Encoded
from .cutter import Cutter, Prefilled
from .parallel import Processes

T = TypeVar("T")
NOTHING = 1e-6  # nats per answer token: what costs less without any direction is not measured with some


def levels_for(head_dim: int) -> tuple[int, ...]:
    """Ranks at which heads are cut: nothing, D/16, D/8, D/4 (whole steps of 8)."""
    return tuple(sorted({max(0, head_dim * part // 128) * 8 for part in (0, 1, 2, 4)}))


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """`kl`: by layer, KL per answer token when one head alone is cut to each level, fp32 [Hkv, levels]. `bounded`: the share of all
    (document, head, level) whose figure is not its own but that of a lower level, because that one already cost at most `NOTHING`."""

    kl: dict[int, Tensor]
    bounded: float


def measure(
    cutter: Cutter, items: Sequence[Encoded], levels: Sequence[int], quiet: bool, batch_size: int = 1, together: Processes | None = None
) -> Sensitivities:
    """KL per answer token when one head alone is cut.

    Levels are measured upwards. Where a document's answer loses at most `NOTHING` nats per token at one level, its higher levels are
    given that figure instead of being measured: more directions cost less but for noise of that size, so it is an upper bound, and no
    allocation looks at differences that small.

    Args:
        levels: directions kept, ascending.
        together: the processes whose documents count; `items` are this one's share.
    """
    geometry, together = cutter.geometry, together or Processes()
    heads = [(i, h) for i in geometry.compressible for h in range(geometry.layers[i].kv_heads)]
    total = torch.zeros(len(heads), len(levels), dtype=torch.float64)
    tokens = bounded = 0
    with tqdm(total=len(items) * len(heads), desc="sensitivities", unit="head", disable=None if not quiet else True, leave=False) as bar:
        for start in range(0, len(items), batch_size):
            doc = cutter.prefill(*items[start : start + batch_size])
            counts = doc.scored.sum(1).cpu()
            for layer in geometry.compressible:
                places = [n for n, (i, _) in enumerate(heads) if i == layer]
                found, own = _one_layer(cutter, doc, layer, len(places), levels, NOTHING * counts)
                total[places] += found.sum(-1)
                bounded += int((~own).sum())
                bar.update(len(places) * len(doc.items))
            tokens += int(counts.sum())
            del doc  # before the next batch is prefilled, so that two caches never stand side by side
    counted = together.sum(torch.tensor([tokens, bounded, len(items)]))
    kl = (together.sum(total) / counted[0].clamp_min(1)).float()
    by_layer = kl.split([geometry.layers[i].kv_heads for i in geometry.compressible])
    share = float(counted[1] / (counted[2] * total.numel()).clamp_min(1))
    return Sensitivities(dict(zip(geometry.compressible, by_layer, strict=True)), share)


def _one_layer(cutter: Cutter, doc: Prefilled, layer: int, heads: int, levels: Sequence[int], least: Tensor) -> tuple[Tensor, Tensor]:
    """KL of one layer's heads on one batch, fp64 [Hkv, levels, B], and which of them are measured or would have been alone, bool.

    Whether a document is measured depends on that document only, so that figures do not depend on who shares its batch.
    """
    found = torch.zeros(heads, len(levels), len(doc.items), dtype=torch.float64)
    own = torch.zeros_like(found, dtype=torch.bool)
    open_ = torch.ones(heads, len(doc.items), dtype=torch.bool)
    for number, level in enumerate(levels):
        if number:
            found[:, number] = found[:, number - 1]
        own[:, number] = open_
        rows = open_.any(1).nonzero().flatten().tolist()
        if not rows:
            continue
        got = cutter.kl_each(doc, [({layer: {head: level}}, ()) for head in rows])
        found[rows, number] = torch.where(open_[rows], got, found[rows, number])
        open_ &= found[:, number] > least
    return found, own


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
    cuts = {i: dict(enumerate(ranks)) for i, ranks in plan.items()}
    parts = []
    for doc in docs:
        with doc.at_home():
            parts.append(cutter.kl(doc, cuts))
    mine = torch.tensor([sum(kl for kl, _ in parts), sum(n for _, n in parts)], dtype=torch.float64)
    kl, tokens = (together or Processes()).sum(mine).tolist()
    return float(kl / max(tokens, 1))
