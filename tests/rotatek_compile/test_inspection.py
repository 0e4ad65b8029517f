"""What inspect says of knock-outs, of artifacts from before there were any, and of rival methods."""

import json

import pytest
import torch

from rotatek_compile import CompileOptions, compile_artifact
from rotatek_compile.artifact import Artifact, Method, read_artifact
from rotatek_compile.inspection import compare, describe, summary
from rotatek_compile.knockout import diagnosis


@pytest.fixture
def with_knockouts(make_artifact):
    def make(table, **options):
        artifact = make_artifact(8, **options)
        artifact.tensors |= {f"layers.{i}.knockout": torch.tensor(row) for i, row in enumerate(table)}
        return artifact

    return make


def test_the_map_and_its_diagnosis(with_knockouts):
    artifact = with_knockouts([[0.5, 0.01], [0.0, 0.3], [0.021, 0.0]])
    lines = describe(artifact).splitlines()
    at = lines.index("layer   head 0   head 1")
    assert lines[at + 1 :] == [
        "0        0.500    0.010",
        "1        0.000    0.300",
        "2        0.021    0.000",
        "50% of 6 (layer, head) pairs cost at least 0.02 alone; 2 of them carry 90 % of the sum",
    ]
    said = json.loads(json.dumps(summary(artifact)))["knockout"]
    assert said["kl"]["1"] == [0.0, pytest.approx(0.3)]
    assert (said["pairs"], said["share_above"], said["pairs_for_90_percent"]) == (6, 0.5, 2)


def test_artifacts_without_knockouts(make_artifact):
    artifact = make_artifact(8)
    assert summary(artifact)["knockout"] is None
    assert "become their means" not in describe(artifact)
    assert len([line for line in describe(artifact).splitlines() if line[:1] == " "]) == 6


def test_only_the_two_sided_spectrum_is_called_a_logit_error(make_artifact):
    heads = {basis: describe(make_artifact(8, basis=basis)).splitlines() for basis in ("two-sided", "pca", "paper")}
    at = heads["pca"].index("layer head  rank  energy kept    energy cut   KL when cut to rank ")
    assert heads["two-sided"][at] == "layer head  rank  energy kept  logit error²   KL when cut to rank "
    assert heads["paper"][at] == heads["pca"][at]


def test_a_rival_has_a_setting_and_no_ranks(tiny_geometry, with_knockouts):
    tensors = {f"layers.{i}.knockout": torch.tensor([0.5, 0.0]) for i in range(3)}
    rival = Artifact(tiny_geometry, Method(rival="head-drop-native", kv_budget=0.5, keep_ratio=1.0), tensors, {}, {})
    words = describe(rival)
    assert "rival method head-drop-native, KV budget 0.5, span visual" in words
    assert "rank" not in words
    # half of six heads cannot all be native in half of the bytes beside the means of the others: two are, whichever layers
    assert rival.bytes_per_token() == pytest.approx(2 * 4 * 32 + (4 * 32 * 8 + 3) / 512)
    assert summary(rival)["ranks"] == {}
    assert "rival: head-drop-native | None" in compare(rival, with_knockouts([[0.0, 0.0]] * 3))


def test_knockouts_are_of_images_whatever_is_coded(compiled, checkpoint, data_file, tmp_path):
    """With span `all` a cut to rank 0 takes the text along, so knock-outs are measured apart."""
    small = {"num_samples": 4, "batch_size": 2, "device": "cpu", "quiet": True, "span": "all"}
    compile_artifact(CompileOptions(model=str(checkpoint), calib=str(data_file), output=tmp_path / "all", **small))
    visual, everything = read_artifact(compiled), read_artifact(tmp_path / "all")
    for i, row in everything.knockout().items():
        assert torch.allclose(row, visual.knockout()[i], rtol=1e-3)
        assert not torch.equal(row, everything.tensors[f"layers.{i}.sensitivity"][:, 0])
        assert torch.equal(visual.knockout()[i], visual.tensors[f"layers.{i}.sensitivity"][:, 0])


def test_compile_stores_what_it_measured(compiled):
    artifact = read_artifact(compiled)
    table = artifact.knockout()
    assert [tuple(row.shape) for row in table.values()] == [(2,)] * 3
    assert torch.cat(list(table.values())).min() > 0
    for layer in artifact.report["layers"]:
        assert [head["kl_when_knocked_out"] for head in layer["heads"]] == pytest.approx(table[layer["layer"]].tolist())
    assert artifact.report["knockout"] == pytest.approx(diagnosis(table))
