"""What comes after a long answer whose text stayed in the windows: copies of it, crops, files, memory that runs out."""

import pytest
import torch

from rotatek_compile.errors import RotateKError
from rotatek_compile.kernels import splits
from rotatek_compile.runtime import graphs
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.backends import TorchBackend
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.fork import cache_bytes_of
from rotatek_compile.runtime.graphs import DecodeGraphs
from rotatek_compile.runtime.saved import load_cache
from rotatek_compile.runtime.window import MOST_SLACK, WINDOW_STEP, Window

WINDOW = 32


class NoRecorder:
    """Stands where a step would be captured, which these tests do not get to."""

    def __init__(self, device, earlier):
        raise AssertionError("nothing is to be captured here")


def steps(model, cache, count, rows=1):
    """So many tokens of text, one call each."""
    for _ in range(count):
        places = torch.tensor(cache.tokens())[:, None]
        model(input_ids=torch.full((rows, 1), 7), position_ids=places, past_key_values=cache, use_cache=True)


def turn(model, cache, length):
    places = torch.tensor(cache.tokens())[:, None] + torch.arange(length)
    model(input_ids=torch.full((1, length), 8), position_ids=places, past_key_values=cache, use_cache=True)


@pytest.fixture
def answered(model, prompts, make_artifact):
    """Makes (enabled, cache) after an answer of so many tokens; 35 of text and an image come before it."""
    undo = []

    def make(tokens, **options):
        one = enable(model, make_artifact(span="visual", **options), backend="torch").__enter__()
        undo.append(one)
        cache = one.new_cache()
        model(**prompts.batch([[5, prompts.square, 30]]), past_key_values=cache, use_cache=True)
        steps(model, cache, tokens)
        return one, cache

    with torch.no_grad():
        yield make
    for one in undo:
        one.__exit__(None, None, None)


def test_forks_share_a_long_answer(model, answered):
    """fork.py: a fork costs its window, and what both hold is shared."""
    _, cache = answered(600)
    alone = cache_bytes_of([cache])
    forks = [cache.fork() for _ in range(8)]
    for fork in forks:
        steps(model, fork, 2)
    assert cache_bytes_of([cache, *forks]) < 3 * alone
    assert [layer.store.window.host.tolist() for layer in cache.layers] == [[(600 + 35 - WINDOW) % 64 + WINDOW]] * 3


def test_repeated_rows_share_a_long_answer(model, answered):
    _, cache = answered(600)
    alone = cache_bytes(cache).stored
    cache.batch_repeat_interleave(8)
    steps(model, cache, 2, rows=8)
    assert cache_bytes(cache).stored < 3 * alone


def test_a_crop_gives_room_back(answered):
    _, cache = answered(900)
    cache.crop(-880)
    window = cache.layers[0].store.window
    assert window.host.tolist() == [55]
    assert window.buffer.shape[3] - 55 <= MOST_SLACK + WINDOW_STEP


@pytest.mark.parametrize("answer", [420, 480])
def test_a_loaded_window_is_as_large_as_the_saved_one(model, answered, tmp_path, answer):
    """docs/ask_many.md promises the last bit; kernels cut their work by the size of the buffer."""
    one, cache = answered(answer)
    turn(model, cache, 40)
    cache.save(tmp_path / "cache")
    loaded, _ = load_cache(tmp_path / "cache", one)
    before, after = (each.layers[0].store for each in (cache, loaded))
    assert after.window.buffer.shape == before.window.buffer.shape
    assert torch.equal(after.view(splits=True).splits.records, before.view(splits=True).splits.records)


def test_room_takes_no_new_plan(answered, monkeypatch):
    """One work list serves windows of many sizes; another is made where the table changes, or windows are far larger."""
    made, plan = [], splits.plan_splits
    monkeypatch.setattr(splits, "plan_splits", lambda *args, **kwargs: (made.append(kwargs["window_capacity"]), plan(*args, **kwargs))[1])
    _, cache = answered(0)
    store = cache.layers[0].store
    store.view(splits=True)
    for rows in ([0, 0], [1, 0], [1]):  # other rows are another table, whatever they have room for, and as many as before
        store.select_rows(rows)
        assert store.view(splits=True).splits.ranges.shape == (2 * len(rows) + 1,)
    assert made == [4096] * 4
    made[:], lengths, first = made[3:], torch.zeros(4, dtype=torch.int32), store.view(splits=True)
    for room in (256, 512, 1024):
        store.reserve(room, lengths[: store.batch])
        found = store.view(splits=True)
        assert found is not first and found.windows.shape[3] == store.window.buffer.shape[3] >= room
        assert found.splits.num_splits - first.splits.num_splits == (-(-found.windows.shape[3] // 256) - 1) * 2
        assert found.splits.records.untyped_storage().data_ptr() == first.splits.records.untyped_storage().data_ptr()
    assert made == [4096]
    kept = store.tensors()
    assert kept["splits"].shape[0] == first.splits.num_splits + 15 * 2  # all of them are counted, also those still to come
    store.reserve(4096, lengths[: store.batch])
    store.view(splits=True)
    assert made == [4096, 8192]
    keys = torch.zeros(2, 8, store.dim)
    store.add_dense(0, keys, keys)
    store.flush()
    store.view(splits=True)
    assert made == [4096, 8192, 8192]


def test_an_answer_goes_on_where_there_is_no_memory_for_an_eighth(model, answered, monkeypatch):
    one, cache = answered(0)
    one.graphs = None
    steps(model, cache, 560)
    window = cache.layers[0].store.window
    steps(model, cache, (room := window.buffer.shape[3]) - 10 - int(window.host[0]))
    assert window.host.tolist() == [room - 10]
    reserve = Window._reserve

    def scarce(self, capacity):
        if capacity > room + 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        reserve(self, capacity)

    monkeypatch.setattr(TorchBackend, "captures", True)
    monkeypatch.setattr(graphs, "STEADY", 2)
    monkeypatch.setattr(Window, "_reserve", scarce)
    one.graphs = DecodeGraphs(NoRecorder)
    with pytest.warns(UserWarning, match="no memory for more raw text"):
        steps(model, cache, 10)
    steps(model, cache, 64)
    assert window.host.tolist() == [room + 64]


@pytest.mark.parametrize(("held", "kept"), [(600, True), (700, False)])
def test_little_room_is_kept_when_text_leaves(held, kept):
    """Moving what is left costs a copy, so up to MOST_SLACK tokens of room stay where they are."""
    window = Window(1, 1, 4, torch.float32, torch.device("cpu"))
    window.append_row(0, *torch.arange(2.0 * held * 4).view(2, 1, held, 4))
    before, room = window.buffer, window.buffer.shape[3]
    expected = window.buffer[:, :, :, held - 96 : held].clone()
    window.drop_oldest([0], held - 96)
    assert (window.buffer is before) == kept == (room - 96 <= MOST_SLACK)
    assert window.buffer.shape[3] == (room if kept else 96)
    assert torch.equal(window.buffer[:, :, :, :96], expected)


def test_a_call_that_failed_is_still_known_when_a_long_answer_is_saved(answered, tmp_path):
    """Moving its text must not store what the call had begun."""
    _, cache = answered(200)
    store = cache.layers[1].store
    store.add_dense(0, *torch.zeros(2, store.heads, 64, store.dim))
    with pytest.raises(RotateKError, match="did not finish"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
