"""Assigned reading: what a blocked head sees, what is measured of it, and which pair reads for which skill."""

import pytest
import torch

from tiny_training import routing
from tiny_training.bundled import bundled

SKILLS = bundled.SKILLS


def explicit_attention(query, key, value, scaling, blocked, visual):
    """fp32 causal attention with a written-out mask: (output [B, T, H, D], mass on pages [B, T, H])."""
    group, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None].repeat(len(query), query.shape[1], 1, 1)
    for row in range(len(query)):
        for head in range(query.shape[1]):
            for token in range(length):
                if blocked[row, token, head // group]:
                    seen[row, head, token, visual.bool()] = False
    weights = (scaling * query @ key.transpose(2, 3)).masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2), (weights @ visual).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_blocked_head_does_not_see_pages(kv_heads):
    generator = torch.Generator().manual_seed(kv_heads)
    query = torch.randn(2, 4, 30, 16, generator=generator)
    key, value = (torch.randn(2, kv_heads, 30, 16, generator=generator) for _ in range(2))
    visual = torch.zeros(30)
    visual[2:12] = visual[14:20] = 1.0
    blocked = torch.rand(2, 30, kv_heads, generator=generator) < 0.4
    expected, mass = explicit_attention(query, key, value, 0.25, blocked, visual)
    masses = []
    out, nothing = routing.assigned_attention(None, query, key, value, None, 0.25, blocked=blocked, visual=visual, masses=masses)
    assert nothing is None and out.shape == (2, 30, 4, 16)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(masses[0], mass, atol=1e-5) and 0.2 < mass.mean() < 0.8
    hidden = blocked.repeat_interleave(4 // kv_heads, 2)
    assert masses[0][hidden].max() == 0.0
    # a blocked head is blind to what the pages hold, another is not
    key, value = (torch.where(visual[:, None].bool(), tensor + 1, tensor) for tensor in (key, value))
    changed, _ = routing.assigned_attention(None, query, key, value, None, 0.25, blocked=blocked, visual=visual)
    same = (changed - out).abs().amax(-1) < 1e-5
    assert same[hidden].all() and not same[:, 12:][~hidden[:, 12:]].any()


def test_without_assignment_it_is_plain_causal_attention():
    query, key, value = (torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    masses = []
    out, _ = routing.assigned_attention(None, query, key, value, None, 0.3, masses=masses)
    expected, _ = explicit_attention(query, key, value, 0.3, torch.zeros(1, 9, 2, dtype=torch.bool), torch.zeros(9))
    assert torch.allclose(out, expected, atol=1e-5) and masses == []


def test_every_skill_reads_through_the_heads_of_its_group():
    table = routing.Router(SKILLS, 5, 8, 3, torch.device("cpu")).assigned
    assert table.shape == (3 * len(SKILLS) + 1, 5, 8) and table[-1].all()
    for number, skill in enumerate(SKILLS):
        group = next(n for n, members in enumerate(routing.GROUPS) if skill in members)
        for slot, layers in ((2 * number, {0, 1, 2}), (2 * number + 1, {3, 4}), (2 * len(SKILLS) + number, {0, 1, 2})):
            expected = {(layer, head) for layer in layers for head in (2 * group, 2 * group + 1)}
            assert {tuple(pair) for pair in table[slot].nonzero().tolist()} == expected, (skill, slot)
    undivided = routing.Router(SKILLS, 5, 8, 0, torch.device("cpu")).assigned
    assert torch.equal(undivided[:-1].any(1), undivided[:-1].all(1)) and torch.equal(undivided[0], undivided[1])
    assert sorted(skill for members in routing.GROUPS for skill in members) == sorted(SKILLS)


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="among 4 groups of skills; this text model has 6"):
        routing.Router(SKILLS, 5, 6, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="--rest-from 5 is no layer of this text model; it has 5"):
        routing.Router(SKILLS, 5, 4, 5, torch.device("cpu"))


def test_others_and_weights_are_looked_up_by_slot_and_pages_read_freely():
    router = routing.Router(SKILLS, 3, 4, 2, torch.device("cpu"))
    first = 2 * len(SKILLS)
    slot = torch.tensor([[0, 1, first, -1], [6, 7, first + 3, 8]])
    others, weights = router.others(slot, 5), router.weights(slot, 5)
    assert others.shape == (3, 2, 9, 4) and others.dtype == torch.bool and weights.shape == (2, 9)
    assert not others[:, :, :5].any() and not others[:, 0, 8].any()
    for row, column in ((0, 0), (0, 2), (1, 1), (1, 3)):
        assert torch.equal(others[:, row, 5 + column], ~router.assigned[slot[row, column]])
    assert torch.allclose(weights[:, 5:], torch.tensor([[0.2, 0.2, 0.25, 0.0], [0.2, 0.2, 0.25, 0.2]])) and not weights[:, :5].any()


def test_the_penalty_adds_up_layers_and_is_a_mean_over_heads_and_tokens():
    masses = [torch.tensor([[[0.1, 0.3, 0.5, 0.7], [0.2, 0.2, 0.9, 0.9]]]), torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.4, 0.4, 0.8, 0.8]]])]
    others = torch.tensor([[[[True, False], [False, True]]], [[[True, False], [False, False]]]])
    # first token, first head: 0.2 + 1.0; second token, second head: 0.9 of the first layer; two heads
    assert float(routing.looking(masses, others, torch.tensor([[0.75, 0.25]]))) == pytest.approx((0.75 * 1.2 + 0.25 * 0.9) / 2)
    assert float(routing.looking(masses, torch.zeros_like(others), torch.ones(1, 2))) == 0.0
