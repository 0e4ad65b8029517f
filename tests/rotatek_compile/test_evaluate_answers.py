"""Answers that are known from the teacher-forced pass are those that generating would give, and only the others are generated."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rotatek_compile.batches import Chunk
from rotatek_compile.evaluate import Evaluator, Prefilled, evaluate
from rotatek_compile.methods import Methods
from rotatek_compile.runtime.enable import enable
from rotatek_compile.token_entries import token_entries

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


def test_text_that_is_coded_between_question_and_answer_is_generated(tiny, fake_processor, documents, make_artifact):
    """Read at once, the question and the answer see all text raw; token by token the window moves on, and its oldest text is coded."""
    free, draw = Evaluator(tiny, fake_processor, "after", (-1,), 4), torch.Generator().manual_seed(3)
    asked = torch.randint(60, 90, (3, 150), generator=draw).tolist()
    with enable(tiny, make_artifact([[0, 8]] * 3, span="all"), backend="torch") as enabled:
        wrong = 0
        for item, question in zip(documents, asked, strict=False):
            item, answer = replace(item, prompt=item.prompt + question), []
            for _ in range(4):  # a reference that the teacher-forced pass agrees with
                read = free.answer([replace(item, answer=[*answer, 0])], enabled.new_cache())
                answer.append(int(read.logprobs[0][-1].argmax()))
            wanted = generated_by(free, item, enabled.new_cache())
            wrong += wanted != answer
            assert free.answer([replace(item, answer=answer)], enabled.new_cache()).generated == [wanted]
        assert wrong
        cache = enabled.new_cache()
        assert cache.codes_text([500]) == [False]
        free.answer(documents[:1], cache)
        held = int(cache.layers[0].store.window.host[0])  # the window is of 32 tokens, blocks are of 64
        assert cache.codes_text([95 - held]) == [False] and cache.codes_text([96 - held]) == [True]
    with enable(tiny, make_artifact([[0, 8]] * 3), backend="torch") as enabled:
        cache = enabled.new_cache()
        free.answer(documents[:1], cache)
        assert cache.codes_text([500]) == [False]  # raw text stays raw


def test_nothing_follows_the_end_of_an_answer(tiny, fake_processor):
    run = Evaluator(tiny, fake_processor, "after", (7, 9), 4)
    assert run._to_end([1, 9, 2, 7]) == [1, 9] and run._to_end([1, 2]) == [1, 2] and run._to_end([7]) == [7]


def test_rows_are_selected_by_whole_numbers(tiny, fake_processor, monkeypatch):
    """The logits' dtype has no 257."""
    run, picked = Evaluator(tiny, fake_processor, "with", (2,), 4), []
    sample = SimpleNamespace(answer=[2])
    prefilled = Prefilled(
        [sample] * 300, Chunk(*torch.ones(2, 300, 1).long()), [[]] * 300, torch.zeros(300, 1, 4, dtype=torch.bfloat16), None
    )
    right, wrong = torch.eye(4)[2:3], torch.eye(4)[1:2]
    monkeypatch.setattr(Evaluator, "_forced", lambda self, *_: [wrong if row in (257, 299) else right for row in range(300)])
    monkeypatch.setattr(Evaluator, "_greedy", lambda self, items, *_: [[3]] * len(items))
    monkeypatch.setattr("rotatek_compile.evaluate.bytes_of", lambda *_: None)
    cache = SimpleNamespace(batch_select_indices=lambda rows: picked.extend(rows.tolist()))
    monkeypatch.setattr("copy.deepcopy", lambda one: one)
    assert run._answer(prefilled, cache).generated[256:258] == [[2], [3]] and picked == [257, 299]


@pytest.mark.parametrize("selected", [None, "snapkv", "fastv"])
def test_rivals_and_chosen_tokens_as_generated(tiny, fake_processor, documents, make_artifact, selected):
    """Rows that are generated come from a cache of fewer rows, with what each rival and each choice of tokens keeps beside it."""
    items, ends = answered_by_the_model(tiny, fake_processor, documents, "after")
    run = Evaluator(tiny, fake_processor, "after", ends, NEW)
    with enable(tiny, make_artifact([[8, 24], [0, 16], [8, 8]]), backend="torch") as enabled:
        methods, names = Methods(enabled), ("int4", "kivi2", "hadamard4", "fp8")
        entries = token_entries(methods, names[:2], (), (), (selected,), (0.5,)) if selected else methods.chosen(names, (), ())
        makers = {"dense": methods.dense().make} | {entry.label: entry.make for entry in entries}
        wanted = {name: [run.text(generated_by(run, item, make())) for item in items] for name, make in makers.items()}
        assert {row.method: row.texts for row in evaluate(run, items, makers, 3)} == wanted and len(makers) > 2
