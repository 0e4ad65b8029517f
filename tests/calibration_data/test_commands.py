"""The commands with data from the Hub: `--calib docvqa` and `--data chartqa` as users type them, offline from the Hub cache."""

import csv
import json

import pytest

OTHER = "e" * 40


@pytest.fixture
def hub(hub_cache):
    """The repositories that the tests here read."""
    for name in ("HuggingFaceM4/DocumentVQA", "lmms-lab-encoder/ChartQA", "lmms-lab-encoder/DocVQA"):
        hub_cache(name)
    return hub_cache


def test_calibrating_on_a_known_set_records_where_it_lies(cli, checkpoint, hub, hub_commit, small_run, tmp_path):
    ended = cli("compile", "--model", checkpoint, "--calib", "docvqa", "-o", tmp_path / "out", *small_run)
    assert ended.code == 0, ended.err
    calibration = json.loads((tmp_path / "out" / "rotatek_config.json").read_text())["calibration"]
    names = ("data", "repository", "revision", "split", "num_samples", "seed")
    assert [calibration[name] for name in names] == ["docvqa", "HuggingFaceM4/DocumentVQA", hub_commit, "train", 4, 0]


def test_revisions_reach_the_data(cli, compiled, checkpoint, hub, hub_commit, tmp_path):
    hub("HuggingFaceM4/DocumentVQA", commit=OTHER)
    plan = ("compile", "--model", checkpoint, "--calib", "docvqa", "-o", tmp_path / "out", "--dry-run", "--json")
    assert json.loads(cli(*plan, "--calib-revision", hub_commit).out)["data"] == {"name": "docvqa", "split": "train", "num_samples": 64}
    assert "at revision v1 is not in the local cache" in cli(*plan, "--calib-revision", "v1").sentence()
    said = cli("eval", compiled, "--data", "chartqa", "--data-revision", "v1", "--device", "cpu").sentence()
    assert "lmms-lab-encoder/ChartQA or lmms-lab/ChartQA at revision v1 is not in the local cache" in said
    for command in (
        plan[:3] + ("--calib", "forms", "-o", tmp_path / "out", "--calib-revision"),
        ("eval", compiled, "--data", "forms", "--data-revision"),
    ):
        assert "a revision (v1) is for data on the Hub, but forms is bundled; leave it out" in cli(*command, "v1").sentence()


@pytest.fixture
def answers_40(monkeypatch):
    """Whatever is generated, the text is 41: within 5 % of the first reference answer, far from the second."""
    from rotatek_compile.evaluate import Evaluator

    monkeypatch.setattr(Evaluator, "text", lambda self, ids: "41")


def test_the_sets_own_metric_is_reported(cli, compiled, hub, hub_commit, answers_40, tmp_path):
    run = ("eval", compiled, "--data", "chartqa", "--max-new-tokens", 2, "--device", "cpu", "--output", tmp_path / "out")
    ended = cli(*run, "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result["samples"] == 2
    for row in result["rows"]:
        assert (row["metric"], row["score"], row["exact_match"]) == ("relaxed_accuracy", 0.5, 0.0)
        assert row["score_interval"] == [0.0, 1.0]
        assert {skill: found["score"] for skill, found in row["skills"].items()} == {"human": 1.0, "augmented": 0.0}
    lines = [json.loads(line) for line in (tmp_path / "out" / "documents.jsonl").read_text().splitlines()]
    facts = lines[0]["evaluation"]
    assert [facts[name] for name in ("data", "data_repository", "data_revision", "data_split")] == [
        "chartqa", "lmms-lab-encoder/ChartQA", hub_commit, "test",
    ]  # fmt: skip
    assert sorted(line["score"] for line in lines[1:]) == [0.0, 0.0, 1.0, 1.0] and {line["metric"] for line in lines[1:]} == {
        "relaxed_accuracy"
    }
    with (tmp_path / "out" / "results.csv").open(newline="") as stream:
        whole = [row for row in csv.DictReader(stream) if row["skill"] == "all"]
    assert [(row["metric"], row["score"], row["score_low"], row["score_high"]) for row in whole] == [
        ("relaxed_accuracy", "0.5", "0", "1")
    ] * 2


def test_score_in_words(cli, compiled, hub, answers_40):
    ended = cli("eval", compiled, "--data", "chartqa", "--max-new-tokens", 2, "--device", "cpu")
    heading = next(line for line in ended.out.splitlines() if line.startswith("method"))
    assert heading.split()[:4] == ["method", "relaxed_accuracy", "exact", "ANLS"]
    assert ended.out.splitlines()[-1].split()[:3] == ["artifact", "0.500", "0.000"]


def test_length_of_answers_is_the_benchmarks_unless_told(cli, compiled, hub_cache, monkeypatch):
    from rotatek_compile.evaluate import Evaluator

    hub_cache("lmms-lab-encoder/ScienceQA")
    hub_cache("lmms-lab-encoder/ChartQA")
    lengths, original = [], Evaluator.__init__

    def spy(self, model, processor, ask, eos, max_new_tokens):
        lengths.append(max_new_tokens)
        original(self, model, processor, ask, eos, 1)

    monkeypatch.setattr(Evaluator, "__init__", spy)
    for more in (["scienceqa"], ["chartqa"], ["scienceqa", "--max-new-tokens", 3]):
        assert cli("eval", compiled, "--device", "cpu", "--num-samples", 1, "--data", *more).code == 0
    assert lengths == [16, 32, 3]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ocrbench", "ocrbench has no train split (echo840/OCRBench has test), and calibration must not read what is evaluated"),
        (
            "lmms-lab-encoder/DocVQA:DocVQA",
            "has no split train, only validation, test; calibration must not read what is evaluated: use docvqa",
        ),
        ("docvqa:validation", "calibration reads train splits only"),
        ("no/such", "no answer from the Hub (HF_HUB_OFFLINE is set), and no/such is not in the local cache"),
    ],
)
def test_nothing_is_written_when_data_is_refused(cli, checkpoint, hub, tmp_path, name, words):
    said = cli("compile", "--model", checkpoint, "--calib", name, "-o", tmp_path / "out", "--device", "cpu").sentence()
    assert words in said and not (tmp_path / "out").exists()


def test_folder_of_pictures_with_questions(cli, checkpoint, small_run, tmp_path, make_png):
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(4):
        (folder / f"scan{number}.png").write_bytes(make_png(number, (96, 80)))
    rows = [{"file_name": f"scan{n}.png", "question": f"What is {n}?", "answer": f"word {n}"} for n in range(4)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = cli("compile", "--model", checkpoint, "--calib", folder, "-o", tmp_path / "out", *small_run)
    assert ended.code == 0, ended.err
    calibration = json.loads((tmp_path / "out" / "rotatek_config.json").read_text())["calibration"]
    assert (calibration["split"], calibration["num_samples"]) == ("local", 4) and "repository" not in calibration
