"""Answers that are known from the teacher-forced pass are those that generating would give."""

from dataclasses import replace

import pytest
import torch
from sure_answers import SureEvaluator

from rotatek_compile.evaluate import Evaluator, evaluate
from rotatek_compile.runtime.enable import enable

NEW = 6


def answered_by_the_model(tiny, fake_processor, documents, ask):
    """Documents whose reference is what the dense model generates, but for the second and fourth; and the tokens that end answers."""
    free = Evaluator(tiny, fake_processor, ask, (-1,), NEW)
    greedy = [ids for item in documents for ids in free.answer([item], free.dense_cache()).generated]
    ends = tuple(sorted({ids[2] for ids in greedy}))
    answers = [ids[: 1 + next(n for n, token in enumerate(ids) if token in ends)] for ids in greedy]
    for n in (1, 3):
        answers[n] = [(answers[n][0] + 1) % 50, *answers[n]]
    return [replace(item, answer=answer) for item, answer in zip(documents, answers, strict=True)], ends


@pytest.mark.parametrize("ask", ["after", "with"])
def test_as_generated(tiny, fake_processor, documents, make_artifact, ask, monkeypatch):
    items, ends = answered_by_the_model(tiny, fake_processor, documents, ask)
    generated_rows = []
    greedy = Evaluator._greedy
    monkeypatch.setattr(Evaluator, "_greedy", lambda self, some, *rest: generated_rows.append(len(some)) or greedy(self, some, *rest))
    found = {}
    for kind in (Evaluator, SureEvaluator):
        run = kind(tiny, fake_processor, ask, ends, NEW)
        with enable(tiny, make_artifact([[8, 24], [0, 16], [8, 8]]), backend="torch") as enabled:
            rows = evaluate(run, items, {"dense": run.dense_cache, "ours": enabled.new_cache}, 3)
        found[kind] = rows, generated_rows[:]
        generated_rows.clear()
    (plain, plain_rows), (sure, sure_rows) = found[Evaluator], found[SureEvaluator]
    assert plain_rows == [3, 3, 2, 2] and sum(sure_rows) < sum(plain_rows)
    assert sure_rows[0] == 1  # of the first batch the dense model is right about the first and the third document
    for a, b in zip(plain, sure, strict=True):
        assert a.texts == b.texts
        assert [o.kl for o in a.outcomes] == [o.kl for o in b.outcomes]
        for name in ("span", "span_dense", "fallback_heads"):
            assert sum(o.bytes[name] for o in a.outcomes) == pytest.approx(sum(o.bytes[name] for o in b.outcomes))


def test_the_callers_cache_keeps_all_rows(tiny, fake_processor, documents):
    items, ends = answered_by_the_model(tiny, fake_processor, documents, "after")
    run = SureEvaluator(tiny, fake_processor, "after", ends, NEW)
    cache = run.dense_cache()
    answered = run.answer(items[:3], cache)  # the second is generated
    assert cache.layers[0].keys.shape[0] == 3 and len(answered.generated) == 3
    assert answered.generated[0] == items[0].answer and answered.generated[1] != items[1].answer
    assert answered.tokens == [len(item.prompt) + len(item.answer) - 1 for item in items[:3]]


def test_an_answer_longer_than_may_be_generated_is_cut(tiny, fake_processor, documents):
    items, ends = answered_by_the_model(tiny, fake_processor, documents, "after")
    run, plain = (kind(tiny, fake_processor, "after", ends, 2) for kind in (SureEvaluator, Evaluator))
    assert len(items[0].answer) > 2
    with torch.inference_mode():
        assert run.answer(items[:1], run.dense_cache()).generated == plain.answer(items[:1], plain.dense_cache()).generated
