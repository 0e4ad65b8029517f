"""Artifacts read through the cache that decodes: what cuts say of a plan, and what only a cache knows."""

from dataclasses import replace

import pytest
import torch

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.bases import pca
from rotatek_compile.cache_check import kl_through_cache, recording_of
from rotatek_compile.cutter import Cutter
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import SIDES, HeadPlan, plan_tensors
from rotatek_compile.runtime.enable import active
from rotatek_compile.runtime.recording import LayerRecord

RAW = Slabs(32)
COARSE = {i: [HeadPlan(Slabs(0, 8), Slabs(nibble=16)), HeadPlan(Slabs(nibble=16), Slabs(8))] for i in range(3)}


@pytest.fixture
def bases():
    generator = torch.Generator().manual_seed(0)
    return {side: {i: pca(a @ a.mT) for i, a in enumerate(torch.randn(3, 2, 32, 32, generator=generator))} for side in SIDES}


@pytest.fixture
def cutter(tiny, tiny_geometry, bases):
    return Cutter(tiny, tiny_geometry, bases["key"], False, bases["value"])


@pytest.fixture
def artifact(tiny_geometry, bases):
    def make(plan, energy=1.0, **options):
        tensors = plan_tensors(plan)
        for side in SIDES:
            for i, basis in bases[side].items():
                prefix = f"layers.{i}.visual.{side}"
                tensors |= {f"{prefix}_mean": torch.zeros(2, 32), f"{prefix}_encode": basis.encode.float()}
                tensors |= {f"{prefix}_spectrum": energy * basis.spectrum.float()}
        return Artifact(tiny_geometry, Method(**{"prior_tokens": 0, **options}), tensors, {}, {})

    return make


@pytest.fixture
def docs(cutter, documents):
    return [cutter.prefill(*documents[:2]), cutter.prefill(*documents[2:])]


def test_answers_the_dense_model_would_give(cutter, documents):
    """Every token counts, whatever the padding: answers grow by what the model itself would say, then one token is another."""

    def said(items):
        doc = cutter.prefill(*items)
        return doc, [row[scored][-1].argmax().item() for row, scored in zip(doc.reference, doc.scored, strict=True)]

    items = [replace(item, answer=[0]) for item in documents[:3]]
    for length in range(3):
        items = [replace(item, answer=[*item.answer[:-1], token]) for item, token in zip(items, said(items)[1], strict=True)]
        assert said(items)[0].dense_right() == 3
        if length < 2:
            items = [item if n == 0 else replace(item, answer=[*item.answer, 0]) for n, item in enumerate(items)]  # one is shorter
    first = items[1].answer
    assert said([items[0], replace(items[1], answer=[first[0] ^ 1, *first[1:]]), items[2]])[0].dense_right() == 2
    assert said([replace(item, answer=[*item.answer[:-1], item.answer[-1] ^ 1]) for item in items])[0].dense_right() == 0


def test_a_plan_costs_what_its_cuts_cost(cutter, docs, artifact):
    found = kl_through_cache(cutter, docs, artifact(COARSE))
    cuts = torch.cat([cutter.kl_rows(doc, {i: dict(enumerate(heads)) for i, heads in COARSE.items()}) for doc in docs])
    assert found.shape == (5,) and cuts.min() > 1e-2
    assert found == pytest.approx(cuts.numpy(), rel=0.05)
    assert active(cutter.model) is None
    before = [layer.keys.clone() for layer in docs[0].cache.layers]
    assert kl_through_cache(cutter, docs, artifact(COARSE)) == pytest.approx(found, rel=1e-6)
    assert all(torch.equal(old, layer.keys) for old, layer in zip(before, docs[0].cache.layers, strict=True))


def test_nothing_is_lost_raw(cutter, docs, artifact):
    assert kl_through_cache(cutter, docs, artifact({i: [HeadPlan(RAW, RAW)] * 2 for i in range(3)})).max() < 1e-8
    assert kl_through_cache(cutter, [], artifact(COARSE)).shape == (0,)


def test_what_only_a_cache_knows(cutter, docs, artifact):
    """Escape tokens and own bases change figures that no cut sees; the fallback, which breaks a budget, does not."""
    plain = kl_through_cache(cutter, docs, artifact(COARSE))
    assert kl_through_cache(cutter, docs, artifact(COARSE, fallback_factor=1e-6)) == pytest.approx(plain, rel=1e-9)
    assert kl_through_cache(cutter, docs, artifact(COARSE, escape_ratio=0.25)).sum() < 0.9 * plain.sum()
    calibrated, own = (kl_through_cache(cutter, docs, artifact(COARSE, 1e-3, prior_tokens=prior)) for prior in (0, 1))
    assert own.sum() < 0.9 * calibrated.sum()  # these bases were not calibrated at all


def test_what_is_handed_over(cutter, docs):
    made = recording_of(cutter, docs[0])
    assert made.step.batch == 2 and [sum(run.medium >= 0 for run in row) for row in made.step.rows] == [1, 2]
    assert [made.step.tokens(row) for row in range(2)] == docs[0].prefix.mask.sum(1).tolist()
    assert all(isinstance(layer, LayerRecord) and layer.keys is docs[0].cache.layers[i].keys for i, layer in enumerate(made.layers))
