"""Artifacts of the first format, ranks of native Keys with raw Values, are still read, and as strictly."""

import json

import pytest
import torch
from artifact_edits import edit_config, edit_tensors, put, refused, with_entry

from rotatek_compile.artifact import CONFIG_FILE, read_artifact, write_artifact
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan

RANKS = [[8, 0], [16, 32], [0, 24]]


@pytest.fixture
def first_format(broken_artifact):
    """By hand what the first version wrote: no knock-outs, rival or position axes; ranks of native Keys and their sensitivities."""

    def older_tensors(tensors):
        for i, ranks in enumerate(RANKS):
            for name in ("knockout", "key_plan", "value_plan", "key_sensitivity", "value_sensitivity"):
                del tensors[f"layers.{i}.{name}"]
            tensors[f"layers.{i}.key_rank"] = torch.tensor(ranks, dtype=torch.int32)
            tensors[f"layers.{i}.sensitivity"] = torch.tensor([[1.0, 0.5, 0.25]] * 2) + i

    def older(config):
        for section, names in (("geometry", ("position_axes",)), ("rotatek", ("rival", "kv_budget", "max_kl"))):
            for name in names:
                del config[section][name]
        config["format_version"], config["rotatek"]["levels"] = 1, [0, 8, 16]

    edit_tensors(broken_artifact, older_tensors)
    edit_config(broken_artifact, older)
    return broken_artifact


def test_artifacts_of_the_first_version_load(first_format, tmp_path):
    artifact = read_artifact(first_format)
    assert (artifact.knockout(), artifact.geometry.position_axes, artifact.method.rival) == ({}, 1, None)
    assert artifact.plan() == {i: [HeadPlan(Slabs(rank), Slabs(32)) for rank in ranks] for i, ranks in enumerate(RANKS)}
    assert artifact.method.levels == (Slabs(), Slabs(8), Slabs(16))
    assert artifact.sensitivity("key")[2].tolist() == [[3.0, 2.5, 2.25]] * 2 and artifact.sensitivity("value") == {}
    assert artifact.bytes_per_token() == 3 * 2 * 2 * 32 + 2 * sum(map(sum, RANKS))
    (tmp_path / "again").mkdir()
    write_artifact(artifact, tmp_path / "again", "card")  # in the present format
    again = read_artifact(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG_FILE).read_text())["format_version"] == 2
    assert (again.plan(), again.method, again.tensors.keys()) == (artifact.plan(), artifact.method, artifact.tensors.keys())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("layers.1.key_rank", with_entry(0, 12)), "plan layers.1.key_rank is [12, 32], allowed are multiples of 8 from 0 to 32"),
        (put("layers.1.key_rank", with_entry(0, -8)), "key_rank is [-8, 32]"),
        (put("layers.1.key_rank", with_entry(0, 40)), "key_rank is [40, 32]"),
        (put("layers.1.sensitivity", lambda t: t[:, :2]), "layers.1.sensitivity has shape [2, 2], the geometry wants [2, 3]"),
        (lambda tensors: tensors.pop("layers.2.key_rank"), "tensor layers.2.key_rank is missing"),
    ],
)
def test_damaged_tensors_of_the_first_version(first_format, change, words):
    edit_tensors(first_format, change)
    assert words in refused(first_format)


@pytest.mark.parametrize("levels", [[1.5], 7, [12], [[0, 0, 0]]])
def test_damaged_levels_of_the_first_version(first_format, levels):
    edit_config(first_format, lambda c: c["rotatek"].update(levels=levels))
    assert f"levels is {levels}, expected a list of ranks" in refused(first_format)
