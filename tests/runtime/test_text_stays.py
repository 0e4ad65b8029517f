"""Raw text of an answer stays in the windows: no block of it is moved until a new turn comes, or rows are selected (beams)."""

import numpy as np
import pytest
import torch

from rotatek_compile.kernels.table import KIND, LENGTH, Kind
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.window import MOST_SLACK, Window

WINDOW, NEW = 32, 230


def dense_tokens(layer):
    """Raw tokens outside the window, by row."""
    table = layer.store.table[:, 0]
    return (table[..., LENGTH] * (table[..., KIND] == int(Kind.DENSE))).sum(-1).tolist()


def turn(model, cache, ids, mask):
    """Logits of a call of more text than is appended."""
    positions = mask.cumsum(-1)[:, -ids.shape[1] :] - 1
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("backend", ["torch", "reconstruct"])
@torch.no_grad()
def test_an_answer_stays_and_the_next_turn_moves_it(model, prompts, make_artifact, generate, check_equal, backend):
    inputs = prompts.batch([[5, prompts.square, 30], [12]])
    more = torch.randint(6, 97, (2, 70), generator=torch.Generator().manual_seed(3))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW - 1 + 70, dtype=torch.long)], 1)
    stock = generate(model, inputs, NEW)
    after = turn(model, stock.cache, more, mask)
    with enable(model, make_artifact(span="visual"), backend=backend):
        got = generate(model, inputs, NEW)
        check_equal(got, stock)
        for layer in got.cache.layers:
            assert layer.store.window.host.tolist() == [35 + NEW - 1, 12 + NEW - 1]
            assert dense_tokens(layer) == [0, 0]
            room = layer.store.window.buffer.shape[3] - (35 + NEW - 1)
            assert 0 <= room < 32 + (35 + NEW) // 8
        found = turn(model, got.cache, more, mask)
    assert (found - after).abs().max() < 1e-4
    for layer in got.cache.layers:  # whole blocks of the answer have left, and of the turn what is older than a window
        assert dense_tokens(layer) == [(264 - WINDOW) // 64 * 64, (241 - WINDOW) // 64 * 64]
        assert (layer.store.window.host < WINDOW + 64 + 70).all()


@torch.no_grad()
def test_text_that_is_coded_leaves_as_before(model, prompts, make_artifact, generate):
    with enable(model, make_artifact(span="all"), backend="torch"):
        got = generate(model, prompts.batch([[12]]), 150)
    assert all((layer.store.window.host < WINDOW + 64).all() for layer in got.cache.layers)


@torch.no_grad()
def test_rows_that_are_selected_at_every_step_share_what_has_left(model, prompts, make_artifact):
    """As beams do; a selection now and then moves text once, and it stays again."""
    inputs, one = prompts.batch([[5, prompts.square, 30]]), torch.tensor([[7]])
    with enable(model, make_artifact(span="visual"), backend="torch") as enabled:
        for every, selected in ((1, 3), (1000, 200)):
            cache = enabled.new_cache()
            model(**inputs, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(2)
            for number in range(1, 260):
                if number % every == 0 or number == selected:
                    cache.reorder_cache(torch.tensor([1, 1]))
                positions = torch.tensor(cache.tokens())[:, None]
                model(input_ids=one.expand(2, 1), position_ids=positions, past_key_values=cache, use_cache=True)
            layer = cache.layers[0]
            held = layer.store.window.host
            if every == 1:
                assert (held < WINDOW + 64).all() and dense_tokens(layer) == [35 + 259 - int(held[0])] * 2
                assert len(np.unique(layer.store.ids[layer.store.ids > 0])) == (layer.store.ids[0] > 0).sum()  # both rows name the same
            else:
                assert dense_tokens(layer) == [(35 + selected - 1 - WINDOW) // 64 * 64] * 2


def test_room_grows_by_a_part_and_is_given_back():
    window = Window(2, 1, 4, torch.float32, torch.device("cpu"))
    seen = set()
    for _ in range(2000):
        window.grow(1)
        seen.add(window.buffer.shape[3])
    assert len(seen) < 30  # one copy for every 32 tokens would be 63
    window.buffer.copy_(torch.arange(window.buffer.shape[3], dtype=torch.float32)[:, None].expand(window.buffer.shape))
    window.drop_oldest([0], 1900)
    assert window.buffer.shape[3] >= 2000 and window.host.tolist() == [100, 2000]
    window.drop_oldest([1], 1936)
    assert window.host.tolist() == window.lengths.tolist() == [100, 64]
    assert window.buffer.shape[3] == 128 <= MOST_SLACK
    assert window.buffer[:, 0, 0, :100, 0].tolist() == [list(range(1900, 2000))] * 2
    assert window.buffer[:, 1, 0, :64, 0].tolist() == [list(range(1936, 2000))] * 2
