"""Orders of pairs against brute force, and factors against least squares."""

import pytest
import torch
from rap_small import documents, small_llama

from rotatek_compile import rap_scores
from rotatek_compile.errors import UsageError
from rotatek_compile.rap_scores import factors, fisher_of_group, fitted_order, orders, removal_order
from rotatek_compile.rap_statistics import collect

PAIRS = 5


def covariance(seed, heads=2, dim=2 * PAIRS):
    torch.manual_seed(seed)
    x = torch.randn(heads, 40, dim, dtype=torch.float64) @ torch.randn(heads, dim, dim, dtype=torch.float64)
    return x.mT @ x / 40


def left_over(moments, kept, fit):
    """Error of the logits with these pairs, each factor 1 or the best."""
    total = 0.0
    for b in moments:
        wanted = torch.zeros(2 * PAIRS, dtype=torch.float64)
        wanted[:PAIRS] = 1
        if fit and kept:
            places = torch.tensor([*kept, *(p + PAIRS for p in kept)])
            wanted[places] -= torch.linalg.solve(b[places][:, places], b[places] @ wanted)
        elif not fit:
            wanted[list(kept)] = 0
        total += float(wanted @ b @ wanted)
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fit", [False, True])
def test_each_step_gives_up_the_pair_that_costs_least(monkeypatch, seed, fit):
    monkeypatch.setattr(rap_scores, "RIDGE", 0.0)
    moments = covariance(seed)
    order = (fitted_order if fit else removal_order)(moments).tolist()
    assert sorted(order) == list(range(PAIRS))
    for count in range(PAIRS, 0, -1):
        kept = order[:count]
        costs = {p: left_over(moments, [k for k in kept if k != p], fit) for p in kept}
        assert min(costs, key=costs.get) == order[count - 1], costs


def test_a_pair_that_another_makes_up_for_goes_first():
    dim = 6
    x = torch.randn(1, 200, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 3 * x[..., 1]  # the largest contribution by far, and three times another
    moments = x.mT @ x / 200
    assert fitted_order(moments).tolist()[-1] in (0, 1)
    assert removal_order(moments).tolist()[0] == 0


@pytest.mark.parametrize("kept", [[1], [0, 3], [0, 1, 2, 4]])
def test_factors_leave_the_least_error(monkeypatch, kept):
    monkeypatch.setattr(rap_scores, "RIDGE", 0.0)
    moments = covariance(9)
    found = factors(moments, torch.tensor(kept))
    for head in range(2):
        best = left_over(moments[head : head + 1], kept, True)
        error = torch.zeros(2 * PAIRS, dtype=torch.float64)
        error[:PAIRS] = 1
        error[torch.tensor(kept)] -= found[head].real
        error[torch.tensor(kept) + PAIRS] += found[head].imag
        assert float(error @ moments[head] @ error) == pytest.approx(best, rel=1e-6)
        assert best < left_over(moments[head : head + 1], kept, False)


def test_a_head_that_saw_nothing_keeps_its_pairs_as_they_are():
    found = factors(torch.zeros(1, 8, 8), torch.tensor([0, 2]))
    assert torch.allclose(found, torch.ones(1, 2, dtype=torch.complex128))


def test_fisher_scores_add_both_channels_and_the_group():
    model, geometry = small_llama()
    statistics = collect(model, documents(2), geometry, batch_size=1, pad_id=0, quiet=True, gradients=True)
    keys, queries = statistics.sums["0.k_fisher"], statistics.sums["0.q_fisher"]
    wanted = [keys[1, p] + keys[1, p + 8] + sum(queries[h, p] + queries[h, p + 8] for h in (2, 3)) for p in range(8)]
    found = orders(statistics, geometry, "fisher", True)[0][1]
    assert found.tolist() == torch.stack(wanted).argsort(descending=True).tolist()
    values = fisher_of_group(statistics, 0, "value", "fisher")
    assert values == pytest.approx(float(statistics.sums["0.v_fisher"].sum() + statistics.sums["0.o_fisher"].sum()))
    weighted = orders(statistics, geometry, "fisher-weight", False)
    assert weighted.keys() == {0, 1} and weighted[0].shape == (2, 8)


def test_unknown_score():
    model, geometry = small_llama()
    with pytest.raises(UsageError, match="unknown score 'magnitude'; choose one of logit, fisher, fisher-weight"):
        orders(None, geometry, "magnitude", True)
