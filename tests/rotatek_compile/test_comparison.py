"""Ours beside the best rivals of the same bytes and of more: which those are, and the paired ratio of KLs."""

import math
from dataclasses import fields

import numpy as np
import pytest

from rotatek_compile.comparison import Against, against_rivals, span_share
from rotatek_compile.methods import Entry
from rotatek_compile.outcomes import Outcome, Row, kl_ratio
from rotatek_compile.runtime.accounting import CacheBytes
from rotatek_compile.statistics import Bootstrap
from rotatek_compile.suite import Measured

KL = np.array([0.4, 0.8, 0.1, 0.5, 0.2])


def row(method, kl, share=0.0, ids=None):
    """Five documents of 2 answer tokens, 1000 dense bytes of coded span each."""
    sizes = dict.fromkeys((f.name for f in fields(CacheBytes)), 0.0) | {"span": 1000.0 * share, "span_dense": 1000.0 if share else 0.0}
    names = ids or [str(n) for n in range(len(kl))]
    return Row(method, [Outcome(name, "", method, True, 1.0, float(k), 2, "", sizes) for name, k in zip(names, kl, strict=True)])


def measured(method, kl, share, ask="after", ours=False, **entry):
    return Measured(ask, Entry(method, lambda: None, ours=ours, **entry), row(method, kl, share), row("dense", 0 * KL))


def ours(kl=KL / 4, share=0.12, budget=0.125, **more):
    return measured("rotatek", kl, share, ours=True, setting=f"KV budget {budget}", requested_budget=budget, kv_budget=budget, **more)


def test_the_best_rival_within_the_budget():
    one = ours()
    rivals = [
        measured("dense", 0 * KL, 0.0),
        measured("head-drop", KL, 0.124, setting="4 of 20", requested_budget=0.125, kv_budget=0.125),
        measured("head-drop", KL / 100, 0.24, setting="8 of 20", requested_budget=0.25, kv_budget=0.25),  # takes more than it may
        measured("think", 10 * KL, 0.5, setting="1 of 128", requested_budget=0.125, kv_budget=0.504),
    ]
    found = against_rivals(one, [one, *rivals])
    within, above = found.within, found.above
    assert (within.rival, within.span, within.kl) == ("head-drop (4 of 20)", 0.124, pytest.approx(KL.sum() / 10))
    assert [within.ratio, within.low, within.high] == pytest.approx([0.25] * 3)
    assert (above.rival, above.span, above.ratio) == ("think (1 of 128)", 0.5, pytest.approx(0.025))
    assert found.to_json() == {
        "rival": within.rival, "rival_span": 0.124, "rival_kl": within.kl, "rival_ratio": within.ratio, "rival_low": within.low,
        "rival_high": within.high, "above": above.rival, "above_span": 0.5, "above_kl": above.kl, "above_ratio": above.ratio,
        "above_low": above.low, "above_high": above.high,
    }  # fmt: skip


def test_a_rival_that_cannot_do_with_so_little_stands_at_its_smallest():
    one = ours()
    rivals = [
        measured("kivi2", KL / 2, 0.19, setting="2 bit"),
        measured("kivi4", KL / 1000, 0.32, setting="4 bit"),  # one setting, its smallest
        measured("think", KL / 9999, 0.75, setting="64 of 128"),
        measured("think", 10 * KL, 0.5, setting="1 of 128"),
    ]
    found = against_rivals(one, [one, *rivals])
    assert found.within is None
    assert found.above.rival == "kivi4 (4 bit)" and found.above.ratio == pytest.approx(250)


def test_what_a_rival_was_promised_at_counts_as_its_size():
    """Documents of short images cost every method more than the budget, which holds from 512 tokens."""
    one = ours(share=0.14)
    near = measured("head-drop", KL, 0.15, setting="4 of 20", kv_budget=0.125)
    beyond = measured("head-drop", KL / 9, 0.2, setting="6 of 20", kv_budget=0.19)
    within = measured("int1", KL / 2, 0.139)
    assert against_rivals(one, [one, near, beyond, within]).within.rival == "int1"
    assert against_rivals(one, [one, near, beyond]).within.rival == "head-drop (4 of 20)"


def test_only_the_same_mode_is_compared():
    one, other = ours(), measured("int4", KL, 0.1, ask="with")
    assert against_rivals(one, [one, other]) is None


def test_what_is_not_compared():
    rival = measured("int4", KL, 0.1, requested_budget=0.125, kv_budget=0.125)
    plain = measured("rotatek", KL, 0.7, ours=True, setting="uniform, 32 directions", keep_ratio=0.25)
    assert against_rivals(rival, [rival, plain]) is None and against_rivals(plain, [rival, plain]) is None
    assert against_rivals(ours(), [ours()]) is None
    assert plain.to_json()["against"] is None and set(Against().to_json().values()) == {None}
    assert plain.table_rows()[0] | Against().to_json() == plain.table_rows()[0]


def test_a_rival_that_loses_nothing_gives_no_number():
    one = ours()
    found = against_rivals(one, [one, measured("int8", 0 * KL, 0.1)]).within
    assert (found.kl, found.ratio, found.low, found.high) == (0, None, None, None)
    lossless = ours(kl=0 * KL)
    found = against_rivals(lossless, [lossless, measured("int8", KL, 0.1)]).within
    assert (found.ratio, found.low, found.high) == (0, 0, 0)


def test_the_ratio_is_paired_over_documents():
    noise = np.random.default_rng(0).lognormal(0, 2, 200)
    first, second = row("a", 0.5 * noise), row("b", noise)
    ratio, (low, high) = kl_ratio(first, second)
    assert ratio == low == high == pytest.approx(0.5)  # though either KL alone has a wide interval
    mixed = noise * np.linspace(0.4, 0.6, 200)
    ratio, (low, high) = kl_ratio(row("a", mixed), second)
    assert ratio == pytest.approx(mixed.sum() / noise.sum()) and low < ratio < high
    assert (low, high) == Bootstrap(200).ratio(mixed, noise)
    assert kl_ratio(first, row("b", 0 * noise)) == (math.inf, (math.inf, math.inf))
    assert math.isnan(kl_ratio(row("a", 0 * noise), row("b", 0 * noise))[0])
    with pytest.raises(ValueError, match="different documents"):
        kl_ratio(row("a", KL), row("b", KL, ids=list("abcde")))


def test_span_share():
    assert span_share(row("a", KL, 0.3)) == pytest.approx(0.3) and span_share(row("dense", KL)) == 1
