"""make evidence: which commands run in which order, what is not run again, and what counts as outside."""

import argparse
import json
import subprocess
from pathlib import Path

import evidence
import pytest

ROW = {"ratio": 0.25, "way": "pca", "kl": 0.1, "kl_interval": [0.05, 0.2], "images": [0.3, 0.2, 0.4]}


def changed(**values):
    return {"documents": 10, "rows": [ROW | values]}


@pytest.mark.parametrize(
    ("new", "same", "said"),
    [
        ({}, True, []),
        ({"kl": 0.2, "kl_interval": [0.19, 0.3]}, True, []),
        ({"kl": 0.21, "kl_interval": [0.1, 0.3]}, True, ["rows (0.25, pca)/kl: 0.21 [0.1, 0.3], committed 0.1 [0.0499, 0.2]"]),
        ({"kl": 0.21, "kl_interval": [0.1, 0.3]}, False, []),  # of other documents: the intervals meet
        ({"kl": 0.31, "kl_interval": [0.21, 0.4]}, False, ["rows (0.25, pca)/kl: 0.31 [0.21, 0.4], committed 0.1 [0.0499, 0.2]"]),
        ({"images": [0.41, 0.4, 0.5]}, True, ["rows (0.25, pca)/images: 0.41 [0.4, 0.5], committed 0.3 [0.2, 0.4]"]),
        ({"way": "channels", "kl": 9.0, "kl_interval": [9, 9], "images": [9, 9, 9]}, True, []),  # another row
        ({"kl": float("nan")}, True, ["rows (0.25, pca)/kl: nan [0.05, 0.2], committed 0.1 [0.0499, 0.2]"]),
    ],
)
def test_figures_outside(new, same, said):
    assert evidence.outside(changed(), changed(**new), same) == said


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A run whose commands only write what they would; `committed` results beside it."""
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(evidence, "RESULTS", results)
    seen = []

    def run(command, check=False, stdout=None):
        words = [Path(word).name if word.startswith("/") else word for word in command]
        seen.append(words)
        for option in ("-o", "--output"):
            if option in command:
                target = Path(command[command.index(option) + 1])
                target.mkdir(parents=True, exist_ok=True)
                (target / "results.csv").write_text("figures")
                names = {"rotatek-compile": "rotatek_config.json", "rotatek-eval": "documents.jsonl"}
                name = names.get(words[0], "rotation-tiny.json" if "bench_rotation.py" in words else "subspaces.json")
                (target / name).write_text(json.dumps(changed(num_samples=1) | {"num_samples": 1}))
        return subprocess.CompletedProcess(command, run.status.get(next((w for w in words if w in run.status), ""), 0))

    run.status = {}
    monkeypatch.setattr(subprocess, "run", run)

    def play(*only, **more):
        seen.clear()
        options = {
            "models": ["tiny"],
            "data": "mixed",
            "seeds": [0, 5],
            "num_samples": 4,
            "documents": 3,
            "device": "cpu",
            "work": tmp_path / "work",
        }
        return evidence.Evidence(argparse.Namespace(**(options | {"only": only, "save": False} | more))).all(), list(seen)

    play.status, play.results = run.status, results
    return play


def test_the_suite_over_all_seeds(played, capsys):
    ended, seen = played("suite")
    python = Path(evidence.sys.executable).name
    assert ended == 0 and [words[0] for words in seen] == ["rotatek-compile", "rotatek-compile", python, python, "rotatek-eval"]
    assert [words[words.index("--seed") + 1] for words in seen[:4]] == ["0", "5", "0", "0"]  # what rivals learn is of the first seed
    assert [words[1] for words in seen[2:4]] == ["learn_leank.py", "learn_palu.py"]
    answered = seen[4]
    assert answered[1] == "tiny-0" and answered[answered.index("--also") + 1] == "tiny-5" and "--resume" not in answered
    learned = [answered[n + 1] for n, word in enumerate(answered) if word == "--learned"]
    assert learned == ["learn_leank-tiny.safetensors", "learn_palu-tiny.safetensors"]
    shown = capsys.readouterr().out
    assert "tiny: no committed results to compare with" in shown and "all as committed" not in shown
    assert "what could be compared is as committed (not compared: tiny: the suite)" in shown
    (played.results / "proof-tiny.csv").write_text("x")
    played.status["check_results.py"] = 1
    ended, seen = played("suite")  # artifacts are there, the evaluation goes on where it stopped
    assert ended == 1 and [words[0] for words in seen][0] == "rotatek-eval" and "--resume" in seen[0] and "check_results.py" in seen[1]
    assert seen[1][2] == "proof-tiny.csv"
    ended, seen = played("suite", save=True)
    assert (played.results / "evidence-tiny.csv").read_text() == "figures" and seen[1][2] == "evidence-tiny.csv"
    assert "tiny: rows of the suite" in capsys.readouterr().out


def test_figures_are_compared(played, capsys):
    committed = changed() | {"num_samples": 1}
    (played.results / "rotation-tiny.json").write_text(json.dumps(committed))
    assert played("rotation")[0] == 0
    assert "bench_rotation.py, tiny: 0 figures outside" in capsys.readouterr().out
    committed["rows"][0] = ROW | {"kl": 5.0, "kl_interval": [4.0, 6.0]}
    (played.results / "rotation-tiny.json").write_text(json.dumps(committed))
    ended, seen = played("rotation")
    assert ended == 1 and seen == []  # measured already
    assert "committed 5 [3.99, 6.01]" in capsys.readouterr().out


def test_figures_that_a_rerun_lacks_are_said(played, capsys):
    (played.results / "rotation-tiny.json").write_text(json.dumps(changed(way="channels") | {"num_samples": 1}))
    assert played("rotation")[0] == 0
    shown = capsys.readouterr().out
    assert "rows (0.25, channels)/kl: committed, and not in the rerun" in shown and "all as committed" not in shown
    assert "nothing committed to compare with" not in shown and "not compared: tiny: 2 figures of bench_rotation.py" in shown


def test_a_step_that_fails_ends_the_run(played):
    played.status["rotatek-compile"] = 3
    with pytest.raises(SystemExit, match="compile tiny, seed 0 ended with status 3; what is finished is kept"):
        played("suite")
    played.status.update({"fill_tables.py": 1})
    assert played("tables")[0] == 1


def test_what_is_kept_of_another_run_is_not_taken_for_this_one(played):
    assert played("rotation")[0] == 0
    with pytest.raises(SystemExit, match="holds a run with --documents 3; give the same, or another --work"):
        played("rotation", documents=9)
    with pytest.raises(SystemExit, match="holds a run with --data mixed"):
        played("suite", data="ours")
