"""Long texts and conversations: several at once read as each alone, and what their tables say."""

import json
import sys
from dataclasses import replace

import bench_refresh as refresh
import numpy as np
import pytest
import refresh_tables
import torch
from long_texts import Reader, generated, joined, question, random_tokens, words_of
from transformers.cache_utils import DynamicCache

from rotatek_compile.batches import Encoded
from rotatek_compile.calibration_data.sample import Sample
from rotatek_compile.runtime.enable import enable

DIM = 32


def encoded(prompt, end, places=None):
    sample = Sample(id="1", images=(), question="q", answers=("a",))
    return Encoded(sample, prompt, [9], end, {}, places)


def dense(tiny):
    return DynamicCache(config=tiny.config.get_text_config(decoder=True))


def test_pages_and_text_become_one_sequence():
    a, b = encoded([5, 5, 1, 2], 2), encoded([5, 5, 5, 3], 3)
    whole = joined([a, [7, 8], b])
    assert whole.prompt == [5, 5, 7, 8, 5, 5, 5] and whole.positions is None
    places = torch.tensor([[0, 0, 2, 3], [0, 1, 2, 3]])
    numbered = joined([replace(a, positions=places), [7, 8], replace(a, positions=places)])
    assert numbered.positions.tolist() == [[0, 0, 2, 3, 4, 4], [0, 1, 2, 3, 4, 5]]
    assert question(a) == [1, 2]


def test_divergence_and_texts():
    exact, got = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).double().log(), torch.tensor([[0.5, 0.5], [0.1, 0.9]]).double().log()
    assert refresh.divergence(exact, got).tolist() == pytest.approx([0, 0.8 * np.log(9)])
    assert words_of([[1, 2], [3]], 5) == [1, 2, 3, 1, 2]
    assert words_of([[1, 2], [3]], 4, first=1) == [3, 1, 2, 3]
    drawn = random_tokens(40, 20, (5, 9), 0)
    assert len(drawn) == 40 and not {5, 9} & set(drawn) and max(drawn) < 20
    assert random_tokens(9, 20, (), (0, 1)) != random_tokens(9, 20, (), (0, 2))


def test_the_models_own_words(tiny, documents):
    """Of two pages at once; the last token drawn is the one that the seed points at in the plain model's distribution."""
    pages, avoid = documents[:2], range(3, 60)
    for page, likely, seed in zip(pages, generated(tiny, pages, 12, dense(tiny), avoid, [0, 1]), (0, 1), strict=True):
        asked = page.prompt[page.visual_end :]
        assert likely[: len(asked)] == asked[:12] and len(likely) == 12 and not set(likely[len(asked) :]) & set(avoid)
        with torch.no_grad():
            ids = torch.tensor([page.prompt + likely[len(asked) : -1]])
            chances = tiny(input_ids=ids, **page.media).logits[0, -1].double().softmax(-1).numpy()
        chances[list(avoid)] = 0
        draws = np.random.default_rng(seed).random(12 - len(asked))
        assert likely[-1] == np.searchsorted(chances.cumsum(), draws[-1] * chances.sum(), side="right")


def test_sequences_of_different_length_read_at_once(tiny, documents):
    pages = documents[:2]  # of one and of two images
    wholes = [joined([page, [7, 8, 9, 10, 11]]) for page in pages]
    both = Reader(tiny, wholes, dense(tiny))
    found = [both.read([page.visual_end for page in pages], pages, last=1), both.read([3, 1]), both.copy().read([2, 4], last=3)]
    for row, (page, whole) in enumerate(zip(pages, wholes, strict=True)):
        with torch.no_grad():
            exact = tiny(input_ids=torch.tensor([whole.prompt]), **page.media).logits[0].double().log_softmax(-1)
        first, (asked, last) = page.visual_end, ((3, 2), (1, 3))[row]
        wanted = [exact[first - 1 : first], exact[first : first + asked], exact[len(whole.prompt) - last :]]
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got[row], want, rtol=0, atol=1e-4)


@pytest.fixture
def read(tiny, documents, make_artifact):
    """Long texts and conversations of the first documents, so many at once: what was found, for each of them."""

    def run(at_once, ranks=((8, 24), (0, 16), (8, 8)), length=200):
        single = [documents[n] for n in (0, 2, 3, 4)]
        asked = [[*question(item), *item.answer[:-1]] for item in single]
        text = [words_of(asked, length, n) for n in range(2)]
        pairs = [(single[0], single[1]), (single[2], single[3])]
        found = [[], []]
        with enable(tiny, make_artifact([list(own) for own in ranks]), backend="torch") as active:
            for start in range(0, 2, at_once):
                some = slice(start, start + at_once)
                makers = [{"": dense(tiny), "ours": active.new_cache()} for _ in range(2)]
                found[0].append(refresh.long_texts(tiny, single[:2][some], text[some], makers[0]))
                found[1].append(refresh.conversations(tiny, pairs[some], text[0][:40], makers[1]))
        return found

    return run


def test_a_batch_is_as_its_rows_alone(read):
    (alone, apart), (together, both) = read(1), read(2)
    assert together[0]["ours"][""]["tokens"] == [50] * 4 and len(together[0]["ours"][""]["kl"]) == 2
    assert max(map(max, together[0]["ours"][""]["kl"])) > 1e-3
    for n in range(2):
        assert together[0]["ours"][""]["kl"][n] == pytest.approx(alone[n]["ours"][""]["kl"][0], rel=1e-2, abs=1e-6)
        assert together[0]["ours"][""]["agree"][n] == alone[n]["ours"][""]["agree"][0]
        for turn in refresh_tables.TALK:
            assert both[0]["ours"][turn]["kl"][n] == pytest.approx(apart[n]["ours"][turn]["kl"][0], rel=1e-2, abs=1e-6)
            assert both[0]["ours"][turn]["right"][n] == apart[n]["ours"][turn]["right"][0]


def test_everything_kept_loses_nothing(read):
    texts, talks = read(2, ranks=((DIM, DIM),) * 3, length=40)
    assert max(map(max, texts[0]["ours"][""]["kl"])) < 1e-6 and texts[0]["ours"][""]["agree"] == [40, 40]
    for turn in refresh_tables.TALK:
        assert max(map(max, talks[0]["ours"][turn]["kl"])) < 1e-6 and talks[0]["ours"][turn]["agree"] == [1, 1]


ABOUT = {"model": "m", "data": "d", "tokens": 40, "kv_budget": 0.0625, "device": "cpu", "dtype": "f", "torch": "1", "transformers": "2"}


def note(kl, agree, span, right=None, tokens=(10, 10, 10, 10)):
    own = {"kl": kl, "tokens": list(tokens), "agree": agree, "span": span, "span_dense": 100, "opened": 3, "fallback_heads": 1}
    return own | ({"right": right} if right else {})


def test_parts_are_put_together(tmp_path, capsys, monkeypatch):
    texts = [note([[1, 2, 3, 4], [3, 2, 1, 0]], [40, 20], 6), note([[2, 2, 2, 2]], [30], 9)]
    talk = note([[0.5], [0.1]], [1, 0], 7, right=[1, 1], tokens=(3, 2))
    files = {
        "refresh-random-1-of-2": ("random", {0: {"off": {"": texts[0]}}}),
        "refresh-random-2-of-2": ("random", {1: {"off": {"": texts[1]}}}),
        "refresh-conversation-1-of-1": ("conversation", {0: {"off": dict.fromkeys(refresh_tables.TALK, talk)}}),
    }
    for name, (part, batches) in files.items():
        lines = [{"header": {"part": part, "record": ABOUT}}, *({"batch": n, "found": {}, "note": one} for n, one in batches.items())]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = tmp_path / "all.csv"
    arguments = ["bench_refresh.py", "--merge", *(str(tmp_path / f"{name}.jsonl") for name in files), "--output", str(table)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert refresh.main() == 0
    said = capsys.readouterr().out
    assert "| random tokens | 3 | off | 2.0e-01 | 2.0e-01 | 2.0e-01 | 2.0e-01 [" in said and "| 0.750 | 0.0750 | 2 |" in said
    for turn in refresh_tables.TALK:
        assert f"| {turn} | 2 | off | 1.2e-01 [" in said
    assert said.count("| 0.500 | 1.000 | 0.0700 |") == 3
    monkeypatch.setattr(sys, "argv", ["bench_refresh.py", "--print", str(table)])
    assert refresh.main() == 0 and capsys.readouterr().out == said
    monkeypatch.setattr(sys, "argv", ["bench_refresh.py", "--print", str(tmp_path / "none.csv")])
    assert refresh.main() == 1 and "No such file" in capsys.readouterr().err
