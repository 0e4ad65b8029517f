"""Rows of ours in the codec's benchmarks: what is changed in each, and which groups there are."""

from codec_variants import BASE, GROUPS, ablations, some_groups

from rotatek_compile.artifact import read_artifact
from rotatek_compile.compile_options import CompileOptions
from rotatek_compile.compiler import compile_artifact


def test_groups_of_ablations(tmp_path):
    small = {"num_samples": 2, "sensitivity_samples": 1, "device": "cpu", "quiet": True, "kv_budget": 0.25, "batch_size": 4}
    compile_artifact(CompileOptions(model="tiny-qwen3-vl", calib="letters", output=tmp_path / "made", **small))
    artifact = read_artifact(tmp_path / "made")
    rows = list(ablations(artifact, 0.25, artifact, artifact, own_bases=True))
    assert {row.group for row in rows} == {BASE, *GROUPS}
    assert [row.group for row in some_groups(rows, None)] == [row.group for row in rows]
    basis = list(some_groups(rows, ["basis"]))
    assert [row.words for row in basis] == ["", "basis pca", "basis paper, of the page at hand"]
    assert basis[0].artifact.method.fallback_factor == 0.0 and basis[2].artifact.method.basis == "paper"
    assert all(row.artifact.method.kv_budget == 0.25 for row in rows if "keep ratio" not in row.words)
