"""What plans are compared by when a compilation decides: the measure of the check and what single cuts make one expect."""

import math

import pytest
import torch

from rotatek_compile.cost_curves import curves_of, predicted_kl
from rotatek_compile.deciding import Cautious
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan

LEVELS = (Slabs(), Slabs(nibble=16))


@pytest.fixture
def expected():
    layer = LayerGeometry(layer_type="full_attention", query_heads=2, kv_heads=2, head_dim=32)
    geometry = Geometry(model_type="llama", layers=(layer,), visual_token_ids=(7,))
    table, spectra = {0: torch.tensor([[1.0, 0.01], [0.1, 0.001]])}, {0: torch.linspace(1, 0.1, 32).repeat(2, 1)}
    return curves_of(geometry, LEVELS, {"key": table, "value": table}, {"key": spectra, "value": spectra})


def test_plans_are_compared_by_what_is_measured_and_what_is_expected(expected):
    """Of two plans that the documents do not tell apart, the one that single cuts speak for costs less."""
    raw, few, none = HeadPlan(Slabs(32), Slabs(32)), HeadPlan(Slabs(nibble=16), Slabs(nibble=16)), HeadPlan(Slabs(), Slabs())
    kept, dropped = {0: [few, raw]}, {0: [none, raw]}
    asked = []

    class Check:
        def tempered(self, plan, most):
            asked.append(most)
            return 0.25

    compared = Cautious(Check(), expected)
    assert compared(kept) == pytest.approx(0.25 + predicted_kl(kept, expected)) and asked == [math.inf]
    assert compared(dropped) > compared(kept) + 0.5
    compared(kept, 1.0)  # what was expected leaves so much less to be measured
    assert asked[-1] == pytest.approx(1.0 - predicted_kl(kept, expected)) and asked[-1] < 0.99
