"""Knock-outs by hand, batches against batch 1, sets, rankings and the diagnosis."""

import pytest
import torch

from rotatek_compile.cutter import Cutter
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.knockout import (
    all_pairs,
    diagnosis,
    drop_all_but_best,
    knock_out,
    measure_knockouts,
    random_drops,
    ranking,
)
from rotatek_compile.plan import HeadPlan
from rotatek_compile.sensitivity import joint_kl, measure

EOS = 2
IMAGE = 5


@pytest.fixture
def cutter(tiny, tiny_geometry):
    return Cutter(tiny, tiny_geometry, {}, span_all=False)


def by_hand(model, item, dropped, answer):
    """Log-probabilities at the answer tokens, and the greedy answer, with Keys and Values of pairs replaced image by image."""
    from transformers.cache_utils import DynamicCache

    def prefilled():
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(input_ids=torch.tensor([item.prompt[: item.visual_end]]), past_key_values=cache, **item.media)
        columns = [n for n, token in enumerate(item.prompt) if token == IMAGE]
        breaks = [n for n in range(1, len(columns)) if columns[n] != columns[n - 1] + 1]
        runs = [columns[a:b] for a, b in zip([0, *breaks], [*breaks, len(columns)], strict=True)]
        for layer, head in dropped:
            for run in runs:
                for x in (cache.layers[layer].keys, cache.layers[layer].values):
                    x[0, head, run] = x[0, head, run].mean(0)
        return cache

    with torch.no_grad():
        rest = item.prompt[item.visual_end :]
        logits = model(input_ids=torch.tensor([rest + item.answer[:-1]]), past_key_values=prefilled()).logits[0, -len(item.answer) :]
        cache, ids, step = prefilled(), [], rest
        while len(ids) < answer and EOS not in ids:
            step = [int(model(input_ids=torch.tensor([step]), past_key_values=cache).logits[0, -1].argmax())]
            ids += step
    return logits.double().log_softmax(-1), ids


def test_against_a_knock_out_by_hand(cutter, tiny, documents):
    sets = [[(1, 0)], [(0, 1), (2, 0), (2, 1)], []]
    got = knock_out(cutter, documents, sets, batch_size=3, eos=(EOS,), max_new_tokens=5)
    assert got.tokens.tolist() == [len(item.answer) for item in documents]
    for m, item in enumerate(documents):
        dense, _ = by_hand(tiny, item, [], 0)
        for n, dropped in enumerate(sets):
            logprobs, ids = by_hand(tiny, item, dropped, 5)
            assert float(got.kl[m, n]) == pytest.approx(float((dense.exp() * (dense - logprobs)).sum()), rel=1e-3, abs=1e-5)
            assert got.answers[m][n] == ids
    assert got.kl[:, :2].min() > 1e-3
    assert got.kl[:, 2].max() < 1e-9
    assert len({tuple(ids) for replies in got.answers for ids in replies}) > len(documents)  # some knock-outs change the answer


def test_values_count_too(cutter, documents):
    doc = cutter.prefill(documents[0])
    keys = {i: t.keys.clone() for i, t in enumerate(doc.cache.layers)}
    with cutter.cut(doc, {}, [(1, 1)]):
        layer = doc.cache.layers[1]
        assert layer.values[0, 1, 3:91].std(0).max() < 1e-6
        assert layer.keys[0, 1, 3:91].std(0).max() < 1e-6
        assert layer.values[0, 0, 3:91].std(0).min() > 1e-3
        assert torch.equal(layer.keys[:, :, :3], keys[1][:, :, :3])
    assert all(torch.equal(t.keys, keys[i]) for i, t in enumerate(doc.cache.layers))


def test_batches_of_ragged_documents_are_batch_1(tiny, tiny_geometry, documents, make_artifact):
    from rotatek_compile.bases import pca

    generator = torch.Generator().manual_seed(0)
    bases = {i: pca(a @ a.mT) for i, a in enumerate(torch.randn(3, 2, 32, 32, generator=generator))}
    cutter = Cutter(tiny, tiny_geometry, bases, span_all=False, values=bases)
    levels = (Slabs(), Slabs(byte=8))
    found, many = measure(cutter, documents, levels, True), measure(cutter, documents, levels, True, batch_size=3)
    single = found.key
    for one_by_one, batched in ((found.key, many.key), (found.value, many.value)):
        for layer, table in one_by_one.items():
            assert torch.allclose(table, batched[layer], rtol=1e-2, atol=1e-6)  # a code may round the other way
            assert table.max() > 1e-3
    raw = Slabs(32)
    plan = {0: [HeadPlan(Slabs(8), raw), HeadPlan(raw, raw)], 1: [HeadPlan(Slabs(), raw), HeadPlan(Slabs(8), Slabs(8))]}
    one = joint_kl(cutter, [cutter.prefill(item) for item in documents], plan)
    assert joint_kl(cutter, [cutter.prefill(*documents)], plan) == pytest.approx(one, rel=1e-3)
    one, many = measure_knockouts(cutter, documents, True), measure_knockouts(cutter, documents, True, batch_size=5)
    for layer, table in one.items():
        assert table.shape == (2,)
        assert torch.allclose(table, many[layer], rtol=1e-3, atol=1e-6)
        assert torch.allclose(table, single[layer][:, 0], rtol=1e-3, atol=1e-6)  # Keys at their mean read the mean Value anyhow
    everything = Cutter(tiny, tiny_geometry, bases, span_all=True)  # an artifact's knock-outs are of images, whatever is coded
    assert torch.allclose(measure_knockouts(everything, documents[:2], True)[1], measure_knockouts(cutter, documents[:2], True)[1])


def test_sets_and_rankings(tiny_geometry):
    table = {0: torch.tensor([0.1, 0.5]), 1: torch.tensor([0.0, 0.1]), 2: torch.tensor([0.3, 0.2])}
    assert ranking(table) == [(0, 1), (2, 0), (2, 1), (0, 0), (1, 1), (1, 0)]
    assert drop_all_but_best(table, 1 / 3) == [(0, 0), (1, 0), (1, 1), (2, 1)]
    assert drop_all_but_best(table, 0.01) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert drop_all_but_best(table, 1) == []
    assert all_pairs(tiny_geometry) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    drops = random_drops(tiny_geometry, 0.5, 4, 0)
    assert [len(set(drop)) for drop in drops] == [3] * 4
    assert len({tuple(drop) for drop in drops}) > 1
    assert drops == random_drops(tiny_geometry, 0.5, 4, 0)


def test_diagnosis():
    got = diagnosis({0: torch.tensor([0.5, 0.02]), 3: torch.tensor([0.4, 0.0])})
    assert got["pairs"] == 4
    assert got["share_above"] == pytest.approx(0.5)  # 0.02 in float32 is below 0.02
    assert got["pairs_for_90_percent"] == 2
    assert (got["max"], got["median"]) == (0.5, pytest.approx(0.21))
    assert diagnosis({0: torch.tensor([1.0] * 10)})["pairs_for_90_percent"] == 9
    assert diagnosis({0: torch.zeros(4)}) == {
        "pairs": 4, "threshold": 0.02, "share_above": 0.0, "max": 0.0, "median": 0.0, "pairs_for_90_percent": 0
    }  # fmt: skip
