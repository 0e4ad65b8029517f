"""The compressed cache as its callers handle it: cropping, selecting rows, copying, and what it refuses."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache

from rotatek_compile.errors import RotateKError
from rotatek_compile.runtime.enable import enable


def test_deepcopied_cache_is_independent_and_shares_the_artifact(model, ragged, make_artifact):
    with torch.no_grad(), enable(model, make_artifact(8, prior_tokens=10**9), backend="torch") as enabled:
        cache = enabled.new_cache()
        model(**ragged, past_key_values=cache)
        twin = copy.deepcopy(cache)
        step = {"input_ids": torch.full((4, 1), 17), "attention_mask": torch.cat([ragged["attention_mask"], torch.ones(4, 1).long()], 1)}
        first = model(**step, past_key_values=twin).logits
        assert (cache.get_seq_length(), twin.get_seq_length()) == (ragged["input_ids"].shape[1], ragged["input_ids"].shape[1] + 1)
        assert torch.equal(model(**step, past_key_values=cache).logits, first)
    assert twin.artifact is cache.artifact


def test_crop_refuses_coded_tokens(model, prompts, make_artifact):
    """The window holds 60 + 4 raw text tokens, but only 4 + 1 come after the image."""
    inputs = prompts.batch([[60, prompts.square, 4]])
    with torch.no_grad(), enable(model, make_artifact(window=128), backend="torch") as enabled:
        cache = enabled.new_cache()
        model(**inputs, past_key_values=cache)
        first = model(input_ids=torch.tensor([[17]]), past_key_values=cache).logits
        with pytest.raises(RotateKError, match="only the newest 5"):
            cache.crop(-6)
        cache.crop(-1)
        assert cache.get_seq_length() == 152
        assert torch.equal(model(input_ids=torch.tensor([[17]]), past_key_values=cache).logits, first)
        cache.crop(-5)
        with pytest.raises(RotateKError, match="only the newest 0"):
            cache.crop(-1)
        again = model(input_ids=torch.cat([inputs["input_ids"][:, -4:], torch.tensor([[17]])], 1), past_key_values=cache).logits
    assert (again[:, -1:] - first).abs().max() < 1e-4


@pytest.mark.parametrize("span", ["visual", "all"])
def test_crop_refuses_text_that_left_before_older_text(model, prompts, make_artifact, span):
    """A long question sends its own oldest 64 tokens to the store, while 60 + 20 older ones stay in the window."""
    inputs = prompts.batch([[60, prompts.square, 20]])
    more = prompts.batch([[110]], seeds=[5])["input_ids"]
    with torch.no_grad():
        with enable(model, make_artifact(window=40, span=span), backend="torch") as enabled:
            cache = enabled.new_cache()
            model(**inputs, past_key_values=cache)
            model(input_ids=more, past_key_values=cache)
            assert cache.layers[0].store.window.host.tolist() == [80 + 46]
            with pytest.raises(RotateKError, match="only the newest 46"):
                cache.crop(-47)
            cache.crop(-46)
            got = model(input_ids=torch.full((1, 1), 17), past_key_values=cache).logits
        kept = torch.cat([inputs["input_ids"], more[:, :-46], torch.full((1, 1), 17)], 1)
        stock = model(**dict(inputs, input_ids=kept, attention_mask=None)).logits
    assert (got[:, -1] - stock[:, -1]).abs().max() < 1e-4


def test_rows_are_selected_as_a_stock_cache_selects_them(model, prompts, make_artifact):
    inputs = prompts.batch([[3, prompts.square, 10], [20, prompts.tall, 5], [30]])
    mask = inputs["attention_mask"]
    with torch.no_grad(), enable(model, make_artifact(16), backend="torch") as enabled:
        for chosen in (torch.tensor([True, False, True]), torch.tensor([-1, 0]), torch.tensor([2, 2, 1])):
            cache, stock = enabled.new_cache(), DynamicCache()
            for one in (cache, stock):
                model(**inputs, past_key_values=one)
                one.batch_select_indices(chosen)
            assert cache.tokens() == mask[chosen].sum(1).tolist()
            assert len(cache.tokens()) == len(stock.layers[0].keys)


def test_a_call_with_other_rows_than_the_cache_is_refused(model, prompts, make_artifact):
    one, three = (prompts.batch([[3, prompts.square, 10]] * rows) for rows in (1, 3))
    with torch.no_grad(), enable(model, make_artifact(), backend="torch") as enabled:
        for inputs, rows in ((one, 3), (three, 1)):
            for length in (1, 40):
                cache = enabled.new_cache()
                model(**inputs, past_key_values=cache)
                with pytest.raises(RotateKError, match=f"holds {len(inputs['input_ids'])} sequences, this call has {rows}"):
                    model(input_ids=torch.full((rows, length), 17), past_key_values=cache)


def test_a_mask_that_hides_what_is_stored_is_refused(model, prompts, make_artifact):
    """The stock cache would leave those tokens out; ours cannot, and must not answer as if it had."""
    inputs = prompts.batch([[3, prompts.square, 10], [20]])
    past, more = inputs["attention_mask"], torch.full((2, 2), 17)
    hidden = torch.cat([past, torch.ones(2, 2, dtype=torch.int64)], 1)
    visible = hidden[:, None, None].expand(2, 1, 2, -1).bool().clone()
    visible[:, :, 0, -1] = False  # causal
    with torch.no_grad(), enable(model, make_artifact(), backend="torch") as enabled:
        cache, twin = enabled.new_cache(), enabled.new_cache()
        for one in (cache, twin):
            model(**inputs, past_key_values=one)
        positions = (hidden.cumsum(-1) - 1)[:, -2:]
        got = [
            model(input_ids=more, attention_mask=mask, position_ids=positions, past_key_values=one).logits
            for mask, one in ((hidden, cache), (visible, twin))
        ]
        assert torch.equal(*got)
        longer = torch.cat([hidden, torch.ones(2, 2, dtype=torch.int64)], 1)
        longer[0, 5:9] = 0
        for mask in (longer, torch.where(longer.bool(), 0.0, -torch.inf)[:, None, None].expand(2, 1, 2, -1)):
            with pytest.raises(RotateKError, match="hides tokens that the compressed cache holds"):
                model(input_ids=more, attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == past.shape[1] + 2
