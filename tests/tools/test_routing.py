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


def test_every_skill_has_a_pair_for_the_first_character_and_one_for_the_rest():
    router = routing.Router(SKILLS, 6, 4, 2, torch.device("cpu"))
    table = router.assigned
    assert table.shape == (3 * len(SKILLS) + 1, 6, 4) and table[-1].all()
    used = set()
    for number, skill in enumerate(SKILLS):
        first, rest, question = table[2 * number], table[2 * number + 1], table[2 * len(SKILLS) + number]
        assert first.sum() == rest.sum() == 1, skill
        assert torch.equal(question, first | rest)
        layer, head = routing.FIRST[skill]
        assert first[2 + layer, head]
        layer, head = routing.REST.get(skill, routing.FIRST[skill])
        assert rest[2 + layer, head]
        used |= {tuple(pair) for tensor in (first, rest) for pair in tensor.nonzero().tolist()}
    assert used == {(layer, head) for layer in range(2, 6) for head in range(4)}  # every pair behind the first layers has work
    assert len({*routing.FIRST.values(), *routing.REST.values()}) == len(routing.FIRST) + len(routing.REST) == 16
    assert set(routing.FIRST) == set(SKILLS)


@pytest.mark.parametrize(("layers", "heads", "first"), [(5, 4, 2), (6, 2, 2), (6, 4, 3)])
def test_too_small_a_geometry_is_refused(layers, heads, first):
    with pytest.raises(ValueError, match=f"this text model has {layers} layers and {heads} KV heads"):
        routing.Router(SKILLS, layers, heads, first, torch.device("cpu"))


def test_others_are_looked_up_by_slot_and_pages_read_freely():
    router = routing.Router(SKILLS, 6, 4, 2, torch.device("cpu"))
    slot = torch.tensor([[0, 1, 2 * len(SKILLS), -1], [6, 7, 2 * len(SKILLS) + 3, 8]])
    others = router.others(slot, 5)
    assert others.shape == (6, 2, 9, 4) and others.dtype == torch.bool
    assert not others[:, :, :5].any() and not others[:, 0, 8].any()
    for row, column in ((0, 0), (0, 2), (1, 1), (1, 3)):
        assert torch.equal(others[:, row, 5 + column], ~router.assigned[slot[row, column]])


def test_the_penalty_is_the_mean_mass_of_other_pairs():
    masses = [torch.tensor([[[0.1, 0.3, 0.5, 0.7], [0.2, 0.2, 0.9, 0.9]]]), torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.4, 0.4, 0.8, 0.8]]])]
    others = [torch.tensor([[[True, False], [False, False]]]), torch.tensor([[[True, True], [False, False]]])]
    # one token has others: (0.2 of layer 0 head 0) + (1.0 + 0.0 of layer 1), over two layers of two heads
    assert float(routing.looking(masses, others)) == pytest.approx((0.2 + 1.0) / 4)
    assert float(routing.looking(masses, [torch.zeros_like(other) for other in others])) == 0.0
