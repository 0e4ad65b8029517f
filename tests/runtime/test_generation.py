"""With every direction kept, `generate` on the compressed cache is the stock model: same tokens, same logits, all bases and spans."""

import pytest
import torch

from rotatek_compile.runtime import merging
from rotatek_compile.runtime.enable import enable

SPANS, BASES, BACKENDS = ("visual", "all"), ("two-sided", "pca", "paper"), ("torch", "reconstruct")


@pytest.fixture(scope="module")
def stock(model, ragged, generate):
    return generate(model, ragged)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("span", SPANS)
def test_ragged_batch_is_the_stock_model(model, ragged, stock, make_artifact, generate, check_equal, span, basis, backend):
    with enable(model, make_artifact(span=span, basis=basis), backend=backend):
        check_equal(generate(model, ragged), stock)


def test_the_model_reads_its_images(model, ragged, stock, generate):
    """Otherwise equality would say nothing about coded images."""
    other = dict(ragged, pixel_values=ragged["pixel_values"].flip(0))
    changed = (generate(model, other, 1).logits - stock.logits[:, :1]).abs().amax((1, 2))
    assert (changed[[0, 1, 3]] > 0.5).all()
    assert changed[2] == 0  # the row without an image


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("row", range(4))
def test_single_rows(model, ragged, prompts, stock, make_artifact, generate, check_equal, row, span):
    p = prompts
    parts = [[3, p.square, 40], [50, p.square, 1, p.tall, 2, p.wide, 7], [25], [4, p.wide, p.tall, 9]][row]
    first = (0, 1, 4, 4)[row]
    alone = p.batch([parts], [row], range(first, first + (1, 3, 0, 2)[row]))
    with enable(model, make_artifact(span=span), backend="torch"):
        got = generate(model, alone)
    assert torch.equal(got.tokens[0], stock.tokens[row])
    assert (got.logits[0] - stock.logits[row]).abs().max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_leaves_the_window_and_blocks_merge(model, prompts, make_artifact, generate, check_equal, monkeypatch, backend):
    monkeypatch.setattr(merging, "MERGE_AT", 3)
    inputs = prompts.batch([[5, prompts.square, 30], [12]])
    stock = generate(model, inputs, 230)
    with enable(model, make_artifact(span="all"), backend=backend):
        got = generate(model, inputs, 230)
    check_equal(got, stock)
    for layer in got.cache.layers:
        # 264 and 241 text tokens: at least 3 blocks left each row and were joined to one segment of 192 or more
        lengths = layer.store.table[:, 0, :, merging.LENGTH]
        assert (lengths >= 192).any(-1).tolist() == [True, True]
        assert lengths.sum(-1).tolist() == [n - w for n, w in zip((5 + 88 + 30 + 229, 12 + 229), layer.store.window.host, strict=True)]
        assert all(32 <= w < 32 + 64 for w in layer.store.window.host)


@pytest.mark.parametrize("span", SPANS)
def test_eight_blocks_merge(model, prompts, make_artifact, span):
    """The real number of blocks, with known tokens in pieces too long to be appended, after which raw text leaves too."""
    inputs = prompts.batch([[5, prompts.square, 30]])
    more = torch.randint(6, 97, (1, 15 * 48), generator=torch.Generator().manual_seed(3))

    def read(cache):
        out = [model(**inputs, past_key_values=cache, use_cache=True).logits]
        out += [model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in more.split(48, 1)]
        return torch.cat(out, 1)

    with torch.no_grad():
        stock = model(**dict(inputs, input_ids=torch.cat([inputs["input_ids"], more], 1), attention_mask=None)).logits
        with enable(model, make_artifact(span=span), backend="torch") as enabled:
            cache = enabled.new_cache()
            got = read(cache)
    assert (got - stock).abs().max() < 1e-4
    used = cache.layers[0].store.table[0, 0, :, merging.LENGTH]
    assert used.max() >= 8 * 64
    assert (used > 0).sum() <= 2 + 7


@pytest.mark.parametrize("span", SPANS)
def test_old_text_of_a_prompt_leaves_in_whole_blocks(model, prompts, make_artifact, span):
    with torch.no_grad(), enable(model, make_artifact(span=span), backend="torch") as enabled:
        cache = enabled.new_cache()
        model(**prompts.batch([[5, prompts.square, 150], [40]]), past_key_values=cache)
    for layer in cache.layers:
        lengths = layer.store.table[:, 0, :, merging.LENGTH]
        assert sorted(lengths[0].tolist()) == [64, 88]
        assert lengths[1].sum() == 0
        assert layer.store.window.host.tolist() == [5 + 150 - 64, 40]
