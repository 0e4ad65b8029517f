"""The evaluator: batches, modes, the shared prefill, greedy answers and KL against plain model calls."""

import pytest
import torch

from rotatek_compile.evaluate import Evaluator, evaluate
from rotatek_compile.runtime.enable import enable

EOS = 2


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
        for one_doc, other in zip(a.outcomes, b.outcomes, strict=True):
            assert (one_doc.id, one_doc.exact, one_doc.text) == (other.id, other.exact, other.text)
            assert one_doc.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-6)
            assert one_doc.anls == pytest.approx(other.anls)
            assert one_doc.bytes["dense"] == other.bytes["dense"]  # real tokens only
        assert (a.samples, a.answer_tokens) == (b.samples, b.answer_tokens) == (5, sum(len(item.answer) for item in documents))
    assert one[0].kl == 0.0
    assert one[1].kl > 1e-3


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


def test_anls_is_the_same_as_a_column_and_as_the_sets_metric(tiny, documents):
    """Many tokenizers begin an answer with a blank, which the harness takes off before it counts edits and length."""
    from dataclasses import replace
    from types import SimpleNamespace

    padded = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0, decode=lambda ids, skip_special_tokens: "  Total: 12 "))
    asked = [replace(documents[0], sample=replace(documents[0].sample, answers=("total 12",), metric="anls"))]
    run = evaluator(tiny, padded, "after", new=2)
    [outcome] = evaluate(run, asked, {"dense": run.dense_cache}, 1)[0].outcomes
    assert outcome.anls == outcome.score == pytest.approx(8 / 9)


@pytest.mark.parametrize("ask", ["after", "with"])
def test_shared_prefill_gives_what_own_prefill_gives(tiny, fake_processor, documents, make_artifact, ask):
    run = evaluator(tiny, fake_processor, ask)
    with enable(tiny, make_artifact([[8, 24], [0, 16], [8, 8]]), backend="torch") as enabled:
        prefilled = run.prefill(documents[:3])
        for make in (enabled.new_cache, run.dense_cache, enabled.new_cache):  # the recording survives being used
            shared, own = run.finish(prefilled, make()), run.answer(documents[:3], make())
            assert shared.generated == own.generated
            assert (shared.bytes, shared.tokens) == (own.bytes, own.tokens)
            assert all(torch.equal(a, b) for a, b in zip(shared.logprobs, own.logprobs, strict=True))


def test_a_batch_is_prefilled_once(tiny, fake_processor, documents, make_artifact, monkeypatch):
    run, seen = evaluator(tiny, fake_processor, "after", new=2), []
    forward = type(tiny.model.vision_tower).forward
    monkeypatch.setattr(type(tiny.model.vision_tower), "forward", lambda self, *a, **k: seen.append(1) or forward(self, *a, **k))
    with enable(tiny, make_artifact(8), backend="torch") as enabled:
        evaluate(run, documents, {"dense": run.dense_cache, "a": enabled.new_cache, "b": enabled.new_cache}, 3)
    assert len(seen) == 2  # two batches, whatever the methods


def test_compressed_cache_needs_an_enabled_model(tiny, fake_processor, documents, make_artifact):
    run = evaluator(tiny, fake_processor, "after")
    with enable(tiny, make_artifact(8), backend="torch") as enabled:
        cache = enabled.new_cache()
    with pytest.raises(RuntimeError, match="inside rotatek_compile.enable"):
        run.finish(run.prefill(documents[:1]), cache)


def test_bytes_of_documents_sum_to_those_of_the_cache(tiny, fake_processor, documents, make_artifact):
    run = evaluator(tiny, fake_processor, "after")
    with enable(tiny, make_artifact(8), backend="torch") as enabled:
        whole = run.answer(documents, enabled.new_cache()).bytes
        row = evaluate(run, documents, {"dense": run.dense_cache, "artifact": enabled.new_cache}, 5)[1]
    assert row.to_json()["span_bytes"] * 5 == pytest.approx(whole.span)
    assert row.to_json()["kv_bytes"] * 5 == pytest.approx(whole.total)
    per_token = 3 * 2 * 2 * 32 * 2  # layers, Key and Value, heads, channels, bytes
    for item, outcome in zip(documents, row.outcomes, strict=True):
        tokens = outcome.bytes["dense"] / per_token
        assert len(item.prompt) <= tokens <= len(item.prompt) + 5 and tokens == int(tokens)


def test_finished_batches_are_not_run_again(tiny, fake_processor, documents, monkeypatch):
    run, kept = evaluator(tiny, fake_processor, "after", new=2), []
    methods = {"dense": run.dense_cache}
    whole = evaluate(run, documents, methods, 2, keep=lambda number, found: kept.append((number, found)))
    assert [number for number, _ in kept] == [0, 1, 2] and [len(found[0]) for _, found in kept] == [2, 2, 1]
    again, measured = [], []
    monkeypatch.setattr(run, "prefill", lambda items: measured.append(len(items)) or Evaluator.prefill(run, items))
    rest = evaluate(run, documents, methods, 2, finished=dict(kept[:2]), keep=lambda number, found: again.append(number))
    assert (again, measured) == ([0, 1, 2], [1]) and rest == whole
    [some] = evaluate(run, documents, methods, 2, numbers=[0, 2])
    assert some.outcomes == [*kept[0][1][0], *kept[2][1][0]]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cut", [(0, 1, 2), (1,)])
def test_a_prompt_that_ends_on_its_image(tiny, fake_processor, documents, make_artifact, batch, cut):
    """Some chat templates put the image last: the first answer token then comes from the prefill, whatever the other rows hold."""
    from dataclasses import replace

    items = [replace(d, prompt=d.prompt[: d.visual_end]) if n in cut else d for n, d in enumerate(documents[:3])]
    assert any(item.visual_end == len(item.prompt) for item in items)
    run = evaluator(tiny, fake_processor, "after")
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        answered = run.answer(part, run.dense_cache())
        for item, got, ids in zip(part, answered.logprobs, answered.generated, strict=True):
            assert (got - logprobs(tiny, item)).abs().max() < 1e-4
            prompt = torch.tensor([item.prompt])
            stock = tiny.generate(input_ids=prompt, **item.media, max_new_tokens=6, do_sample=False, eos_token_id=EOS)
            assert ids == stock[0, prompt.shape[1] :].tolist()
    _, full = rows(tiny, fake_processor, items, make_artifact(span="all"), "after", batch)
    assert full.kl < 1e-6
