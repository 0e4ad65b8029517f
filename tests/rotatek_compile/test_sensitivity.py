"""KL of the answers when heads are cut: nothing for what stays raw and for heads that nobody reads; the cache stays as it was."""

from dataclasses import replace

import pytest
import torch

from rotatek_compile.bases import pca
from rotatek_compile.cost_curves import distortions
from rotatek_compile.cutter import Cutter
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.recoding import recoded, runs_of
from rotatek_compile.sensitivity import TEMPERATURE, JointCheck, joint_kl, levels_for, measure

RAW, NONE = Slabs(32), Slabs()
LEVELS = (NONE, Slabs(8), Slabs(nibble=16))


def only_keys(count):
    """Native directions of the Keys alone."""
    return HeadPlan(Slabs(count), RAW)


def only_values(count):
    return HeadPlan(RAW, Slabs(count))


@pytest.fixture
def cutter(tiny, tiny_geometry):
    generator = torch.Generator().manual_seed(0)
    key, value = ({i: pca(a @ a.mT) for i, a in enumerate(torch.randn(3, 2, 32, 32, generator=generator))} for _ in range(2))
    return lambda model=tiny, span_all=False, window=None: Cutter(model, tiny_geometry, key, span_all, value, window)


def full_logprobs(model, item):
    ids = torch.tensor([item.prompt + item.answer[:-1]])
    with torch.no_grad():
        return model(input_ids=ids, **item.media).logits[0, -len(item.answer) :].float().log_softmax(-1)


def test_the_reference_is_a_plain_forward_pass(cutter, tiny, documents):
    for item in documents:
        doc = cutter().prefill(item)
        assert (doc.reference[0] - full_logprobs(tiny, item)).abs().max() < 1e-4
        assert doc.coded[0].sum(0).tolist() == {"0": [88], "1": [56, 52], "2": [52], "3": [88], "4": [56]}[item.sample.id]


def test_full_rank_costs_nothing_and_cuts_cost_more(cutter, documents):
    c = cutter()
    doc = c.prefill(documents[1])
    before = [(layer.keys.clone(), layer.values.clone(), layer.get_seq_length()) for layer in doc.cache.layers]
    for side in (only_keys, only_values):
        costs = [c.kl(doc, {layer: {0: side(rank), 1: side(rank)} for layer in range(3)}) for rank in (32, 16, 0)]
        assert costs[0][0] == 0
        assert 1e-3 < costs[1][0] < costs[2][0]
    fine, coarse = (HeadPlan(slabs, slabs) for slabs in (Slabs(16, 16), Slabs(nibble=32)))  # all directions, coded
    costs += [c.kl(doc, {layer: {0: head, 1: head} for layer in range(3)}) for head in (fine, coarse)]
    assert 0 < costs[3][0] < 1e-2 * costs[4][0] < 1e-2 * costs[1][0]
    assert costs[0][1] == len(documents[1].answer)
    for layer, (keys, values, length) in zip(doc.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert layer.get_seq_length() == length == documents[1].visual_end
    with torch.inference_mode():
        assert torch.equal(next(c._answers(doc, [({}, ())])), doc.reference)


def test_a_cut_to_nothing_is_the_mean(cutter, tiny, documents, tiny_geometry):
    """By hand: image Keys of one head replaced by their mean, everything else as it was."""
    item = documents[0]
    c = cutter()
    doc = c.prefill(item)
    got, tokens = c.kl(doc, {1: {1: only_keys(0)}})
    layer = doc.cache.layers[1]
    layer.keys = layer.keys.clone()
    layer.keys[0, 1, 3:91] = layer.keys[0, 1, 3:91].mean(0)
    with torch.no_grad():
        rest = torch.tensor([item.prompt[item.visual_end :] + item.answer[:-1]])
        logits = tiny(input_ids=rest, past_key_values=doc.cache).logits[0, -len(item.answer) :].log_softmax(-1)
    dense = full_logprobs(tiny, item)
    assert got == pytest.approx(float((dense.exp() * (dense - logits)).sum()), rel=1e-3)
    assert got > 1e-4
    assert tokens == len(item.answer)


def test_a_head_that_nobody_reads(cutter, make_silent, documents):
    c = cutter(make_silent)
    found = measure(c, documents[:2], LEVELS[:2], True)
    for table in (found.key, found.value):
        assert table[2][1].abs().max() < 1e-6  # KV head 1 of layer 2
        assert table[2][0, 0] > 1e-4
        assert table[1].min() > 0


@pytest.fixture
def make_silent(tiny):
    """The model with the output projection of KV head 1 of layer 2 (query heads 2 and 3) set to zero."""
    weight = tiny.model.language_model.layers[2].self_attn.o_proj.weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight[:, 64:] = 0
    yield tiny
    with torch.no_grad():
        weight.copy_(saved)


def test_measure_is_the_mean_per_answer_token(cutter, documents):
    c = cutter()
    found = measure(c, documents[:3], (*LEVELS, RAW), True)
    for table, side in ((found.key, only_keys), (found.value, only_values)):
        assert [tuple(t.shape) for t in table.values()] == [(2, 4)] * 3
        parts = [c.kl(c.prefill(item), {1: {0: side(8)}}) for item in documents[:3]]
        assert float(table[1][0, 1]) == pytest.approx(sum(p for p, _ in parts) / sum(n for _, n in parts), rel=1e-4)
        assert all(t[:, 3].max() == 0 for t in table.values())
    docs = [c.prefill(item) for item in documents[:3]]
    plan = {i: [only_keys(32), only_keys(32)] for i in range(3)} | {1: [only_keys(8), only_keys(32)]}
    assert joint_kl(c, docs, plan) == pytest.approx(float(found.key[1][0, 1]), rel=1e-2, abs=1e-6)


def test_span_all_cuts_text_too(cutter, documents):
    item = documents[1]
    doc = cutter(span_all=True).prefill(item)
    assert torch.equal(doc.coded.sum(-1), torch.ones(1, item.visual_end))
    assert doc.images[0].sum(0).tolist() == [56, 52] == doc.coded[0].sum(0).tolist()[:2]
    assert {run[1:] for run in runs_of(doc.images)} < {run[1:] for run in doc.runs}  # images are segments of their own, as in a cache


def test_the_newest_text_is_cut_no_more_than_a_cache_codes_it(cutter, documents):
    """The oldest text in whole blocks, counted from the prompt's end; images always."""
    one = replace(documents[1], prompt=[7] * 150 + documents[1].prompt, visual_end=documents[1].visual_end + 150)
    text = len(one.prompt) - 108
    for window, old in ((0, text // 64 * 64), (20, (text - 20) // 64 * 64), (text - 64, 64), (text - 63, 0), (text, 0), (10**6, 0)):
        doc = cutter(span_all=True, window=window).prefill(one)
        before = one.visual_end - 108
        assert doc.coded.sum() == 108 + min(old, before)
        places = doc.coded[0].sum(-1).bool() & ~doc.images[0].any(-1)
        wanted = (~doc.images[0].any(-1)).nonzero().flatten()[: min(old, before)]
        assert torch.equal(places.nonzero().flatten(), wanted)


def test_levels():
    assert levels_for(128) == (Slabs(), Slabs(nibble=16), Slabs(nibble=32), Slabs(nibble=64))
    assert levels_for(64) == (Slabs(), Slabs(nibble=16), Slabs(nibble=32))
    assert levels_for(80) == levels_for(64)
    assert levels_for(32) == (Slabs(), Slabs(nibble=16))
    assert levels_for(16) == levels_for(8) == (Slabs(), Slabs(byte=8))


def test_many_cuts_at_once_are_each_alone(cutter, documents):
    """Whatever shares a call: heads of one layer, of several layers, knock-outs, and documents of other lengths."""
    c = cutter()
    doc = c.prefill(*documents)
    cuts = [
        ({1: {0: only_keys(8)}}, ()),
        ({1: {1: only_keys(0)}}, ()),
        ({2: {0: only_values(8)}}, ()),
        ({0: {0: HeadPlan(Slabs(nibble=16), Slabs(0, 8)), 1: only_keys(8)}, 2: {1: only_values(0)}}, ()),
        ({}, [(1, 1)]),
        ({2: {1: only_keys(8)}}, [(2, 0)]),
    ]
    together = c.kl_each(doc, cuts)
    alone = torch.stack([c.kl_rows(doc, *cut) for cut in cuts])
    single = torch.stack([torch.cat([c.kl_rows(c.prefill(item), *cut) for item in documents]) for cut in cuts])
    assert together.shape == (6, 5)
    assert together.min() > 1e-5
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-6)
    assert torch.allclose(together, single, rtol=1e-3, atol=1e-6)
    assert torch.allclose(together[1], together[4], rtol=1e-3, atol=1e-6)  # no direction of the Keys: a knock-out (knockout.py)


@pytest.mark.parametrize("span_all", [False, True])
def test_shared_reading_equals_the_stock_kernel_on_a_cut_cache(cutter, tiny, documents, span_all):
    """Nothing of rereading.py: each document alone, the cut written into its cache, the model's own attention."""
    c = cutter(span_all=span_all)
    mixed = {0: {0: HeadPlan(Slabs(8, 8, 16), Slabs(nibble=16)), 1: only_values(8)}, 2: {1: only_keys(0)}}
    cuts = [({1: {0: only_keys(8)}}, ()), (mixed, ()), ({2: {1: only_values(8)}}, [(2, 0)])]
    together = c.kl_each(c.prefill(*documents), cuts)
    for row, item in enumerate(documents):
        dense, doc = full_logprobs(tiny, item).double(), c.prefill(item)
        rest = torch.tensor([item.prompt[item.visual_end :] + item.answer[:-1]])
        for number, cut in enumerate(cuts):
            with c.cut(doc, *cut), torch.no_grad():
                logits = tiny(input_ids=rest, past_key_values=doc.cache).logits[0, -len(item.answer) :]
            kl = float((dense.exp() * (dense - logits.double().log_softmax(-1))).sum(-1).clamp_min(0).sum())
            assert float(together[number, row]) == pytest.approx(kl, rel=1e-2, abs=1e-6), (number, row)


def test_layers_below_a_cut_are_not_run_again(cutter, documents, monkeypatch):
    c = cutter()
    doc = c.prefill(documents[0])
    whole = c.kl_rows(doc, {2: {0: only_keys(0)}})
    runs, attention = [], type(c.layers[0].self_attn).forward
    monkeypatch.setattr(
        type(c.layers[0].self_attn), "forward", lambda self, *a, **k: runs.append(self.layer_idx) or attention(self, *a, **k)
    )
    assert torch.equal(c.kl_rows(doc, {2: {0: only_keys(0)}}), whole)
    assert runs == [2]
    monkeypatch.setattr(c, "layers", None)  # a model whose layers are not found runs all of them, to the same end
    assert torch.allclose(c.kl_rows(doc, {2: {0: only_keys(0)}}), whole, rtol=1e-4)
    assert runs == [2, 0, 1, 2]
    assert all("forward" not in layer.__dict__ for layer in cutter().layers)


def test_what_costs_nothing_is_not_measured_further(cutter, make_silent, documents, monkeypatch):
    """Of the silent head only the lowest level is measured; the others fall with what they discard, and the share of such is told."""
    c, asked, kl_each = cutter(make_silent), [], Cutter.kl_each
    monkeypatch.setattr(Cutter, "kl_each", lambda self, doc, cuts: asked.extend(cuts) or kl_each(self, doc, cuts))
    found = measure(c, documents[:2], LEVELS, True)
    silent = [plan for plan, _ in asked if list(plan) == [2] and list(plan[2]) == [1]]
    assert silent == [{2: {1: only_keys(0)}}, {2: {1: only_values(0)}}] * 2
    assert found.bounded == pytest.approx(2 / 18)  # two of the silent head's three levels, of six heads
    for side, table in (("key", found.key), ("value", found.value)):
        lost = distortions(c.spectra[side][2][1], LEVELS)
        assert table[2][1].tolist() == pytest.approx([float(table[2][1, 0]) * share for share in lost], rel=1e-4) and lost[2] < lost[1] < 1
    assert (found.key[1].diff() != 0).all() and (found.value[1].diff() != 0).all()


def test_parked_documents_count_the_same(cutter, documents):
    c = cutter()
    doc = c.prefill(*documents[:2])
    plan = {i: [only_keys(8), HeadPlan(NONE, Slabs(nibble=16))] for i in range(3)}
    before = joint_kl(c, [doc], plan)
    assert doc.bytes() == 3 * 2 * 2 * 2 * doc.prefix.ids.shape[1] * 32 * 4
    doc.park()
    parked = [layer.keys for layer in doc.cache.layers]
    assert joint_kl(c, [doc], plan) == before > 1e-4
    assert all(layer.keys is keys for layer, keys in zip(doc.cache.layers, parked, strict=True))


def test_a_plan_that_costs_too_much_is_not_read_to_the_end(cutter, documents, monkeypatch):
    c = cutter()
    docs = [c.prefill(item) for item in documents]
    plan = {i: [only_keys(8), only_values(8)] for i in range(3)}
    read, kl = [], Cutter.kl
    monkeypatch.setattr(Cutter, "kl", lambda self, doc, cuts: read.append(doc) or kl(self, doc, cuts))
    whole = joint_kl(c, docs, plan)
    assert len(read) == 5 and joint_kl(c, docs, plan, most=whole) == whole and len(read) == 10
    assert whole > joint_kl(c, docs, plan, most=whole / 10) > whole / 10 and len(read) < 14
    check = JointCheck(c, docs)
    assert check.lead(lambda: check(plan)) == whole and check(plan, whole / 10) > whole / 10


def test_stress(cutter, documents):
    """At twice the errors, x + 2 (coded - x), KL is about four times as large."""
    c = cutter()
    docs = [c.prefill(*documents[:2]), c.prefill(documents[2])]
    plan = {i: [HeadPlan(Slabs(nibble=32), Slabs(8, 8, 16))] * 2 for i in range(3)}
    x, wanted = docs[0].cache.layers[1].keys, {(0, Slabs(nibble=32))}
    once, twice = (recoded(x, docs[0].runs, c.bases["key"][1], wanted, errors)[0, Slabs(nibble=32)] for errors in (1.0, 2.0))
    assert torch.allclose(twice - x[:, 0], 2 * (once - x[:, 0]), atol=1e-5) and not torch.equal(once, x[:, 0])
    check = JointCheck(c, docs)
    plain = check(plan)
    with c.stressed(2.0):
        at_twice = check(plan)
    assert 3 * plain < at_twice < 5 * plain and c.errors == 1


def test_plans_are_compared_at_a_higher_temperature(cutter, tiny, documents):
    """KL between softmax(logits / T) of the dense and the cut model, by hand; what is asked for in nats stays at 1."""
    c, item = cutter(), documents[0]
    doc, plan = c.prefill(item), {i: [only_keys(8), only_keys(8)] for i in range(3)}
    check = JointCheck(c, [doc])
    with c.cut(doc, {i: dict(enumerate(heads)) for i, heads in plan.items()}), torch.no_grad():
        (got,) = c._answers(doc, [({}, ())])
    for asked, temperature in ((check, 1.0), (check.tempered, TEMPERATURE)):
        p, q = ((x / temperature).softmax(-1) for x in (doc.reference, got))
        assert asked(plan) == pytest.approx(float((p * (p / q).log()).sum().detach()) / len(item.answer), rel=1e-4)
    assert check(plan) != pytest.approx(check.tempered(plan), rel=0.1) and c.temperature == 1


def test_relief_is_what_a_raw_head_saves(cutter, documents, monkeypatch):
    monkeypatch.setattr("rotatek_compile.sensitivity.WORST", 1)
    c = cutter()
    docs = [c.prefill(item) for item in documents[:2]]
    plan = {i: [only_keys(8), HeadPlan(Slabs(nibble=16), Slabs(nibble=16))] for i in range(3)} | {2: [HeadPlan(RAW, RAW), only_keys(0)]}
    check = JointCheck(c, docs)
    check(plan)  # says which document is the worst
    found = check.relief(plan)
    assert sorted(found) == [(i, h) for i in range(3) for h in range(2)] and abs(found[2, 0]) < 1e-5
    with c.stressed(2.0), c.tempered(TEMPERATURE):
        costs = [c.kl(doc, {i: dict(enumerate(heads)) for i, heads in plan.items()})[0] for doc in docs]
        without = [c.kl(doc, {0: {0: plan[0][0], 1: plan[0][1]}, 1: {0: plan[1][0]}, 2: {1: plan[2][1]}})[0] for doc in docs]
    worst = max((0, 1), key=lambda n: costs[n])
    assert check.docs[0] is docs[worst] and found[1, 1] == pytest.approx(1 - without[worst] / costs[worst], rel=1e-3)
    assert abs(found[1, 1]) > 1e-3
