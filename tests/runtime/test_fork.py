"""Forks of a compressed cache share what never changes in place, and each goes on as if it were the only one."""

import hashlib

import pytest
import torch
import transformers
from packaging.version import Version

from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime.accounting import cache_bytes, cache_tensors
from rotatek_compile.runtime.document import Document
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.fork import cache_bytes_of

MIXED = [[HeadPlan(Slabs(8, 8, 16), Slabs(0, 16, 0)), HeadPlan(Slabs(32), Slabs(0, 0, 16))]] * 3
pytestmark = pytest.mark.filterwarnings("ignore:the Keys of these images lie")
POOLS = ("codes", "scales", "own_means", "own_bases")


@pytest.fixture
def enabled(model, make_artifact):
    with torch.no_grad(), enable(model, make_artifact(plan=MIXED, span="all", prior_tokens=4, fallback=8.0), backend="torch") as active:
        yield active


def questions(prompts, *lengths):
    """Plain ids [1, T] each."""
    return [prompts.batch([[length]], seeds=[30 + n])["input_ids"] for n, length in enumerate(lengths)]


def digest(cache):
    return [hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for t in cache_tensors(cache) if t.numel()]


def answers(document, ids, **options):
    out = document.generate(
        ids, max_new_tokens=6, do_sample=False, eos_token_id=-1, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.sequences, torch.stack(out.logits)


LOOKUP = pytest.param(
    {"prompt_lookup_num_tokens": 3},
    marks=pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.23"), reason="5.17 looks prompts up wrongly on a cache that is filled, its own too"
    ),
)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, LOOKUP])
def test_questions_in_any_order_are_those_of_fresh_caches(model, prompts, enabled, options):
    inputs = prompts.batch([[3, prompts.square, 90, prompts.tall]])
    asked = questions(prompts, 5, 70, 1, 120)  # some send text out of the window
    fresh = [answers(Document.read(model, **inputs), ids, **options) for ids in asked]
    document = Document.read(model, **inputs)
    before = digest(document.cache)
    for n in (2, 0, 3, 1, 2):
        for got, expected in zip(answers(document, asked[n], **options), fresh[n], strict=True):
            assert torch.equal(got, expected)
    assert digest(document.cache) == before
    assert len({tuple(sequence[0, -6:].tolist()) for sequence, _ in fresh}) > 1


def test_several_sequences_of_each_row(model, prompts, enabled):
    """`generate` wants as many rows in the cache as it makes of every row."""
    inputs, ids = prompts.batch([[3, prompts.square, 10], [70]]), prompts.batch([[7], [7]], seeds=[8, 9])["input_ids"]
    document = Document.read(model, **inputs)
    for options in ({"do_sample": True, "num_return_sequences": 3}, {"do_sample": False, "num_beams": 4, "num_return_sequences": 2}):
        torch.manual_seed(0)
        got = document.generate(ids, max_new_tokens=4, eos_token_id=-1, **options)
        rows = options["num_return_sequences"]
        assert got.shape == (2 * rows, 11)
        for row in range(2):
            assert torch.equal(got[row * rows : (row + 1) * rows, :7], ids[row].expand(rows, -1))
    best = [document.generate(ids, max_new_tokens=4, do_sample=False, num_beams=4, eos_token_id=-1)[row] for row in range(2)]
    assert all(torch.equal(best[row], got[2 * row]) for row in range(2))
    assert document.cache.tokens() == [3 + 88 + 10, 70]


def test_turns_go_on_from_a_fork(model, prompts, enabled):
    """A conversation on a fork, beside another one, is the conversation on the cache itself."""
    inputs = prompts.batch([[3, prompts.square, 20], [60, prompts.wide]])
    turns = [prompts.batch([[9], [9]], seeds=[n, n + 1])["input_ids"] for n in (40, 50, 60)]

    def converse(cache, chosen):
        first = inputs["attention_mask"]
        mask, logits = torch.cat([first, first.new_ones(2, cache.get_seq_length() - first.shape[1])], 1), []
        for ids in chosen:
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            places = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
            logits.append(model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits)
        return torch.cat(logits, 1)

    document = Document.read(model, **inputs)
    first, second, third = document.cache.fork(), document.cache.fork(), document.fork().cache
    a = converse(first, turns[:2])
    b = converse(second, turns[1:])
    assert torch.equal(converse(third, turns[:2]), a)
    assert not torch.equal(a, b)
    assert document.cache.tokens() == [3 + 88 + 20, 60 + 52] and first.tokens() == [129, 130]
    middle = first.fork()
    assert torch.equal(converse(middle, turns[:1]), converse(first, turns[:1]))
    assert torch.equal(converse(document.cache, turns[1:]), b)


def test_pools_are_shared_and_counted_once(model, prompts, enabled):
    document = Document.read(model, **prompts.batch([[3, prompts.square, 200, prompts.square]]))
    forks = [document.cache.fork() for _ in range(5)]
    own = cache_bytes(document.cache).stored
    pools = 0
    for layer, *others in zip(document.cache.layers, *(twin.layers for twin in forks), strict=True):
        for name in POOLS:
            tensor = getattr(layer.store, name)
            pools += tensor.untyped_storage().nbytes() if tensor.numel() else 0
            assert all(getattr(other.store, name) is tensor for other in others)
        assert all(other.store.window.buffer.data_ptr() != layer.store.window.buffer.data_ptr() for other in others)
        assert all(other.prepared is layer.prepared and other.blocks.shared is layer.blocks.shared for other in others)
        assert all(other.blocks.store is other.store and other.state is not layer.state for other in others)
    assert pools > 0.4 * own
    assert cache_bytes_of([document.cache]) == own
    assert cache_bytes_of([document.cache, *forks]) == own + 5 * (own - pools)


def test_rivals_are_forked(model, prompts, make_artifact, exact_coder):
    inputs, (ids,) = prompts.batch([[3, prompts.square, 4]]), questions(prompts, 5)
    with torch.no_grad(), enable(model, make_artifact(), backend="torch") as active:
        cache = active.new_cache(exact_coder)
        model(**inputs, past_key_values=cache)
        twin = cache.fork()
        expected = model(input_ids=ids, past_key_values=cache.fork()).logits
        model(input_ids=ids.flip(1), past_key_values=twin)
        assert torch.equal(model(input_ids=ids, past_key_values=cache).logits, expected)
