"""The model card: what the Hub reads of it, what a person reads, and measured numbers that come and go without touching the rest."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard

from rotatek_compile.card import card_for_hub, model_card, write_measured
from rotatek_compile.card_picture import draw_heads
from rotatek_compile.errors import RotateKError
from rotatek_compile.inspection import describe
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan

FACTS = {
    "data": "forms", "documents": 12, "dtype": "float32", "device": "cpu", "torch": "2.13.0", "transformers": "5.23.0", "rotatek": "0.1.0",
}  # fmt: skip


@pytest.fixture
def artifact(make_artifact):
    """Three layers of two heads: ranks 0 to 32."""
    made = make_artifact([[0, 8], [16, 16], [24, 32]])
    made.base_model = {"id": "org/base", "revision": "abc", "fingerprint": None}
    made.calibration = {"data": "forms", "split": "train", "num_samples": 64}
    made.report = {"kv_bytes_per_token": {"dense": 768, "compressed": 480}, "plan_kl": 1.25e-5}
    made.tensors |= {f"layers.{i}.knockout": torch.tensor([0.0, 0.5 * i]) for i in range(3)}
    return made


def row(method, exact, kl, span, ask="after", **more):
    sizes = {"span_bytes": span, "span_bytes_dense": 1000 if method != "dense" else 0, "kv_bytes": span + 100, "kv_bytes_dense": 1100}
    scores = {"exact_match": exact, "exact_match_interval": [exact - 0.1, exact], "kl": kl, "anls": exact}
    return {"ask": ask, "method": method, "setting": ""} | sizes | scores | more


ROWS = [row("dense", 1.0, 0.0, 1000), row("artifact", 0.75, 0.0123, 600), row("int4", 0.5, 0.2, 260, setting="groups of 32")]


def write(folder, artifact, **options):
    (folder / "README.md").write_text(model_card(artifact, **options), encoding="utf-8")
    return folder / "README.md"


def test_front_matter_and_body(artifact):
    card = ModelCard(model_card(artifact, picture=True))
    assert card.data.base_model == "org/base" and card.data.library_name == "rotatek-compile"
    assert card.data.pipeline_tag == "image-text-to-text" and {"rotatek", "kv-cache"} <= set(card.data.tags)
    assert "# RotateK artifact for org/base" in card.text and 'rotatek_compile.load("THIS_DIRECTORY")' in card.text
    assert "480 of 768 dense (1.60x)" in card.text and "1.25e-05 nats" in card.text and "calibrated on 64 samples of `forms`" in card.text
    kept = "0 to 32 Key directions, mean 16.0, 1 pairs keep none"
    assert f"![What each of 3 layers and 6 (layer, KV head) pairs keeps: {kept}; beside it what cutting" in card.text
    assert "- basis two-sided, allocated ranks, keep ratio 0.25\n" in card.text and "Values are stored raw" in card.text
    # half of the Keys, and five means of 32 channels beside the raw head
    share = (512 * 2 * (96 + 192) + 5 * 64) / (512 * 768)
    assert f"- an image of 512 tokens with its scales and means: {share:.4f} of its dense bytes\n" in card.text
    assert "- bits per channel: Keys 8.00, Values 16.00, where 16 are dense\n" in card.text
    assert "heads.png" not in model_card(artifact) and card.data.datasets is None
    artifact.calibration["repository"] = "org/pages"
    assert ModelCard(model_card(artifact)).data.datasets == ["org/pages"]


@pytest.mark.parametrize(
    ("base", "title", "hint"),
    [
        ({"id": "/home/me/model", "revision": None, "fingerprint": "f" * 64}, "a local checkpoint", True),
        ({"id": "model", "revision": None, "fingerprint": "f" * 64}, "a local checkpoint", True),
        ({"id": "org/model", "revision": None, "fingerprint": "f" * 64}, "a local checkpoint", True),
        ({"id": "tiny-qwen3-vl", "revision": None, "fingerprint": "f" * 64}, "tiny-qwen3-vl (bundled)", False),
    ],
)
def test_no_base_model_but_a_hub_id(artifact, base, title, hint):
    artifact.base_model = base
    text = model_card(artifact)
    assert "base_model" not in text and "/home" not in text
    assert f"# RotateK artifact for {title}\n" in text and ("`--model PATH`" in text) is hint
    with_weights = model_card(artifact, weights=True)
    assert "its licence applies" in with_weights and "--model PATH" not in with_weights


def coded(make_artifact):
    plan = [[HeadPlan(Slabs(8, 8, 16), Slabs(0, 0, 32)), HeadPlan(Slabs(), Slabs(0, 8))]] * 3
    made = make_artifact(plan=plan, kv_budget=0.25)
    made.report = {"kv_bytes_per_token": {"dense": 768, "compressed": 168}, "plan_kl": 0.001}
    return made


def test_coded_values(make_artifact):
    text = model_card(coded(make_artifact), picture=True)
    assert "Values are stored raw" not in text and "- basis two-sided, allocated directions and bits, KV budget 0.25\n" in text
    assert "- bits per channel: Keys 4.00, Values 3.00, where 16 are dense\n" in text
    assert "0 to 32 Key directions, mean 16.0, 3 pairs keep none; 8 to 32 Value directions, mean 20.0; beside it" in text


def test_fewer_tokens(make_artifact):
    """Sizes and KL of a plan are of the kept tokens alone, and say so."""
    made = coded(make_artifact)
    assert "- an image of 512 tokens with its scales and means: " in model_card(made)
    made.method = replace(made.method, token_method="fastv", token_keep_ratio=0.5)
    text = model_card(made)
    assert "- 512 kept tokens of images with their scales and means: " in text
    assert "nats per answer token, of codes alone, without the dropped tokens\n" in text
    assert "512 kept tokens of images with their scales" in describe(made)


def test_means_alone(make_artifact):
    made = make_artifact(plan=[[HeadPlan(Slabs(), Slabs())] * 2] * 3, kv_budget=0.002)
    made.report = {"kv_bytes_per_token": {"dense": 768, "compressed": 0}, "plan_kl": 2.0}
    assert "- bytes per coded token, all layers: 0 of 768 dense, codes alone\n" in model_card(made)


def test_picture_of_coded_values(make_artifact, tmp_path):
    from rotatek_compile.card_picture import _panels

    found = [(title, table.tolist()[0]) for title, table, _ in _panels(coded(make_artifact))]
    assert found == [
        ("Keys: directions kept", [32, 0]), ("Keys: bits per channel", [8, 0]),
        ("Values: directions kept", [32, 8]), ("Values: bits per channel", [4, 2]),
    ]  # fmt: skip
    pytest.importorskip("matplotlib")
    assert draw_heads(coded(make_artifact), tmp_path / "a.png")


def test_text_only_model(artifact):
    from dataclasses import replace

    artifact.geometry = replace(artifact.geometry, visual_token_ids=())
    text = model_card(artifact)
    assert "pipeline_tag: text-generation" in text and "--image" not in text


def test_card_for_hub(artifact):
    artifact.base_model["fingerprint"] = "f" * 64
    card = card_for_hub(model_card(artifact), "org/art", weights=True)
    assert "THIS_DIRECTORY" not in card and 'rotatek_compile.load("org/art")' in card and "rotatek-run org/art --image" in card
    assert card.count("its licence applies") == 1 and "--model PATH" not in card
    assert card_for_hub(card, "org/art", weights=True) == card


def test_measured(artifact, tmp_path):
    file = write(tmp_path, artifact)
    write_measured(tmp_path, "org/base", ROWS, FACTS)
    text = file.read_text()
    assert "| artifact | 0.750 [0.650, 0.750] | 1.2e-02 | 0.600 | 0.636 |" in text
    assert "| dense | 1.000 [0.900, 1.000] | 0.0e+00 | - | 1.000 |" in text
    assert "| int4, groups of 32 | 0.500 [0.400, 0.500] | 2.0e-01 | 0.260 | 0.327 |" in text
    assert "`forms`, 12 documents, question asked after the images were compressed. float32 on cpu, torch 2.13.0" in text
    results = {r.metric_type: r.metric_value for r in ModelCard.load(file).data.eval_results}
    assert results == {"exact_match": 0.75, "kl_divergence": 0.0123}
    assert text.index("## Measured") < text.index("## Limits")
    assert [entry.name for entry in tmp_path.iterdir()] == ["README.md"]


def test_measured_again_replaces_its_own(artifact, tmp_path):
    file = write(tmp_path, artifact)
    edited = file.read_text().replace("## Limits\n", "## Limits\n\nA sentence by hand.\n").replace("- rotatek\n", "- rotatek\n- mine\n")
    file.write_text(edited)
    write_measured(tmp_path, "org/base", ROWS, FACTS)
    write_measured(tmp_path, "org/base", [r | {"ask": "with"} for r in ROWS], FACTS)
    write_measured(tmp_path, "org/base", ROWS, FACTS | {"data": "tables"})
    write_measured(tmp_path, "org/base", [row("dense", 1.0, 0.0, 1000), row("artifact", 0.25, 0.5, 600)], FACTS)
    card = ModelCard.load(file)
    assert card.text.count("| artifact |") == 3 and card.text.count("| artifact | 0.250 [0.150, 0.250] |") == 1
    assert card.text.count("## Measured") == 1 and "A sentence by hand." in card.text and "mine" in card.data.tags
    found = {(r.dataset_name, r.dataset_config.split()[2], r.metric_type): r.metric_value for r in card.data.eval_results}
    assert len(found) == 6 and found["forms", "after", "exact_match"] == 0.25 and found["forms", "before", "exact_match"] == 0.75
    # as if nothing had been measured in between
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text(edited)
    write_measured(other, "org/base", ROWS, FACTS)
    before = (other / "README.md").read_text()
    write_measured(other, "org/base", ROWS, FACTS)
    assert (other / "README.md").read_text() == before


@pytest.mark.parametrize("metric", ["relaxed_accuracy", "anls"])
def test_the_data_sets_own_metric(artifact, tmp_path, metric):
    file = write(tmp_path, artifact)
    rows = [r | {"metric": metric, "score": 0.9, "score_interval": [0.8, 1.0]} for r in ROWS]
    write_measured(tmp_path, "org/base", rows, FACTS)
    assert f"| method | {metric} | exact match |" in file.read_text()
    assert "| artifact | 0.900 [0.800, 1.000] | 0.750" in file.read_text()
    assert ModelCard.load(file).data.eval_results[0].metric_value == 0.9


def test_a_text_only_model_has_no_images(artifact, tmp_path):
    file = write(tmp_path, artifact)
    assert "pipeline_tag: image-text-to-text" in file.read_text()
    file.write_text(file.read_text().replace("pipeline_tag: image-text-to-text", "pipeline_tag: text-generation"))
    write_measured(tmp_path, "org/base", ROWS, FACTS)
    assert "question asked after older text was compressed" in file.read_text() and "| coded text | whole cache |" in file.read_text()
    assert {r.task_type for r in ModelCard.load(file).data.eval_results} == {"text-generation"}


def test_card_without_a_heading_or_front_matter(artifact, tmp_path):
    (tmp_path / "README.md").write_text("My words.\n")
    write_measured(tmp_path, "org/base", ROWS, FACTS)
    assert "My words." in (tmp_path / "README.md").read_text() and "| artifact |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("---\n[: broken\n---\nMy words.\n")
    with pytest.raises(RotateKError, match="README.md cannot be read as a model card"):
        write_measured(tmp_path, "org/base", ROWS, FACTS)
    with pytest.raises(RotateKError, match="cannot be read as a model card"):
        write_measured(tmp_path / "no", "org/base", ROWS, FACTS)


def test_picture(artifact, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    assert draw_heads(artifact, tmp_path / "a.png") and draw_heads(artifact, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 400 and len(set(picture.convert("RGB").resize((64, 64)).getdata())) > 20
    artifact.tensors["layers.1.key_plan"][:, 0] += 8
    assert draw_heads(artifact, tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_picture_shows_ranks_and_knockouts(artifact):
    from rotatek_compile.card_picture import _panels

    (_, ranks, _), (_, costs, logarithmic) = _panels(artifact)
    assert ranks.tolist() == [[0, 8], [16, 16], [24, 32]] and costs.tolist() == [[0, 0], [0, 0.5], [0, 1.0]] and logarithmic


def test_no_picture_without_matplotlib(artifact, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_heads(artifact, tmp_path / "a.png") is False and not any(tmp_path.iterdir())


def test_eval_writes_the_card(cli, broken_artifact, data_file):
    more = ("--max-new-tokens", 2, "--device", "cpu", "--num-samples", 3, "--batch-size", 2)
    ended = cli("eval", broken_artifact, "--data", data_file, *more, "--method", "int4", "--write-card", "--json")
    assert ended.code == 0, ended.err
    card = ModelCard.load(broken_artifact / "README.md")
    assert "`pages.jsonl`, 3 documents" in card.text and str(data_file.parent) not in str(card)
    measured = json.loads(ended.out)["rows"][1]
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results["exact_match"] == pytest.approx(measured["exact_match"]) and results["kl_divergence"] == pytest.approx(
        measured["kl"], rel=1e-3
    )
    (broken_artifact / "README.md").unlink()
    assert "--write-card: " in cli("eval", broken_artifact, "--data", data_file, *more, "--write-card").sentence()
