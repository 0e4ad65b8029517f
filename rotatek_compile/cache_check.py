"""KL of an artifact on documents prefilled by the cutter, read through the very cache that decodes.

Cuts (cutter.py) know plans, but no escape tokens and no own bases: these are decided segment by segment as a cache is filled. Here the
prefilled Keys and Values are handed to a compressed cache, and the rest of each document is read on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .batches import join, positions
from .cutter import Cutter, Prefilled

if TYPE_CHECKING:
    from .artifact import Artifact
    from .runtime.recording import Recording

BACKEND = "torch"  # the specification: a kernel would be compiled for a handful of documents


@torch.inference_mode()
def kl_through_cache(cutter: Cutter, docs: Sequence[Prefilled], artifact: Artifact) -> np.ndarray:
    """KL(dense || artifact) summed over each document's answer tokens, fp64 [documents]; no head keeps more than planned.

    Without the fallback, so that artifacts of one budget are compared at equal bytes. The model must not be enabled already.
    """
    from .runtime.enable import enable
    from .runtime.recording import fill

    found = []
    with enable(cutter.model, replace(artifact, method=replace(artifact.method, fallback_factor=0.0)), BACKEND) as enabled:
        for doc in docs:
            rest = cutter.rest(doc)
            with doc.at_home():
                cache = fill(enabled.new_cache(), recording_of(cutter, doc))
            logits = cutter.model(
                input_ids=rest.ids.to(cutter.device),
                attention_mask=join(doc.prefix, rest).mask.to(cutter.device),
                position_ids=positions(doc.items, doc.prefix.mask.sum(1).tolist(), rest.mask).to(cutter.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=doc.scored.shape[1],  # left-padded, so that a row's answer positions are its last ones
            ).logits
            found.append(doc.kl_from(logits.to(cutter.device).double().log_softmax(-1)).cpu().numpy())
    return np.concatenate(found) if found else np.zeros(0)


def recording_of(cutter: Cutter, doc: Prefilled) -> Recording:
    """A prefilled batch as what a compressed cache is filled from. Queries are left out: of all bases only `paper` looks at them."""
    from .runtime.recording import LayerRecord, Recording
    from .runtime.segments import Step, read_kinds, runs_of

    geometry, shape = cutter.geometry, (doc.prefix.ids.shape[0], doc.prefix.ids.shape[1])
    kinds = read_kinds(doc.prefix.ids, doc.prefix.mask, None, geometry.visual_token_ids, shape)
    rows = tuple(runs_of(row) for row in (kinds if kinds is not None else np.zeros(shape, np.int8)))
    nothing = torch.empty(len(rows), 0, device=cutter.device)
    layers = [
        LayerRecord(nothing, layer.keys, layer.values) if index in geometry.compressible else layer
        for index, layer in enumerate(doc.cache.layers)
    ]
    return Recording(Step(*shape, rows), tuple(layers), nothing)


def answer_tokens(docs: Sequence[Prefilled]) -> Tensor:
    """Scored tokens of each document, int64 [documents] on the CPU."""
    return torch.cat([doc.scored.sum(1).cpu() for doc in docs]) if docs else torch.zeros(0, dtype=torch.int64)
