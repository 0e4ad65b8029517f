"""Many whole plans at once: each costs what it costs alone, with cuts of the shared cache."""

import pytest
import torch

from rotatek_compile import whole_plans
from rotatek_compile.bases import pca
from rotatek_compile.cutter import Cutter
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.recoding import CodingBasis, recoded
from rotatek_compile.whole_plans import kl_of_plans, recoded_plans

RAW, NONE = Slabs(32), Slabs()
SOME = (NONE, RAW, Slabs(8), Slabs(0, 16), Slabs(8, 8, 16), Slabs(0, 8, 16))


@pytest.fixture
def bases():
    generator = torch.Generator().manual_seed(0)
    return [{i: pca(a @ a.mT) for i, a in enumerate(torch.randn(3, 2, 32, 32, generator=generator))} for _ in range(2)]


def plans():
    """A few where every kind of slabs meets every other, and one that keeps everything."""
    mixed = [
        {i: [HeadPlan(SOME[(n + i) % 6], SOME[(2 * n + i + h) % 6]) for h in range(2)] for i in range(3)}  #
        for n in range(5)
    ]
    return [*mixed, {i: [HeadPlan(RAW, RAW)] * 2 for i in range(3)}]


@pytest.mark.parametrize("span_all", [False, True])
def test_plans_cost_what_they_cost_alone(tiny, tiny_geometry, documents, bases, span_all, monkeypatch):
    cutter = Cutter(tiny, tiny_geometry, bases[0], span_all, bases[1])
    doc = cutter.prefill(*documents)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in doc.cache.layers]
    together = kl_of_plans(cutter, doc, plans())
    alone = torch.stack([cutter.kl_rows(doc, {i: dict(enumerate(heads)) for i, heads in plan.items()}) for plan in plans()])
    assert together.shape == (6, 5) and alone[:5].min() > 1e-5
    assert torch.allclose(together[:5], alone[:5], rtol=1e-3, atol=1e-6)
    assert together[5].max() < 1e-9
    for layer, (keys, values) in zip(doc.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    monkeypatch.setitem(whole_plans.ROOM, "cpu", 2 * doc.bytes())  # two plans at a time
    assert torch.allclose(kl_of_plans(cutter, doc, plans()), together, rtol=1e-4, atol=1e-8)


def test_recoded_plans_are_recoded(bases):
    x = torch.randn(2, 2, 40, 32, generator=torch.Generator().manual_seed(1))
    basis, runs = CodingBasis.of(bases[0][1], torch.device("cpu")), [(0, 3, 20), (0, 25, 40), (1, 0, 31)]
    some = [[slabs, SOME[(n + 1) % 6]] for n, slabs in enumerate(SOME)]
    found = recoded_plans(x, runs, basis, some).unflatten(0, (6, 2))
    for n, heads in enumerate(some):
        wanted = {(h, slabs) for h, slabs in enumerate(heads) if slabs != RAW}
        each = recoded(x, runs, basis, wanted)
        for h, slabs in enumerate(heads):
            assert torch.allclose(found[n, :, h], each.get((h, slabs), x[:, h]), atol=1e-5)
    assert torch.equal(recoded_plans(x, runs, None, [[RAW, RAW]]), x)
    assert torch.allclose(recoded_plans(x, runs, None, [[NONE, RAW]])[1, 0, :31], x[1, 0, :31].mean(0), atol=1e-6)
