"""The numbers of the inspection page, against values worked out here."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.report_data import numbers
from rotatek_compile.report_panels import rank_correlation

DIM = 32


@pytest.fixture
def artifact(make_artifact):
    """Ranks 8, 16, ...; spectra 2^-n; levels 0 and 8 measured."""
    ranks = [[8, 16], [0, 32], [24, 8]]
    made = make_artifact(ranks, span="all", levels=(0, 8), keep_ratio=0.5)
    for i in range(3):
        for kind in ("visual", "text"):
            made.tensors[f"layers.{i}.{kind}.key_spectrum"] = (0.5 ** torch.arange(DIM)).expand(2, DIM).clone()
        made.tensors[f"layers.{i}.sensitivity"] = torch.tensor([[0.4, 0.1], [0.2 * i, 0.0]])
    return made


def test_energy_kept_and_cut(artifact):
    found = numbers(artifact)
    total = 2 - 0.5 ** (DIM - 1)
    assert found.kept("visual")[0] == pytest.approx([1 - (0.5**7 - 0.5**31) / total, 1 - (0.5**15 - 0.5**31) / total])
    assert found.kept("text")[1].tolist() == [0.0, 1.0]
    assert found.discarded()[1] == pytest.approx([total, 0.0])
    assert found.discarded(8)[2] == pytest.approx([0.5**7 - 0.5**31] * 2)
    # the first two directions hold 3/4, the first three 7/8
    assert found.needed("visual.key", 0.8)[0].tolist() == [3, 3]
    assert found.needed("visual.key", 1.0)[0].tolist() == [DIM, DIM]


def test_a_head_without_energy_loses_none(artifact):
    artifact.tensors["layers.0.visual.key_spectrum"][0] = 0
    found = numbers(artifact)
    assert found.kept("visual")[0][0] == 1 and found.needed("visual.key", 0.9)[0][0] == 0 and found.discarded()[0][0] == 0


def test_bytes_of_an_image(artifact):
    """512 tokens: codes at 2 bytes a direction, Values at 2 a channel, one fp32 mean per head."""
    found = numbers(artifact)
    assert found.parts["Key codes"] == {0: 512 * 2 * 24, 1: 512 * 2 * 32, 2: 512 * 2 * 32}
    assert found.parts["Values"] == found.dense["Keys"] == found.dense["Values"] == dict.fromkeys(range(3), 512 * 2 * 2 * DIM)
    assert found.parts["Key means"] == dict.fromkeys(range(3), 4 * 2 * DIM)


def test_bytes_agree_with_what_compile_reports(artifact):
    found = numbers(artifact)
    per_token = sum(sum(row.values()) for name, row in found.parts.items() if name != "Key means") / 512
    assert per_token == artifact.bytes_per_token()


def test_predicted_kl_is_the_sum_of_single_cuts(artifact):
    found = numbers(artifact)
    assert [b.share for b in found.budgets] == [0, 0.25, 0.5, 0.75, 1]
    # nothing kept: all at level 0; 8 directions in each head: all at level 8; everything kept costs nothing
    assert found.budgets[0].allocated == found.budgets[0].uniform == pytest.approx(3 * 0.4 + 0.2 + 0.4)
    assert found.budgets[1].uniform == pytest.approx(3 * 0.1)
    assert found.budgets[4].allocated == found.budgets[4].uniform == 0
    assert all(b.allocated <= b.uniform + 1e-12 for b in found.budgets)
    # what each head stores: Values all, Keys their share
    assert [b.bytes for b in found.budgets] == [0.5, 0.625, 0.75, 0.875, 1]
    # beyond the last level KL shrinks with the energy left: 2^-16 of the total at 16 directions is 2^-8 of that at 8
    tail = [0.5**n - 0.5**DIM for n in (8, 16, 24)]
    assert found.predicted == pytest.approx(0.1 + 0.4 + 0.1 * tail[2] / tail[0], rel=1e-5)


def test_predicted_kl_is_left_out_where_levels_cannot_be_read(artifact):
    for levels in ((8, 0), (8, 16), (0, 7), (0, 64)):
        artifact.method = Method(span="all", levels=levels)
        found = numbers(artifact)
        assert found.budgets == [] and found.predicted is None and "cannot be interpolated" in found.missing["budgets"]
        assert set(found.cuts) == set(levels)


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
    assert found.kept("text")[0].shape == (2,) and found.kept("visual") == {}


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
