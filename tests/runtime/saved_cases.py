"""Plans with every kind of slab, and a long conversation on a cache, for the tests of saved caches."""

import torch

from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan

MIXED = [[HeadPlan(Slabs(8, 8, 16), Slabs(0, 16, 0)), HeadPlan(Slabs(32), Slabs(0, 0, 16))]] * 3
NOTHING = [[HeadPlan(Slabs(), Slabs(0, 8, 0)), HeadPlan(Slabs(0, 0, 32), Slabs(16, 0, 0))]] * 3


def go_on(model, cache, mask, turns=(9, 1, 80, 1, 70, 3)):
    """Logits of a long conversation on a cache: text leaves the window, blocks are coded and merged."""
    logits = []
    for n, length in enumerate(turns):
        ids = torch.randint(6, 97, (cache.layers[0].store.batch, length), generator=torch.Generator().manual_seed(n))
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        places = (mask.cumsum(-1) - 1)[:, -length:]
        logits.append(model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits)
    return torch.cat(logits, 1)
