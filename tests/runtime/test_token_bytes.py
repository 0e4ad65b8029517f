"""What kept tokens and the tables of them take, and what a budget of all tokens leaves for their codes."""

import pytest
import torch

from rotatek_compile.errors import UsageError
from rotatek_compile.names import TOKEN_METHODS
from rotatek_compile.replan import replanned
from rotatek_compile.runtime.accounting import cache_bytes, cache_tensors, storage_bytes
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.kept_tokens import packed, unpacked
from rotatek_compile.runtime.rivals.registry import make_coder, worst_share
from rotatek_compile.token_budget import code_share, fitting_ratio, index_share, kept_tokens, selecting, with_selection, with_total

HEADS, DIM, RAW = 2, 32, 32
BYTES = 4 * DIM * HEADS  # of one token in one layer, dense


def test_counts_are_even_and_never_none():
    assert [kept_tokens(88, t) for t in (1.0, 0.5, 0.1, 0.001)] == [88, 44, 8, 2]
    assert kept_tokens(53, 1.0) == 53 and kept_tokens(53, 0.5) == 26 and kept_tokens(1, 0.5) == 1


@pytest.mark.parametrize(("tokens", "count", "width"), [(88, 4, 8), (88, 44, 11), (70000, 16, 64), (65536, 10, 20)])
def test_tables_take_the_fewest_bytes(tokens, count, width):
    indices = torch.stack([torch.randperm(tokens)[:count].sort().values for _ in range(3)])
    indices[0, -1] = tokens - 1
    table = packed(indices, tokens)
    assert storage_bytes([table]) == 3 * width
    assert torch.equal(unpacked(table, 3, count, tokens), indices)


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_bytes_are_what_is_allocated(model, prompts, make_artifact, method):
    inputs = prompts.batch([[3, prompts.square, 4], [2, prompts.wide, 5]])
    with torch.no_grad(), enable(model, make_artifact(RAW), backend="torch", token_method=method, token_keep_ratio=0.25) as enabled:
        cache = enabled.new_cache()
        model(**inputs, past_key_values=cache)
    counted = cache_bytes(cache)
    kept = 22 + 12  # of 88 and 52
    per_head = min(2 * 22, 11) + min(2 * 12, 7)  # one bit a token is less than two bytes an index
    tables = per_head * (3 * HEADS if method == "snapkv" else 1)
    assert counted.span == 3 * kept * BYTES + tables
    assert counted.span_dense == 3 * (88 + 52) * BYTES
    assert counted.dense == 3 * (88 + 52 + 14) * BYTES
    assert storage_bytes(cache_tensors(cache)) == counted.stored
    codes = sum(layer.store.codes.numel() for layer in cache.layers)
    assert codes == 2 * 3 * kept * BYTES  # fp32 here, counted at 2 bytes a number


def test_rivals_code_the_kept_tokens(model, geometry, prompts, make_artifact):
    inputs = prompts.batch([[3, prompts.square, 4]])
    coder = make_coder("native", geometry)
    with torch.no_grad(), enable(model, make_artifact(RAW), backend="torch", token_method="fastv", token_keep_ratio=0.25) as enabled:
        rival, own = enabled.new_cache(coder), enabled.new_cache()
        model(**inputs, past_key_values=rival)
        model(**inputs, past_key_values=own)
    assert [layer.spans.tokens() for layer in rival.layers] == [22, 22, 22]
    assert cache_bytes(rival).span == cache_bytes(own).span and cache_bytes(rival).span_dense == cache_bytes(own).span_dense
    keys, _ = rival.layers[2].spans.rows[0][0].rebuild()
    assert keys.shape == (HEADS, 22, DIM)


@pytest.mark.parametrize("method", ["fastv", "snapkv"])
@pytest.mark.parametrize("name", ["native", "int4", "kivi4", "head-drop"])
def test_a_rivals_budget_holds_for_all_tokens(geometry, method, name):
    budget, ratio = 0.2, 0.5
    if name == "native":
        ratio = fitting_ratio(geometry, method, budget)
        share = None
    else:
        share = code_share(geometry, method, ratio, budget)
    coder = make_coder(name, geometry, kv_budget=share, state={"knockout": {i: torch.ones(HEADS) for i in range(3)}},
                       tokens=kept_tokens(512, ratio))  # fmt: skip
    dense = geometry.dense_bytes_per_token()
    for tokens in (512, 513, 700, 2048):
        count = kept_tokens(tokens, ratio)
        codes = sum(coder.bytes_of(count, i) for i in range(3))
        assert codes + count * index_share(geometry, method) * dense <= budget * tokens * dense + 1e-9
    assert worst_share(make_coder("native", geometry), geometry) == 1.0


def test_our_budget_is_what_the_kept_tokens_leave(geometry, make_artifact):
    method = with_selection(make_artifact(RAW).method, "snapkv", 0.5)
    assert (method.token_method, method.token_keep_ratio, method.image_tokens) == ("snapkv", 0.5, 256)
    made = with_total(method, geometry, 0.25)
    # two bytes an index beside 4 D; plans for 256 tokens pay for means once in 256, so nothing else is taken off
    assert made.kv_budget == pytest.approx(0.5 - 2 / (4 * DIM))
    assert made.token_budget == 0.25
    few = with_total(with_selection(make_artifact(RAW).method, "fastv", 1 / 16), geometry, 1 / 64)
    index = 2 / (3 * BYTES)
    assert few.kv_budget < 0.25 - index  # 32 tokens cannot pay for means that a plan spreads over more
    assert with_total(make_artifact(RAW).method, geometry, 0.25).kv_budget == 0.25


def test_selection_and_budget_are_refused_where_they_do_not_fit(geometry, make_artifact):
    artifact = make_artifact(RAW)
    with pytest.raises(UsageError, match="say how many with --token-keep-ratio"):
        selecting(artifact, "fastv", None)
    with pytest.raises(UsageError, match="say which with --token-method"):
        selecting(artifact, None, 0.5)
    with pytest.raises(UsageError, match="unknown --token-method 'h2o'"):
        selecting(artifact, "h2o", 0.5)
    with pytest.raises(UsageError, match="compile with --span visual"):
        selecting(make_artifact(RAW, span="all"), "fastv", 0.5)
    with pytest.raises(UsageError, match="too small: the means of 256 kept tokens"):
        with_total(with_selection(artifact.method, "fastv", 0.5), geometry, 0.003)
    with pytest.raises(UsageError, match="leaves nothing for the codes"):
        code_share(geometry, "snapkv", 1.0, 0.001)
    assert selecting(selecting(artifact, "fastv", 0.25), "snapkv", 1.0).method.token_method is None
    assert replanned(selecting(artifact, "fastv", 0.25), keep_ratio=1.0).method.token_budget is None
