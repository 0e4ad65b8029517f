"""The numbers of the inspection page, against values worked out here."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.cost_curves import curves_of, predicted_kl
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.report_costs import rank_correlation
from rotatek_compile.report_data import numbers

DIM = 32


def measured(made, levels):
    """Spectra 2^-n everywhere, and sensitivities: Keys of head 0 cost 0.4 without a direction and 0.1 with the other level."""
    for i in range(3):
        for kind in made.method.kinds:
            for side in ("key", "value"):
                made.tensors[f"layers.{i}.{kind}.{side}_spectrum"] = (0.5 ** torch.arange(DIM)).expand(2, DIM).clone()
        made.tensors[f"layers.{i}.key_sensitivity"] = torch.tensor([[0.4, 0.1], [0.2 * i, 0.0]])
        made.tensors.pop(f"layers.{i}.value_sensitivity")
    return made


@pytest.fixture
def artifact(make_artifact):
    """Native Keys of rank 8, 16, ... and raw Values, as the first versions had them; nothing and 8 directions measured."""
    levels = (Slabs(), Slabs(8))
    return measured(make_artifact([[8, 16], [0, 32], [24, 8]], span="all", levels=levels, keep_ratio=0.5), levels)


PLAN = [
    [HeadPlan(Slabs(8, 8, 16), Slabs(0, 0, 32)), HeadPlan(Slabs(), Slabs(DIM))],
    [HeadPlan(Slabs(DIM), Slabs())] * 2,
    [HeadPlan(Slabs(DIM), Slabs(DIM))] * 2,
]


@pytest.fixture
def coded(make_artifact):
    """Three precisions, both sides; nothing and 16 directions at 4 bit measured."""
    levels = (Slabs(), Slabs(0, 0, 16))
    made = measured(make_artifact(plan=PLAN, levels=levels, kv_budget=0.5), levels)
    made.tensors |= {f"layers.{i}.value_sensitivity": torch.tensor([[0.2, 0.01], [0.0, 0.0]]) for i in range(3)}
    return made


def test_energy_kept_and_cut(artifact):
    found = numbers(artifact)
    total = 2 - 0.5 ** (DIM - 1)
    assert found.kept("visual.key")[0] == pytest.approx([1 - (0.5**7 - 0.5**31) / total, 1 - (0.5**15 - 0.5**31) / total])
    assert found.kept("text.key")[1].tolist() == [0.0, 1.0] and found.kept("visual.value")[1].tolist() == [1.0, 1.0]
    assert found.errors["key"][Slabs()][1] == pytest.approx([total, total])
    assert found.errors["key"][Slabs(8)][2] == pytest.approx([0.5**7 - 0.5**31] * 2)
    # the first two directions hold 3/4, the first three 7/8
    assert found.needed("visual.key", 0.8)[0].tolist() == [3, 3]
    assert found.needed("visual.key", 1.0)[0].tolist() == [DIM, DIM]


def test_rounding_is_an_error_too(coded):
    """Of 16 directions at 4 bit each loses 1.6 % of its energy (coding_error.py), and 16 are left out."""
    found = numbers(coded)
    kept = 2 - 0.5**15
    for side in ("key", "value"):
        assert found.errors[side][Slabs(0, 0, 16)][0] == pytest.approx([0.016 * kept + 0.5**15 - 0.5**31] * 2, rel=1e-6)


def test_a_head_without_energy_loses_none(artifact):
    artifact.tensors["layers.0.visual.key_spectrum"][0] = 0
    found = numbers(artifact)
    assert found.kept("visual.key")[0][0] == 1 and found.needed("visual.key", 0.9)[0][0] == 0 and found.errors["key"][Slabs(8)][0][0] == 0


def test_ranks_and_bits(coded):
    found = numbers(coded)
    assert (
        found.ranks("key")[0].tolist() == [32, 0] and found.bits("key")[0].tolist() == [8, 0] and found.bits("key")[1].tolist() == [16, 16]
    )
    assert found.ranks("value")[1].tolist() == [0, 0] and found.bits("value")[0].tolist() == [4, 16]
    assert not found.raw("key") and not found.raw("value")
    assert found.facts["bits per channel"] == "12.00 of Keys, 8.67 of Values, 16 dense"


def test_bytes_of_an_image(artifact, coded):
    """512 tokens: codes at 2 bytes a native direction, Values raw; one fp16 mean for each coded side, a bf16 scale a scaled direction."""
    found = numbers(artifact)
    assert found.parts["Keys"] == {0: 512 * 2 * 24, 1: 512 * 2 * 32, 2: 512 * 2 * 32} and found.raw("value")
    assert found.parts["Values"] == found.dense["Keys"] == found.dense["Values"] == dict.fromkeys(range(3), 512 * 2 * 2 * DIM)
    assert found.parts["means"] == {0: 2 * 2 * DIM, 1: 2 * DIM, 2: 2 * 2 * DIM}  # all 32 directions native are raw numbers
    assert set(found.parts["scales"].values()) == {0}
    found = numbers(coded)
    assert found.parts["Keys"] == {0: 512 * 32, 1: 512 * 2 * 64, 2: 512 * 2 * 64}
    assert found.parts["Values"] == {0: 512 * (16 + 64), 1: 0, 2: 512 * 2 * 64}
    assert found.parts["scales"] == {0: 2 * (24 + 32), 1: 0, 2: 0} and found.parts["means"] == {
        0: 2 * DIM * 3,
        1: 2 * DIM * 2,
        2: 0,
    }


def test_bytes_agree_with_what_compile_reports(artifact, coded):
    for one in (artifact, coded):
        parts = numbers(one).parts
        assert sum(sum(parts[side].values()) for side in ("Keys", "Values")) / 512 == one.bytes_per_token()


def expected(artifact):
    """As allocation expects it (cost_curves.py)."""
    sides = {side: artifact.sensitivity(side) for side in ("key", "value")}
    spectra = {side: {i: artifact.tensors[f"layers.{i}.visual.{side}_spectrum"] for i in range(3)} for side in sides}
    return predicted_kl(artifact.plan(), curves_of(artifact.geometry, artifact.method.levels, sides, spectra))


def test_predicted_kl_is_the_sum_of_single_cuts(artifact):
    """Values have no sensitivities: they stay raw, and no budget below their bytes is predicted."""
    found = numbers(artifact)
    assert (found.budgets[0].bytes, found.budgets[0].kl) == (1.0, 0.0)
    assert [b.bytes for b in found.budgets] == sorted((b.bytes for b in found.budgets), reverse=True)
    assert [b.kl for b in found.budgets] == sorted(b.kl for b in found.budgets)
    assert found.budgets[-1].bytes > 0.5
    assert found.exact.kl == pytest.approx(expected(artifact)) and 0.3 < found.exact.kl < 0.6
    assert found.exact.bytes == pytest.approx((512 * 2 * (88 + 192) + 5 * 2 * DIM) / (512 * 768))


def test_both_sides_are_spent_together(coded):
    found = numbers(coded)
    # Values of one head of layer 1 are gone, which costs 0.2; the rest loses little
    assert found.exact.kl == pytest.approx(expected(coded)) and 0.2 < found.exact.kl < 0.25
    assert found.budgets[0].kl == found.uniform[0].kl == 0 and found.budgets[-1].bytes < 1 / 128
    assert all(a.kl <= b.kl + 1e-9 for a, b in zip(found.budgets, found.uniform, strict=False))
    assert found.budgets[-1].kl > 1


def test_predicted_kl_is_left_out_where_levels_cannot_be_read(artifact):
    for levels in ((Slabs(8), Slabs()), (Slabs(8), Slabs(16)), (Slabs(), Slabs(64))):
        artifact.method = Method(span="all", levels=levels)
        found = numbers(artifact)
        assert found.budgets == [] and found.exact is None and found.errors == {}
        assert "cannot be interpolated" in found.missing["budgets"] and found.missing["errors"] == found.missing["budgets"]
        assert set(found.cuts["key"]) == set(levels)


MEASURED = {
    "number": (0.25, 0.25),
    "zero": (0, 0.0),
    "negative": (-1, None),
    "text": ("0.2", None),
    "truth": (True, None),
    "none": (None, None),
}


@pytest.mark.parametrize(("seen", "wanted"), [*MEASURED.values(), (10**400, None)], ids=[*MEASURED, "beyond floats"])
def test_measured_kl_is_a_number_or_nothing(artifact, seen, wanted):
    artifact.report = {"plan_kl": seen}
    assert numbers(artifact).measured == wanted


def test_principal_angles(artifact):
    """Equal bases: no angle. Text rotated by 30 degrees out of one of D/4 directions: that angle and zeros. Other axes: 90 degrees."""
    eye, turned = torch.eye(DIM), torch.eye(DIM)
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    turned[:, 3], turned[:, 20] = c * eye[:, 3] + s * eye[:, 20], c * eye[:, 20] - s * eye[:, 3]
    for i, other in enumerate((eye, turned, eye.roll(DIM // 2, 1))):
        artifact.tensors[f"layers.{i}.visual.key_encode"] = eye.expand(2, DIM, DIM).clone()
        artifact.tensors[f"layers.{i}.text.key_encode"] = other.expand(2, DIM, DIM).clone()
    angles = numbers(artifact).angles
    assert angles[0][1] == pytest.approx([0] * 8, abs=1e-4)
    assert angles[1][0] == pytest.approx([0] * 7 + [30], abs=1e-4)
    assert angles[2][1] == pytest.approx([90] * 8)


def test_angles_are_between_the_spaces_that_keys_are_rebuilt_in(artifact):
    """A Key is rebuilt from columns of decode = encode^-T, not of encode; for a skew basis they differ."""
    skew = torch.eye(DIM)
    skew[0, 20] = 1.0  # decode's column 0 is e0 - e20, encode's is e0
    artifact.tensors["layers.0.visual.key_encode"] = torch.eye(DIM).expand(2, DIM, DIM).clone()
    artifact.tensors["layers.0.text.key_encode"] = skew.expand(2, DIM, DIM).clone()
    assert numbers(artifact).angles[0][0, -1] == pytest.approx(45)


def test_what_an_artifact_lacks_is_said(make_artifact, tiny_geometry):
    old = numbers(make_artifact(8))
    assert old.missing.keys() == {"knockouts", "angles", "cuts", "errors", "budgets"}
    assert "--span all" in old.missing["angles"] and "older than knock-outs" in old.missing["knockouts"]
    tensors = {f"layers.{i}.knockout": torch.tensor([0.5, 0.0]) for i in range(3)}
    rival = numbers(Artifact(tiny_geometry, Method(rival="int4", keep_ratio=1.0), tensors, {}, {}))
    assert {"ranks", "cuts", "spectra", "variance", "angles", "errors", "budgets"} == rival.missing.keys()
    # 4 bits a number, and a scale and a zero point of 2 bytes for each token and head, Keys and Values
    assert sum(rival.parts["everything kept"].values()) == 3 * 2 * 2 * 512 * (DIM / 2 + 4)
    assert rival.knockouts[2].tolist() == [0.5, 0.0]


def test_a_model_without_images(make_artifact, tiny_geometry):
    text = Geometry(model_type="llama", layers=tiny_geometry.layers, visual_token_ids=())
    found = numbers(make_artifact(8, shape=text, text_only=True, span="all"))
    assert found.main == "text" and found.spectra.keys() == {"text.key", "text.value"}
    assert found.facts["coded"] == "older text" and found.missing["angles"] == "The model reads no images."
    assert found.kept("text.key")[0].shape == (2,) and found.kept("visual.key") == {}


def test_layers_of_other_shapes(make_artifact):
    """Sliding layers are left out, and heads and D may differ between layers."""
    shapes = [("full_attention", 2, 32), ("sliding_attention", 2, 32), ("full_attention", 4, 64)]
    layers = tuple(LayerGeometry(layer_type=kind, query_heads=4, kv_heads=heads, head_dim=dim) for kind, heads, dim in shapes)
    artifact = make_artifact(
        [[8, 16], [], [8, 0, 64, 32]], shape=Geometry(model_type="odd", layers=layers, visual_token_ids=(5,)), span="all"
    )
    found = numbers(artifact)
    assert found.dims == {0: 32, 2: 64} and found.facts["layers compressed"] == "2 of 3"
    assert found.facts["KV heads × D"] == "2 × 32, 4 × 64"
    assert [a.shape for a in found.angles.values()] == [(2, 8), (4, 16)]


def test_names_do_not_leak_paths(artifact):
    artifact.base_model = {"id": "/home/somebody/secret/model-7b", "fingerprint": "ab"}
    artifact.calibration = {"data": "/home/somebody/pages.jsonl", "split": "local", "num_samples": 3}
    facts = numbers(artifact).facts
    assert facts["base model"] == "model-7b" and facts["calibrated on"] == "3 samples of pages.jsonl"
    artifact.base_model = {"id": "org/model-7b", "fingerprint": None}
    artifact.remote = SimpleNamespace(repo="me/artifact")
    assert numbers(artifact).facts["base model"] == "org/model-7b" and numbers(artifact).name == "me/artifact"


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # ties share their mean rank: ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
    assert rank_correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert rank_correlation([1, 1], [1, 2]) == 0
