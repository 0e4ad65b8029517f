"""What inspect says of knock-outs, of artifacts from before there were any, and of rival methods."""

import json

import pytest
import torch

from rotatek_compile import CompileOptions, compile_artifact
from rotatek_compile.artifact import Artifact, Method, read_artifact
from rotatek_compile.inspection import compare, describe, summary
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.knockout import diagnosis
from rotatek_compile.plan import HeadPlan


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


KEYS = [[Slabs(8, 8, 16), Slabs(0, 0, 16)], [Slabs(32), Slabs()], [Slabs(0, 32, 0), Slabs(0, 16, 0)]]
VALUES = [[Slabs(0, 0, 32), Slabs(32)], [Slabs(0, 8, 16), Slabs(0, 0, 16)], [Slabs(), Slabs(0, 0, 32)]]
PLAN = [[HeadPlan(*head) for head in zip(*sides, strict=True)] for sides in zip(KEYS, VALUES, strict=True)]


@pytest.fixture
def coded(make_artifact):
    """Every precision on both sides; spectra 2^-n."""
    made = make_artifact(plan=PLAN, levels=(Slabs(), Slabs(0, 0, 16)), kv_budget=0.4)
    for i in range(3):
        for side in ("key", "value"):
            made.tensors[f"layers.{i}.visual.{side}_spectrum"] = (0.5 ** torch.arange(32)).expand(2, 32).clone()
            made.tensors[f"layers.{i}.{side}_sensitivity"] = torch.tensor([[0.5, 0.25], [0.1 * i, 0.0]])
    return made


def test_the_plan_of_both_sides(coded):
    lines = describe(coded).splitlines()
    # Keys and Values: 16 + 8 + 8 and 16 bytes; 8 and 64; 64 and 8 + 8; 0 and 8; 32 and 0; 16 and 16
    assert "bytes per coded token, all layers: 768 dense, 272 compressed (2.82x smaller)" in lines
    # bits: Keys 8 * (32 + 8 + 64 + 0 + 32 + 16), Values 8 * (16 + 64 + 16 + 8 + 0 + 16), over 6 * 32 channels
    # beside codes: 12 sides, two raw, 64 bytes of mean each; 2 bytes of scale for 24 + 16 + 32 + 16 and 32 + 24 + 16 + 32 directions
    assert "Keys 6.33, Values 5.00; an image of 512 tokens" in lines[4]
    assert lines[4].endswith(f"{512 * 272 + 640 + 2 * 192:,} bytes of {512 * 768:,} (0.3568)")
    at = lines.index("layer head  Keys           Values    bytes  Key energy  logit error²  Value energy")
    assert lines[at + 1].split() == ["0", "0", "8×16", "8×8", "16×4", "32×4", "48", "1.0000", "0.000e+00", "1.0000"]
    assert lines[at + 3].split()[2:5] == ["raw", "8×8", "16×4"] and lines[at + 4].split()[2:] == [
        "mean",
        "16×4",
        "8",
        "0.0000",
        "2.000e+00",
        "1.0000",
    ]
    at = lines.index("KL when the Values of one head alone are cut (nats per answer token)")
    assert lines[at + 1].split() == ["layer", "head", "mean", "16×4"] and lines[at + 7].split() == ["2", "1", "2.00e-01", "0.00e+00"]
    assert "KL when the Keys of one head alone are cut (nats per answer token)" in lines


def test_plans_as_numbers(coded):
    said = json.loads(json.dumps(summary(coded)))
    assert said["ranks"] == {"0": [32, 16], "1": [32, 0], "2": [32, 16]}
    assert said["plan"]["1"] == [{"key": [32, 0, 0], "value": [0, 8, 16]}, {"key": [0, 0, 0], "value": [0, 0, 16]}]
    assert said["sizes"]["value_bits"] == 5 and said["sizes"]["image_bytes"] == {"dense": 512 * 768, "compressed": 512 * 272 + 640 + 384}


def test_two_plans_side_by_side(coded, make_artifact):
    assert "plan: the same in all 6 heads" in compare(coded, coded)
    lines = compare(coded, make_artifact([[8, 16], [32, 0], [32, 16]])).splitlines()
    assert "kv_budget: 0.4 | None" in lines and "bits per channel, Values: 5.00 | 16.00" in lines
    at = lines.index("plan: 6 of 6 heads differ (directions × bits)")
    assert lines[at + 1] == "layer head  Keys          | Keys   Values   | Values"
    assert lines[at + 2] == "    0    0  8×16 8×8 16×4 | 8×16   32×4     | raw"
    assert lines[at + 4] == "    1    0  raw           | raw    8×8 16×4 | raw"
    other = make_artifact(plan=[PLAN[0], PLAN[1][:1] + [HeadPlan(Slabs(8), Slabs(0, 0, 16))], PLAN[2]])
    assert compare(coded, other).splitlines()[-2:] == [
        "layer head  Keys | Keys  Values | Values",
        "    1    1  mean | 8×16  16×4   | 16×4",
    ]


def test_only_the_two_sided_spectrum_is_called_a_logit_error(make_artifact):
    heads = {basis: describe(make_artifact(8, basis=basis)).splitlines() for basis in ("two-sided", "pca", "paper")}
    at = heads["pca"].index("layer head  Keys  Values  bytes  Key energy    energy cut  Value energy")
    assert heads["two-sided"][at] == "layer head  Keys  Values  bytes  Key energy  logit error²  Value energy"
    assert heads["paper"][at] == heads["pca"][at]


def test_a_rival_has_a_setting_and_no_ranks(tiny_geometry, with_knockouts):
    tensors = {f"layers.{i}.knockout": torch.tensor([0.5, 0.0]) for i in range(3)}
    rival = Artifact(tiny_geometry, Method(rival="head-drop-native", kv_budget=0.5, keep_ratio=1.0), tensors, {}, {})
    words = describe(rival)
    assert "rival method head-drop-native, KV budget 0.5, span visual" in words
    assert "Key energy" not in words and "bits per channel" not in words
    # half of six heads cannot all be native in half of the bytes beside the means of the others: two are, whichever layers
    assert rival.bytes_per_token() == pytest.approx(2 * 4 * 32 + (4 * 32 * 8 + 3) / 512)
    assert summary(rival)["ranks"] == summary(rival)["plan"] == {} and summary(rival)["sizes"] is None
    assert "rival: head-drop-native | None" in compare(rival, with_knockouts([[0.0, 0.0]] * 3))


def test_knockouts_are_of_images_whatever_is_coded(compiled, checkpoint, data_file, tmp_path):
    """With span `all` a cut to rank 0 takes the text along, so knock-outs are measured apart."""
    small = {"num_samples": 4, "batch_size": 2, "device": "cpu", "quiet": True, "span": "all"}
    compile_artifact(CompileOptions(model=str(checkpoint), calib=str(data_file), output=tmp_path / "all", **small))
    visual, everything = read_artifact(compiled), read_artifact(tmp_path / "all")
    for i, row in everything.knockout().items():
        assert torch.allclose(row, visual.knockout()[i], rtol=1e-3)
        assert not torch.equal(row, everything.sensitivity("value")[i][:, 0])


def test_compile_stores_what_it_measured(compiled):
    artifact = read_artifact(compiled)
    table = artifact.knockout()
    assert [tuple(row.shape) for row in table.values()] == [(2,)] * 3
    assert torch.cat(list(table.values())).min() > 0
    for layer in artifact.report["layers"]:
        assert [head["kl_when_knocked_out"] for head in layer["heads"]] == pytest.approx(table[layer["layer"]].tolist())
    assert artifact.report["knockout"] == pytest.approx(diagnosis(table))
