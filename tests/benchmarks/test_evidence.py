"""make evidence: which commands run in which order, what is not run again, and what counts as outside."""

import argparse
import json
import subprocess
from pathlib import Path

import check_figures
import evidence
import pytest
import side_by_side

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
    assert check_figures.outside(changed(), changed(**new), same) == said


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A run whose commands only write what they would; `committed` results beside it."""
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(evidence, "RESULTS", results)
    seen = []

    def run(command, check=False, stdout=None, stderr=None, env=None):
        run.threads.add((env or {}).get("OMP_NUM_THREADS"))
        words = [Path(word).name if word.startswith("/") else word for word in command]
        seen.append(words)
        for option in ("-o", "--output"):
            if option in command:
                target = Path(command[command.index(option) + 1])
                target.mkdir(parents=True, exist_ok=True)
                (target / "results.csv").write_text("figures")
                names = {"rotatek-compile": "rotatek_config.json", "rotatek-eval": "documents.jsonl"}
                name = names.get(words[0], f"rotation-{words[3]}.json" if "bench_rotation.py" in words else "subspaces.json")
                figures = changed(num_samples=1) | {"num_samples": 1}
                own = figures | {"models": dict.fromkeys(words[3:5], figures)} if name == "subspaces.json" else figures
                (target / name).write_text(json.dumps(own))
        status = run.status.get(next((w for w in words if w in run.status), ""), 0)
        if status and stdout is not None:
            stdout.write("much\nno room\n")
        return subprocess.CompletedProcess(command, status)

    run.status, run.threads = {}, set()
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
            "jobs": 1,
            "work": tmp_path / "work",
        }
        return evidence.Evidence(argparse.Namespace(**(options | {"only": only, "save": False} | more))).all(), list(seen)

    play.status, play.results, play.threads, play.seen = run.status, results, run.threads, seen
    return play


def test_the_suite_over_all_seeds(played, capsys):
    ended, seen = played("suite")
    python = Path(evidence.sys.executable).name
    assert ended == 0 and [words[0] for words in seen] == [python, python, "rotatek-compile", "rotatek-compile", "rotatek-eval"]
    assert [words[1] for words in seen[:2]] == ["learn_leank.py", "learn_palu.py"]  # the longest first
    assert [words[words.index("--seed") + 1] for words in seen[:4]] == ["0", "0", "0", "5"]  # what rivals learn is of the first seed
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


def test_rotation_of_each_and_subspaces_of_all(played):
    """By the scripts' own defaults, which the committed figures are of."""
    ended, seen = played("rotation", "subspaces", models=["tiny", "other"])
    assert ended == 0 and [words[1] for words in seen] == ["bench_subspaces.py", "bench_rotation.py", "bench_rotation.py"]
    assert [words[2:] for words in seen] == [
        ["--models", *models, "--data", "mixed", "--device", "cpu", "--output", "+".join(models)]
        for models in (["tiny", "other"], ["tiny"], ["other"])
    ]


def test_figures_that_a_rerun_lacks_are_said(played, capsys):
    (played.results / "rotation-tiny.json").write_text(json.dumps(changed(way="channels") | {"num_samples": 1}))
    assert played("rotation")[0] == 0
    shown = capsys.readouterr().out
    assert "rows (0.25, channels)/kl: committed, and not in the rerun" in shown and "all as committed" not in shown
    assert "nothing committed to compare with" not in shown and "not compared: tiny: 2 figures of bench_rotation.py" in shown


def test_a_step_that_fails_ends_the_run(played):
    played.status["rotatek-compile"] = 3
    with pytest.raises(SystemExit, match="error: compile tiny, seed 0 ended with status 3: no room; what is finished is kept"):
        played("suite")
    assert sum(words[0] == "rotatek-compile" for words in played.seen) == 1  # the second did not begin
    played.status.update({"fill_tables.py": 1})
    assert played("tables")[0] == 1


def test_what_is_kept_of_another_run_is_not_taken_for_this_one(played):
    assert played("rotation")[0] == 0
    with pytest.raises(SystemExit, match="holds a run with --documents 3; give the same, or another --work"):
        played("rotation", documents=9)
    with pytest.raises(SystemExit, match="holds a run with --data mixed"):
        played("suite", data="ours")
    with pytest.raises(SystemExit, match=r"holds a run with --seeds \[0, 5\]"):
        played("rotation", seeds=[5])


def test_the_command_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["evidence.py", "--documents", "4", "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match="2"):
        evidence.main()
    assert "--documents 4 are too few to compare; pass 9 or more" in capsys.readouterr().err and not (tmp_path / "work").exists()

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence.Evidence, "all", interrupted)
    monkeypatch.setattr("sys.argv", ["evidence.py", "--work", str(tmp_path / "work")])
    assert evidence.main() == 1 and "steps that are finished are kept" in capsys.readouterr().err


def test_the_suite_is_divided_among_jobs(played, monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(side_by_side, "cores", lambda: 6)
    ended, seen = played("suite", models=["tiny", "other"], jobs=3, documents=9)
    evaluations = [words for words in seen if words[0] == "rotatek-eval"]
    assert ended == 0 and played.threads == {"2"}  # cores over jobs
    shards = sorted((words[1], words[words.index("--shard") + 1]) for words in evaluations if "--shard" in words)
    assert shards == [(f"{model}-0", f"{n}/3") for model in ("other", "tiny") for n in (1, 2, 3)]
    assert all("--resume" not in words for words in evaluations if "--shard" in words)
    assert [words[1] for words in evaluations[6:]] == ["tiny-0", "other-0"]  # put together after all parts
    assert not any("--shard" in words for words in evaluations[6:])
    for model in ("tiny", "other"):  # a model's parts wait for what they read, and for nothing else
        names = {f"{model}-0", f"{model}-5", f"learn_leank-{model}.safetensors", f"learn_palu-{model}.safetensors"}
        made = max(n for n, words in enumerate(seen) if words[0] != "rotatek-eval" and names & set(words))
        assert made < min(n for n, words in enumerate(seen) if "--shard" in words and f"{model}-0" in words)


def test_what_cannot_begin_is_said(tmp_path):
    waiting = side_by_side.Command("the suite", ["true"], 0, needs=(tmp_path / "none",))
    with pytest.raises(SystemExit, match="error: the suite cannot begin: .*none is missing"):
        side_by_side.together([waiting], 2, tmp_path)


def test_a_command_that_makes_nothing_is_said(tmp_path):
    with pytest.raises(SystemExit, match="error: nothing ended without making .*file, .*nothing.txt says why"):
        side_by_side.together([side_by_side.Command("nothing", [evidence.sys.executable, "-c", ""], 0, tmp_path / "file")], 1, tmp_path)
    with pytest.raises(SystemExit, match="error: none cannot run: No such file or directory"):
        side_by_side.together([side_by_side.Command("none", [str(tmp_path / "none")], 0)], 1, tmp_path)


@pytest.mark.parametrize(("cores", "pages", "jobs"), [(4, 8, 4), (4, 3.9, 3), (2, 100, 2), (8, 0.5, 1)])
def test_jobs_follow_cores_and_memory(monkeypatch, cores, pages, jobs):
    """Of memory for `pages` commands."""
    sizes = {"SC_PAGE_SIZE": side_by_side.GIGABYTES * 10**8, "SC_PHYS_PAGES": int(pages * 10)}
    monkeypatch.setattr(side_by_side.os, "sysconf", sizes.get)
    monkeypatch.setattr(side_by_side, "cores", lambda: cores)
    assert side_by_side.usual_jobs() == jobs


def test_parts_that_were_begun_go_on_as_they_were_divided(played, tmp_path):
    folder = tmp_path / "work" / "proof-tiny"
    folder.mkdir(parents=True)
    (folder / "documents-2-of-5.jsonl").write_text("")
    _, seen = played("suite", jobs=2, documents=18)
    parts = {words[words.index("--shard") + 1]: "--resume" in words for words in seen if "--shard" in words}
    assert parts == {f"{n}/5": n == 2 for n in range(1, 6)}
    _, seen = played("suite", jobs=2, documents=18)  # together by now
    assert [words[0] for words in seen] == ["rotatek-eval"] and "--resume" in seen[0] and "--shard" not in seen[0]


def test_one_batch_is_not_divided(played):
    _, seen = played("suite", jobs=4, documents=4)
    assert [("--shard" in words, "--resume" in words) for words in seen if words[0] == "rotatek-eval"] == [(False, False)]


def test_threads_that_were_asked_for_are_kept(played, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert played("rotation", jobs=2)[0] == 0 and played.threads == {"3"}
