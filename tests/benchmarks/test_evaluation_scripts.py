"""The scripts that print evaluations: skills with and without pages, and the suite as Markdown."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from rotatek_compile.calibration_data.sample import Sample
from rotatek_compile.outcomes import Outcome, Row

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"rotatek_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def skills():
    return script("check_skills")


def checkerboard(size):
    return Image.frombytes("L", (2, 2), bytes([0, 255, 255, 0])).resize((2, 2)).convert("RGB").resize(size, Image.Resampling.NEAREST)


def test_pages_are_taken_away(skills):
    fine = Image.new("L", (64, 48))
    fine.putdata([255 * ((x + y) % 2) for y in range(48) for x in range(64)])
    sample = Sample(id="1", images=(fine.convert("RGB"), checkerboard((64, 64))), question="q", answers=("a",), skill="s")
    assert skills.text_only(sample).images == () and skills.text_only(sample).question == "q"
    small = skills.reduced(sample)
    assert [image.size for image in small.images] == [(64, 48), (64, 64)]
    assert all(high - low <= 2 for low, high in small.images[0].getextrema())  # one-pixel detail is gone
    assert all(high - low > 200 for low, high in small.images[1].getextrema())  # coarse detail is not
    empty = skills.blank(sample)
    assert [image.getextrema() for image in empty.images] == [((255, 255),) * 3] * 2
    assert [image.size for image in empty.images] == [(64, 48), (64, 64)]


def test_chance_is_the_best_constant_answer(skills):
    answers = [("yes",), ("yes", "y"), (" yes ",), ("no",), ("3",), ("4",)]
    found = skills.chances(["a", "a", "a", "a", "b", "b"], answers)
    assert found["a"] == ("yes", 0.75) and found["b"] == ("4", 0.5)
    assert found["all"][1] == pytest.approx((3 + 1) / 6)
    assert skills.best_constant([("x", "y"), ("y",), ("y ", "y")]) == ("y", 3)


def row(method, exact, skills=("a", "a", "b", "b")):
    return Row(method, [Outcome(str(n), s, method, e, 0.0, 0.0, 1, "", {}) for n, (e, s) in enumerate(zip(exact, skills, strict=True))])


def test_skill_table(skills):
    rows = {"dense": row("dense", [True] * 4), "text only": row("text only", [False, False, True, True])}
    chance = skills.chances(["a", "a", "b", "b"], [("1",), ("2",), ("3",), ("4",)])
    record = {"model": "m", "data": "d", "dtype": "float32", "device": "cpu", "torch": "1", "transformers": "2"}
    made = skills.table_rows(rows, chance, record)
    assert [(r["skill"], r["run"], r["documents"]) for r in made][:3] == [("all", "dense", 4), ("all", "text only", 4), ("a", "dense", 2)]
    text = skills.markdown(made)
    assert "| a | 2 | 1.000 [1.000, 1.000] | 0.000 [0.000, 0.000] | 0.500 |" in text
    assert "- text only: above chance in b" in text


def test_check_skills_runs(skills, checkpoint, data_file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "skills.csv"
    arguments = ["--model", checkpoint, "--data", data_file, "--documents", 3, "--device", "cpu", "--max-new-tokens", 2]
    monkeypatch.setattr(sys, "argv", ["check_skills", *map(str, arguments), "--output", str(out)])
    assert skills.main() == 0
    printed = capsys.readouterr().out
    with out.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [r["run"] for r in rows] == ["dense", "text only", "4x smaller", "blank page"] and {r["documents"] for r in rows} == {"3"}
    assert rows[0]["model"] == checkpoint.name and rows[0]["data"] == data_file.name
    monkeypatch.setattr(sys, "argv", ["check_skills", "--print", str(out)])
    assert skills.main() == 0 and capsys.readouterr().out == printed


def test_check_skills_says_what_is_wrong(skills, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_skills", "--model", "lava"])
    assert skills.main() == 2 and capsys.readouterr().err.startswith("error: unknown model 'lava'")
    monkeypatch.setattr(sys, "argv", ["check_skills", "--print", str(tmp_path / "no.csv")])
    assert skills.main() == 1


@pytest.fixture
def table(tmp_path):
    """A results.csv of two methods, two modes and one skill."""
    made = []
    for ask in ("after", "with"):
        for method, span, wanted in (("dense", 0, ""), ("int4", 30, "0.25")):
            for skill in ("all", "chart"):
                scores = {f"{name}{end}": 0.5 for name in ("exact_match", "kl") for end in ("", "_low", "_high")}
                about = {"ask": ask, "method": method, "setting": "", "requested_budget": wanted, "kv_budget": wanted and "0.3"}
                sizes = {"span_bytes": span, "span_bytes_dense": 100 if span else 0, "kv_bytes": 50, "kv_bytes_dense": 100}
                facts = {"model": "m", "data": "d", "device": "cpu", "dtype": "float32", "torch": "1", "transformers": "2", "samples": 7}
                made.append(about | {"skill": skill} | scores | sizes | facts)
    file = tmp_path / "results.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(made[0]))
        writer.writeheader()
        writer.writerows(made)
    return file


def test_suite_as_markdown(table, monkeypatch, capsys):
    printer = script("print_suite")
    monkeypatch.setattr(sys, "argv", ["print_suite", str(table)])
    assert printer.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "m, 7 documents of d, cpu, float32, torch 1, transformers 2"
    scores = "0.500 [0.500, 0.500] | 5.0e-01 [5.0e-01, 5.0e-01]"
    assert lines[4:] == [f"| dense | - | 0.5000 | {scores} | {scores} |", f"| int4 (wanted 0.25) | 0.3000 | 0.5000 | {scores} | {scores} |"]
    monkeypatch.setattr(sys, "argv", ["print_suite", str(table), "--skills"])
    assert printer.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| int4 (wanted 0.25) | 0.3000 | 0.500 | 0.500 |"
    monkeypatch.setattr(sys, "argv", ["print_suite", str(table.parent / "no.csv")])
    assert printer.main() == 1 and capsys.readouterr().err.startswith("error: ")


def compared(table, **cells):
    """The table with ours at two budgets beside rivals."""
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = [f"{prefix}{end}" for prefix in ("rival", "above") for end in ("", "_span", "_kl", "_ratio", "_low", "_high")]
    none, int8 = ("",) * 6, ("int8", 0.5156, 4e-6, 1250, 900, 2000)
    for budget, ask, values in (
        (0.125, "after", ("head-drop (4 of 20 heads)", 0.1216, 0.02, 0.25, 0.2, 0.4, *int8)),
        (0.5, "after", ("int4", 0.2656, 0.002, 0.1, 0.05, 0.2, *none)),
        (0.0123, "after", ("int4", 0.2656, 0.02, 0.4, 0.3, 1.2, *none)),
        (0.25, "with", (*none, "int4", 0.2656, 0, "", "", "")),
    ):
        own = next(row for row in rows if (row["method"], row["ask"], row["skill"]) == ("int4", ask, "all"))
        about = {"method": "rotatek", "setting": f"KV budget {budget}", "requested_budget": budget, "kv_budget": budget, "kl": 0.005}
        rows.append(own | about | dict(zip(names, values, strict=True)))
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *names], restval="")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("twice", [False, True])
def test_ours_beside_the_best_rival(table, monkeypatch, capsys, twice):
    compared(table)
    if not twice:  # both modes of one model
        lines = [line for line in table.read_text().splitlines() if not line.startswith("with,rotatek")]
        table.write_text("\n".join(lines) + "\n")
    printer = script("print_suite")
    monkeypatch.setattr(sys, "argv", ["print_suite", *[str(table)] * (2 if twice else 1)])
    if not twice:
        rows = printer.read_results(table)
        assert printer.versus_table(rows, ("with",)) == []
        found = printer.versus_table(rows, ("after", "with"))
    else:
        assert printer.main() == 0
        out = capsys.readouterr().out.splitlines()
        found = out[out.index("m, ours beside the best rivals of each budget:") + 2 :][:5]
    assert found[0] == (
        "| budget | ours | coded span | KL per token | best rival within it, coded span | KL per token | ours / rival | at most half "
        "| best that needs more, coded span | KL per token | ours / rival |"
    )
    # a rival that lost next to nothing says nothing, and neither does an interval that holds 1
    dropped, more = "head-drop (4 of 20 heads), 0.1216 | 2.0e-02 | 0.25 [0.2, 0.4] | yes", "int8, 0.5156 | 4.0e-06 | 1.2e+03 [9e+02, 2e+03]"
    assert found[2:] == [
        "| 1/2 | rotatek, KV budget 0.5 | 0.3000 | 5.0e-03 | int4, 0.2656 | 2.0e-03 | 0.1 [0.05, 0.2] | - | - | - | - |",
        f"| 1/8 | rotatek, KV budget 0.125 | 0.3000 | 5.0e-03 | {dropped} | {more} |",
        "| 0.0123 | rotatek, KV budget 0.0123 | 0.3000 | 5.0e-03 | int4, 0.2656 | 2.0e-02 | 0.4 [0.3, 1.2] | no | - | - | - |",
    ]


def test_modes_are_told_apart(table, capsys):
    compared(table)
    printer = script("print_suite")
    lines = printer.versus_table(printer.read_results(table), ("after", "with"))
    assert lines[0].startswith("| asked | budget |") and [line.split(" | ")[0] for line in lines[2:]] == ["| `after`"] * 3 + ["| `with`"]
    assert lines[-1].endswith("| - | - | - | - | int4, 0.2656 | 0.0e+00 | - [-, -] |")


@pytest.fixture
def proof(table):
    """The table with a method of the Keys alone and ours beside it, of three calibrations."""
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    int4 = next(row for row in rows if (row["method"], row["ask"], row["skill"]) == ("int4", "after", "all"))
    think = int4 | {"method": "think", "axis": "keys", "key_budget": 0.25, "requested_budget": 0.625, "kv_budget": 0.625}
    rival = {"rival": "think", "rival_span": 0.62, "rival_kl": 0.5, "rival_ratio": 0.4, "rival_low": 0.3, "rival_high": 0.6, "above": ""}
    ours = think | {"method": "rotatek", "setting": "Keys 0.25, Values raw", "calibrations": 3} | rival
    rows += [
        think,
        ours,
        int4 | {"method": "raw Keys", "setting": "Values int4", "axis": "values", "requested_budget": "", "kv_budget": ""},
    ]
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return table


@pytest.mark.parametrize("versus", [False, True])
def test_axes_are_tables_of_their_own(proof, monkeypatch, capsys, versus):
    printer = script("print_suite")
    lines = [line for line in proof.read_text().splitlines() if not line.startswith("with,")]
    proof.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "argv", ["print_suite", str(proof), *(["--versus"] if versus else [])])
    assert printer.main() == 0
    out = capsys.readouterr().out
    assert out.startswith("m, 7 documents of d, 3 calibrations, cpu, float32")
    keys, _, values = out.partition("Keys at equal bytes, Values raw on both sides:")[2].partition("Keys raw, Values at 4 bits:")
    assert "| Keys | ours | coded span |" in keys
    assert (
        "| 1/4 | rotatek, Keys 0.25, Values raw | 0.3000 | 5.0e-01 | think, 0.6200 | 5.0e-01 | 0.4 [0.3, 0.6] | yes | - | - | - |" in keys
    )
    assert ("| raw Keys, Values int4 |" in values) != versus and ("| dense |" in keys) != versus
    assert "int4" not in keys


def test_models_beside_each_other(table, monkeypatch, capsys):
    other = table.with_name("other.csv")
    lines = [line for line in table.read_text().splitlines() if not line.startswith(("after,dense", "with,dense"))]
    other.write_text("\n".join(lines).replace(",m,", ",n,").replace(",30,", ",40,") + "\n")
    printer = script("print_suite")
    monkeypatch.setattr(sys, "argv", ["print_suite", str(table), str(other)])
    assert printer.main() == 0
    out = capsys.readouterr().out.splitlines()
    scores = "0.50 [0.50, 0.50] | 5.0e-01"
    assert out[2] == "| method | m: coded span | exact match | KL per token | n: coded span | exact match | KL per token |"
    assert out[4:] == [f"| int4 (wanted 0.25) | 0.3000 | {scores} | 0.4000 | {scores} |"]  # only what both have


@pytest.mark.parametrize("arguments", [(), ("benchmarks/results/bench_decode.csv",)])
def test_decode_table_of_the_saved_run(arguments):
    command = [sys.executable, str(FOLDER / "print_decode.py"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("NVIDIA ") and "| SDPA cuDNN |" in ended.stdout
