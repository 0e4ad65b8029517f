"""What a head matters: KL of the answer tokens when its Keys or Values are cut (DESIGN.md §4.4), with the cuts of cutter.py.

Energy says nothing across heads (measured: the plan of least logit error was the worse one by far), so this is the currency in which
heads are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from .batches import Encoded
from .cost_curves import distortions
from .cutter import Cutter, Pair, Prefilled
from .kernels.slabs import NIBBLE_UNIT, UNIT, Slabs
from .parallel import Processes
from .plan import SIDES, HeadPlan, Plan

T = TypeVar("T")
STRESS = 2.0  # how many times the errors, to see which head a plan gives too little
TEMPERATURE = 2.0
"""Logits are divided by this before whole plans are compared. KL of a good plan is that of a few documents whose answer nearly turned; at a
higher temperature every document says how near it is to that. Of 16 good plans at 1/8, ranks by KL on 60 calibration documents agree with
those on 504 others to 0.56 and 0.71 (the two bundled models), the best by resampled documents is at place 6 and 6.5 on the others; at
temperature 2 to 0.69 and 0.55, at place 4 and 3; 4 and 8 are alike."""
WORST = 2  # batches of documents that say which heads a plan gives too little
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
    the share of all (document, head, side, level) whose figure is not measured but follows from a lower level, because that one already
    cost at most `NOTHING`."""

    key: dict[int, Tensor]
    value: dict[int, Tensor]
    bounded: float


def measure(
    cutter: Cutter, items: Sequence[Encoded], levels: Sequence[Slabs], quiet: bool, batch_size: int = 1, together: Processes | None = None
) -> Sensitivities:
    """KL per answer token when the Keys or the Values of one head alone are cut.

    Levels are measured upwards. Where a document's answer loses at most `NOTHING` nats per token at one level, its higher levels are not
    measured: there is little left to know, and small losses fall in proportion to the energy that is discarded (cost_curves.py). A
    generous budget is spent on losses of that size, so they are not taken for equal.

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
    fall = _fall(cutter, layer, heads, levels)
    for number, level in enumerate(levels):
        if number:
            found[:, number] = found[:, number - 1] * fall[:, number, None]
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


def _fall(cutter: Cutter, layer: int, heads: int, levels: Sequence[Slabs]) -> Tensor:
    """Energy that each level discards over that of the level before, at most 1: fp64 [2 Hkv, levels], Keys first."""
    found = torch.ones(2 * heads, len(levels), dtype=torch.float64)
    spectra = [cutter.spectra[side].get(layer) for side in SIDES]
    for row in range(2 * heads):
        if (spectrum := spectra[row // heads]) is not None:
            lost = torch.from_numpy(distortions(spectrum[row % heads], levels))
            found[row, 1:] = (lost[1:] / lost[:-1].clamp_min(1e-30)).clamp_max(1)
    return found


class JointCheck:
    """KL of whole plans on prefilled documents, which several processes may share: the main one asks, the others answer with it."""

    def __init__(self, cutter: Cutter, docs: Sequence[Prefilled], together: Processes | None = None) -> None:
        self.cutter, self.docs, self.together = cutter, list(docs), together or Processes()

    def __call__(self, plan: Plan, most: float = math.inf) -> float:
        """KL per answer token, or some figure above `most` if it is above. This and what follows: asked by the main process in `lead`."""
        return float(self._ask("kl", plan, most))

    def tempered(self, plan: Plan, most: float = math.inf) -> float:
        """The same of distributions at `TEMPERATURE`: what plans are compared by."""
        return float(self._ask("tempered", plan, most))

    def relief(self, plan: Plan) -> dict[Pair, float]:
        """By head, the share of tempered KL at twice the errors that being raw would save on the documents that were worst
        when all were last read.

        A plan that is improved is the one that was read to the end last.
        """
        found: dict[Pair, float] = self._ask("relief", plan)
        return found

    def lead(self, search: Callable[[], T]) -> T:
        """What `search` finds in the main process, in all of them. One that decides keeps rounding from leading them apart."""
        if self.together.main:
            found = search()
            if self.together.size > 1:
                self.together.broadcast(("found", found))
            return found
        while True:
            asked: Any = self.together.broadcast(None)
            if asked[0] == "found":
                result: T = asked[1]
                return result
            self._answer(*asked)

    def _ask(self, *question: Any) -> Any:
        self.together.broadcast(question)
        return self._answer(*question)

    def _answer(self, what: str, plan: Plan, most: float = math.inf) -> Any:
        with self.cutter.tempered(1.0 if what == "kl" else TEMPERATURE):
            if what == "relief":
                return relief_of(self.cutter, self.docs[:WORST], plan, self.together)
            costs: list[float] = []
            kl = joint_kl(self.cutter, self.docs, plan, self.together, most, costs)
        if len(costs) == len(self.docs):  # the worst first: they say soonest that another plan costs more
            self.docs = [self.docs[n] for n in sorted(range(len(costs)), key=lambda n: -costs[n])]
        return kl


def joint_kl(
    cutter: Cutter,
    docs: Sequence[Prefilled],
    plan: Plan,
    together: Processes | None = None,
    most: float = math.inf,
    costs: list[float] | None = None,
) -> float:
    """KL per answer token of a whole plan; with several processes `docs` are this one's share.

    KL only adds up, so no more is read once the documents of one process have cost more than all may: the figure is then too low, but
    above `most`.

    Args:
        costs: where to note what each document (a batch of them) cost, as far as they were read.
    """
    costs = [] if costs is None else costs
    together = together or Processes()
    tokens = float(together.sum(torch.tensor([sum(int(doc.scored.sum()) for doc in docs)])))
    for doc in docs:
        with doc.at_home():
            costs.append(cutter.kl(doc, _cuts(plan))[0])
        if sum(costs) > most * max(tokens, 1):
            break
    return float(together.sum(torch.tensor([sum(costs)], dtype=torch.float64))) / max(tokens, 1)


def relief_of(cutter: Cutter, docs: Sequence[Prefilled], plan: Plan, together: Processes) -> dict[Pair, float]:
    """`JointCheck.relief`, on these documents of each process."""
    cuts = _cuts(plan)
    pairs = [(i, h) for i, heads in cuts.items() for h in heads]
    fewer = [{i: {h: kept for h, kept in heads.items() if (i, h) != pair} for i, heads in cuts.items()} for pair in pairs]
    kl = torch.zeros(1 + len(pairs), dtype=torch.float64)
    for doc in docs:
        with doc.at_home(), cutter.stressed(STRESS):
            kl += cutter.kl_each(doc, [(one, ()) for one in (cuts, *fewer)]).sum(1)
    whole, *without = together.sum(kl).tolist()
    return {pair: 1 - one / whole if whole > 0 else 0.0 for pair, one in zip(pairs, without, strict=True)}


def _cuts(plan: Plan) -> dict[int, dict[int, HeadPlan]]:
    return {i: dict(enumerate(heads)) for i, heads in plan.items()}
