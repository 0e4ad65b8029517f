"""Scores on hand values, and the evaluator: batches, modes, greedy answers and KL against plain model calls."""

import pytest
import torch

from rotatek_compile.evaluate import Evaluator, anls, evaluate, exact_match, normalise
from rotatek_compile.runtime.enable import enable

EOS = 2


def test_exact_match_normalises():
    assert normalise("  a \t b\n") == "a b"
    assert exact_match("Cafe\u0301  noir ", ["x", "Caf\u00e9 noir"])
    assert not exact_match("cafe noir", ["Cafe noir"])  # case counts
    assert not exact_match("ab", ["a b"])
    assert not exact_match("x", [])


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("Hello", ["hello"], 1.0),
        ("hella", ["hello"], 0.8),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abxy"], 0.5),
        ("abc", ["axy"], 0.0),
        ("hella", ["zzz", "hello"], 0.8),
        ("", ["a"], 0.0),
        ("a  b", ["a b"], 1.0),
        ("", [""], 1.0),
    ],
)
def test_anls_by_hand(text, answers, expected):
    assert anls(text, answers) == pytest.approx(expected)


def evaluator(tiny, fake_processor, ask, new=6):
    return Evaluator(tiny, fake_processor, ask, (EOS,), new)


def logprobs(tiny, item):
    ids = torch.tensor([item.prompt + item.answer[:-1]])
    with torch.no_grad():
        return tiny(input_ids=ids, **item.media).logits[0, -len(item.answer) :].float().log_softmax(-1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ask", ["after", "with"])
def test_dense_is_the_plain_model(tiny, fake_processor, documents, ask, batch):
    run = evaluator(tiny, fake_processor, ask)
    for start in range(0, len(documents), batch):
        items = documents[start : start + batch]
        answered = run.answer(items, run.dense_cache())
        for item, got, ids in zip(items, answered.logprobs, answered.generated, strict=True):
            assert got.shape[0] == len(item.answer)
            assert (got - logprobs(tiny, item)).abs().max() < 1e-4
            prompt = torch.tensor([item.prompt])
            stock = tiny.generate(input_ids=prompt, **item.media, max_new_tokens=6, do_sample=False, eos_token_id=EOS)
            assert ids == stock[0, prompt.shape[1] :].tolist()


def rows(tiny, fake_processor, documents, artifact, ask, batch):
    run = evaluator(tiny, fake_processor, ask)
    with enable(tiny, artifact, backend="torch") as enabled:
        return evaluate(run, documents, {"dense": run.dense_cache, "artifact": enabled.new_cache}, batch)


@pytest.mark.parametrize("ask", ["after", "with"])
def test_batches_score_alike(tiny, fake_processor, documents, make_artifact, ask):
    artifact = make_artifact([[8, 24], [0, 16], [8, 8]], span="all")
    one, three = (rows(tiny, fake_processor, documents, artifact, ask, batch) for batch in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert (a.samples, a.exact, a.texts, a.answer_tokens) == (b.samples, b.exact, b.texts, b.answer_tokens)
        assert a.kl == pytest.approx(b.kl, rel=1e-3, abs=1e-6)
        assert a.anls == pytest.approx(b.anls)
        assert a.bytes.dense == b.bytes.dense  # real tokens only
    assert one[0].kl == 0.0
    assert one[1].kl > 1e-3
    assert one[1].answer_tokens == sum(len(item.answer) for item in documents)


@pytest.mark.parametrize("ask", ["after", "with"])
def test_full_rank_has_no_kl(tiny, fake_processor, documents, make_artifact, ask):
    dense, artifact = rows(tiny, fake_processor, documents, make_artifact(span="all"), ask, 3)
    assert abs(artifact.kl) < 1e-5
    assert artifact.texts == dense.texts


def test_after_is_compressed_before_the_question_and_with_is_not(tiny, fake_processor, documents, make_artifact):
    """With nothing kept, the first answer token is exact in mode `with` and off in mode `after`."""
    for ask, exact in (("after", False), ("with", True)):
        run = evaluator(tiny, fake_processor, ask)
        with enable(tiny, make_artifact(0), backend="torch") as enabled:
            answered = run.answer(documents[:1], enabled.new_cache())
        error = (answered.logprobs[0] - logprobs(tiny, documents[0])).abs().amax(-1)
        assert (error[0] < 1e-4) == exact
        assert error[1] > 1e-3


def test_kl_is_what_it_says(tiny, fake_processor, documents, make_artifact):
    run = evaluator(tiny, fake_processor, "after")
    _, row = rows(tiny, fake_processor, documents[:2], make_artifact(8), "after", 2)
    total = 0.0
    with enable(tiny, make_artifact(8), backend="torch") as enabled:
        for item in documents[:2]:
            got, dense = run.answer([item], enabled.new_cache()).logprobs[0].double(), logprobs(tiny, item).double()
            total += float((dense.exp() * (dense - got)).sum())
    assert row.kl == pytest.approx(total, rel=1e-3)
    assert row.to_json()["kl"] == pytest.approx(total / sum(len(item.answer) for item in documents[:2]), rel=1e-3)


def test_exact_matches_are_counted(tiny, fake_processor, documents):
    from dataclasses import replace

    run = evaluator(tiny, fake_processor, "after", new=3)
    texts = evaluate(run, documents, {"dense": run.dense_cache}, 2)[0].texts
    answers = [("no", text) if n < 3 else ("no",) for n, text in enumerate(texts)]
    right = [replace(d, sample=replace(d.sample, answers=a)) for d, a in zip(documents, answers, strict=True)]
    row = evaluate(run, right, {"dense": run.dense_cache}, 2)[0].to_json()
    assert row["exact_match"] == 3 / 5
    assert row["anls"] >= 3 / 5
