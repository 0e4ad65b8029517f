"""Answers that are known from the teacher-forced pass are those that generating would give, and only the others are generated."""

from dataclasses import replace

import pytest
import torch

from rotatek_compile.evaluate import Evaluator, evaluate
from rotatek_compile.runtime.enable import enable

NEW = 6


def generated_by(run, item, cache):
    """What greedy decoding gives: no answer begins with this reference, so none is taken from it."""
    return run.answer([replace(item, answer=[-1 % run.model.config.get_text_config().vocab_size, *item.answer])], cache).generated[0]


def answered_by_the_model(tiny, fake_processor, documents, ask):
    """Documents whose reference is what the dense model generates, but for the second and fourth; and the tokens that end answers."""
    free = Evaluator(tiny, fake_processor, ask, (-1,), NEW)
    greedy = [generated_by(free, item, free.dense_cache()) for item in documents]
    ends = tuple(sorted({ids[2] for ids in greedy}))
    answers = [ids[: 1 + next(n for n, token in enumerate(ids) if token in ends)] for ids in greedy]
    for n in (1, 3):
        answers[n] = [(answers[n][0] + 1) % 50, *answers[n]]
    return [replace(item, answer=answer) for item, answer in zip(documents, answers, strict=True)], ends


@pytest.mark.parametrize("ask", ["after", "with"])
def test_as_generated(tiny, fake_processor, documents, make_artifact, ask, monkeypatch):
    items, ends = answered_by_the_model(tiny, fake_processor, documents, ask)
    run, generated_rows, greedy = Evaluator(tiny, fake_processor, ask, ends, NEW), [], Evaluator._greedy
    with enable(tiny, make_artifact([[8, 24], [0, 16], [8, 8]]), backend="torch") as enabled:
        makers = {"dense": run.dense_cache, "ours": enabled.new_cache}
        wanted = {name: [run.text(generated_by(run, item, make())) for item in items] for name, make in makers.items()}
        monkeypatch.setattr(Evaluator, "_greedy", lambda self, some, *rest: generated_rows.append(len(some)) or greedy(self, some, *rest))
        rows = evaluate(run, items, makers, 3)
    assert {row.method: row.texts for row in rows} == wanted
    assert generated_rows[0] == 1  # of the first batch the dense model is right about the first and the third document
    assert sum(generated_rows) < 2 * len(items)


def test_the_callers_cache_keeps_all_rows(tiny, fake_processor, documents):
    items, ends = answered_by_the_model(tiny, fake_processor, documents, "after")
    run = Evaluator(tiny, fake_processor, "after", ends, NEW)
    cache = run.dense_cache()
    answered = run.answer(items[:3], cache)  # the second is generated
    assert cache.layers[0].keys.shape[0] == 3 and len(answered.generated) == 3
    assert answered.generated[0] == items[0].answer and answered.generated[1] != items[1].answer
    assert answered.tokens == [len(item.prompt) + len(item.answer) - 1 for item in items[:3]]


def test_bytes_do_not_depend_on_what_is_generated(tiny, fake_processor, documents):
    run = Evaluator(tiny, fake_processor, "after", (-1,), NEW)
    wrong = replace(documents[0], answer=[1, 2, 3])
    answered = run.answer([wrong], run.dense_cache())
    assert len(answered.generated[0]) == NEW and answered.generated[0] != wrong.answer
    assert answered.bytes.total == answered.bytes.dense and answered.tokens == [len(wrong.prompt) + 2]


def test_an_answer_longer_than_may_be_generated_is_cut(tiny, fake_processor, documents):
    items, ends = answered_by_the_model(tiny, fake_processor, documents, "after")
    run = Evaluator(tiny, fake_processor, "after", ends, 2)
    assert len(items[0].answer) > 2
    with torch.inference_mode():
        assert run.answer(items[:1], run.dense_cache()).generated == [generated_by(run, items[0], run.dense_cache())]
