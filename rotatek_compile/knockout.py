"""Knock-outs: how the answers change when heads can no longer tell one image token from another.

A (layer, KV head) pair is knocked out by replacing its image Keys and Values by their means over each image, after the images were
prefilled and before the question is read. It is the diagnosis behind every claim about compression: a model that reads through few
heads is easy to compress by dropping the others, and then nothing can be learnt from comparing codecs on it (DESIGN.md §4).

Where all Keys of an image are its mean, softmax weighs its tokens alike, and attention reads the mean of its Values anyhow. So the
means of Values only save memory, and a cut of the image Keys to rank 0 (sensitivity.py) is a knock-out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .geometry import Geometry
from .parallel import Processes

if TYPE_CHECKING:  # inspecting an artifact needs no transformers
    from .batches import Encoded
    from .cutter import Cutter, Pair

MATTERS = 0.02  # nats per answer token from which a pair counts as needed


@dataclass(slots=True)
class Measured:
    """KL of N sets of knocked-out pairs on M documents.

    kl: fp64 [M, N], summed over a document's answer tokens; tokens: int64 [M]; answers: greedy ids `[document][set]`, where asked for.
    """

    kl: Tensor
    tokens: Tensor
    answers: list[list[list[int]]]

    def per_token(self) -> Tensor:
        """KL per answer token of each set over all documents: fp64 [N]."""
        return self.kl.sum(0) / self.tokens.sum().clamp_min(1)


def all_pairs(geometry: Geometry) -> list[Pair]:
    """Every compressible (layer, KV head)."""
    return [(i, h) for i in geometry.compressible for h in range(geometry.layers[i].kv_heads)]


def knock_out(
    cutter: Cutter,
    items: Sequence[Encoded],
    sets: Sequence[Sequence[Pair]],
    batch_size: int = 1,
    eos: Sequence[int] | None = None,
    max_new_tokens: int = 32,
    quiet: bool = True,
) -> Measured:
    """Knock out each set of pairs on each document; images are prefilled once per batch, only the text runs again per set.

    Args:
        eos: end-of-sequence ids; with them each set also answers greedily (which costs one pass per answer token more).
    """
    from tqdm import tqdm

    kl, tokens, answers = [], [], []
    with tqdm(total=len(items) * len(sets), desc="knock-outs", unit="set", disable=None if not quiet else True, leave=False) as bar:
        for start in range(0, len(items), batch_size):
            doc = cutter.prefill(*items[start : start + batch_size])
            columns, replies = cutter.kl_each(doc, [({}, dropped) for dropped in sets]), []
            for dropped in sets:
                if eos is not None:
                    with cutter.cut(doc, {}, dropped):
                        replies.append(cutter.greedy(doc, eos, max_new_tokens))
                bar.update(len(doc.items))
            kl.append(columns.mT)
            tokens.append(doc.scored.sum(1).cpu())
            answers += [list(row) for row in zip(*replies, strict=True)]
            del doc  # before the next batch is prefilled, so that two caches never stand side by side
    return Measured(torch.cat(kl), torch.cat(tokens), answers)


def measure_knockouts(
    cutter: Cutter, items: Sequence[Encoded], quiet: bool, batch_size: int = 1, together: Processes | None = None
) -> dict[int, Tensor]:
    """KL per answer token when one pair alone is knocked out: by layer, fp32 [Hkv]; what an artifact stores.

    With several processes `items` are this one's share, and the figures those of all.
    """
    together, pairs = together or Processes(), all_pairs(cutter.geometry)
    kl, tokens = torch.zeros(len(pairs), dtype=torch.float64), torch.zeros(1)
    if items:
        found = knock_out(cutter, items, [[pair] for pair in pairs], batch_size, quiet=quiet)
        kl, tokens = found.kl.sum(0), found.tokens.sum()[None]
    return by_layer(cutter.geometry, together.sum(kl) / together.sum(tokens).clamp_min(1))


def by_layer(geometry: Geometry, values: Tensor) -> dict[int, Tensor]:
    """Values of `all_pairs`, [pairs], as fp32 [Hkv] by layer."""
    sizes = [geometry.layers[i].kv_heads for i in geometry.compressible]
    return dict(zip(geometry.compressible, values.float().split(sizes), strict=True))


def ranking(table: Mapping[int, Tensor]) -> list[Pair]:
    """Pairs by the KL of their single knock-outs, dearest first; ties in order of layer and head."""
    values = [(-float(value), layer, head) for layer, heads in table.items() for head, value in enumerate(heads)]
    return [(layer, head) for _, layer, head in sorted(values)]


def kept_count(pairs: int, fraction: float) -> int:
    """How many pairs a kept fraction is: rounded, at least one."""
    return max(1, int(pairs * fraction + 0.5))


def drop_all_but_best(table: Mapping[int, Tensor], fraction: float) -> list[Pair]:
    """The set to knock out so that only the best fraction of the pairs stays."""
    order = ranking(table)
    return sorted(order[kept_count(len(order), fraction) :])


def random_drops(geometry: Geometry, fraction: float, count: int, seed: int) -> list[list[Pair]]:
    """`count` random sets of the size that `drop_all_but_best` drops."""
    pairs = all_pairs(geometry)
    generator = torch.Generator().manual_seed(seed)
    drop = len(pairs) - kept_count(len(pairs), fraction)
    return [sorted(pairs[i] for i in torch.randperm(len(pairs), generator=generator)[:drop].tolist()) for _ in range(count)]


def diagnosis(table: Mapping[int, Tensor]) -> dict[str, Any]:
    """Whether reading is spread: numbers over all pairs.

    Returns:
        pairs; threshold and share_above (fraction of pairs whose knock-out costs at least it); max and median KL; pairs_for_90_percent,
        the fewest pairs that hold 90 % of the sum of KL (0 if the sum is 0).
    """
    values = torch.cat([heads.double() for heads in table.values()]).sort(descending=True).values
    total = float(values.sum())
    return {
        "pairs": values.numel(),
        "threshold": MATTERS,
        "share_above": float((values >= MATTERS).double().mean()),
        "max": float(values[0]),
        "median": float(values.quantile(0.5)),
        "pairs_for_90_percent": int((values.cumsum(0) < 0.9 * total * (1 - 1e-12)).sum()) + 1 if total > 0 else 0,
    }
