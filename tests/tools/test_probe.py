"""The trainer's knock-out against one written out with masks and loops."""

import pytest
import torch
from transformers import AttentionInterface

from tiny_training import forward as forward_llava_next
from tiny_training import forward_qwen3_vl, llava_next, qwen3_vl
from tiny_training.probe import NAME, Probe
from tiny_training.rendering import Renderer

TEXT = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "feed_forward": 48}
CASES = {
    "llava_next": (llava_next, forward_llava_next.BatchedForward, forward_llava_next.tile_pages,
                   TEXT | {"vision_hidden": 64, "vision_layers": 1, "vision_feed_forward": 64}),
    "qwen3_vl": (qwen3_vl, forward_qwen3_vl.BatchedForward, forward_qwen3_vl.patch_pages,
                 TEXT | {"vision_hidden": 32, "vision_layers": 2, "vision_heads": 2, "vision_feed_forward": 48, "deepstack": (0,)}),
}  # fmt: skip
PAGES = 2


@pytest.fixture(scope="module", params=list(CASES))
def case(request, pack):
    """(probe, batches, visual columns of every page)"""
    family, forward, prepare, geometry = CASES[request.param]
    model = family.build_model(family.build_config(**geometry)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    torch.manual_seed(0)
    batches = [pack(family.TOKENS, 2, PAGES, length=80, name=f"probe/{number}") for number in range(2)]
    probe = Probe(model, forward(model), prepare, Renderer(torch.device("cpu")), batches)
    before, length = (1, 521) if family is llava_next else (2, 403)
    visual = 520 if family is llava_next else 400
    return probe, batches, [range(before + page * length, before + page * length + visual) for page in range(PAGES)]


def explicit(gone, pages):
    """An attention function: tokens behind the last page see page means of the pair `gone`."""
    text = pages[-1][-1] + 1

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        group, length = query.shape[1] // key.shape[1], query.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        out = torch.empty_like(query)
        for head in range(query.shape[1]):
            k, v = key[:, head // group], value[:, head // group]
            out[:, head] = (scaling * query[:, head] @ k.transpose(1, 2)).masked_fill(hidden, float("-inf")).softmax(-1) @ v
            if (module.layer_idx, head // group) == gone:
                k, v = k.clone(), v.clone()
                for page in pages:
                    for tensor in (k, v):
                        tensor[:, list(page)] = tensor[:, list(page)].mean(1, keepdim=True)
                late = (scaling * query[:, head, text:] @ k.transpose(1, 2)).masked_fill(hidden[text:], float("-inf")).softmax(-1) @ v
                out[:, head, text:] = late
        return out.transpose(1, 2).contiguous(), None

    return attention


def test_nothing_gone_costs_nothing(case):
    probe, batches, _ = case
    assert probe.measure(set())[0] == 0.0
    assert probe.pairs == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with torch.no_grad():
        probe.model.config.get_text_config()._attn_implementation = "sdpa"
        plain = probe._logprobs(batches[0], probe.batches[0][1], set())
        probe.model.config.get_text_config()._attn_implementation = NAME
    assert (plain - probe.dense[0]).abs().max() < 1e-4


@pytest.mark.parametrize("pair", [(0, 1), (1, 0)])
def test_one_pair_gone_is_a_replacement_by_page_means(case, pair):
    probe, batches, pages = case
    text = probe.model.config.get_text_config()
    AttentionInterface.register("explicit_knockout", explicit(pair, pages))
    text._attn_implementation = "explicit_knockout"
    try:
        replaced = [probe._logprobs(batch, pixels, set()) for batch, pixels in probe.batches]
    finally:
        text._attn_implementation = NAME
    kl = sum(float((dense.exp() * (dense - got)).sum()) for dense, got in zip(probe.dense, replaced, strict=True))
    expected = kl / sum(int(batch.answer.sum()) for batch in batches)
    assert probe.measure({pair})[0] == pytest.approx(expected, rel=1e-3) and expected > 1e-5
    for (batch, pixels), expected in zip(probe.batches, replaced, strict=True):
        assert (probe._logprobs(batch, pixels, {pair}) - expected).abs().max() < 1e-4


def test_an_answer_counts_only_if_every_token_is_right(case, monkeypatch):
    probe, batches, _ = case
    wrong = {0: [0, 1], 1: []}  # two tokens of the first answer of the first batch
    answers = sum(int((batch.answer & ~batch.answer.roll(1, 1)).sum()) for batch in batches)

    def logprobs(batch, pixels, gone):
        number = next(n for n, other in enumerate(batches) if other is batch)
        tokens = batch.tokens[batch.answer].clone()
        tokens[wrong[number]] += 1
        return torch.nn.functional.one_hot(tokens, 130).float()

    monkeypatch.setattr(probe, "_logprobs", logprobs)
    monkeypatch.setattr(probe, "dense", [torch.zeros(int(batch.answer.sum()), 130) for batch in batches])
    assert probe.measure(set())[1] == pytest.approx((answers - 1) / answers)
    wrong[1] = [int(batches[1].answer.sum()) - 1]  # the very last token of the last answer
    assert probe.measure(set())[1] == pytest.approx((answers - 2) / answers)


def test_the_report_ranks_pairs_by_their_cost(case, monkeypatch):
    probe, _, _ = case
    cost = {(0, 0): 0.01, (0, 1): 0.5, (1, 0): 0.02, (1, 1): 0.1}
    asked = []
    monkeypatch.setattr(probe, "measure", lambda gone: (asked.append(gone), (sum(cost[pair] for pair in gone), 1 - len(gone) / 4))[1])
    report = probe.report()
    assert report["alone"] == {"0.0": 0.01, "0.1": 0.5, "1.0": 0.02, "1.1": 0.1} and report["share_above_0.02"] == 0.75
    assert report["dense_exact"] == 1.0 and report["keep_1_4"] == {"kl": pytest.approx(0.13), "exact": 0.25}
    assert asked[-1] == {(1, 0), (0, 0)} and report["keep_1_2"]["exact"] == 0.5
