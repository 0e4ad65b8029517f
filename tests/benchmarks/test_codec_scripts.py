"""The scripts that measure the codec: which rivals and variants they take, how pages are broken, and what their tables say."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import sparse_pages
from PIL import Image

from rotatek_compile.calibration_data.sample import Sample
from rotatek_compile.errors import RotateKError
from rotatek_compile.outcomes import Outcome, Row
from rotatek_compile.suite import read_results

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"rotatek_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


codec, broken, printer = (script(name) for name in ("bench_codec", "bench_broken_inputs", "print_codec"))


def suite_row(method, span, kl, budget="", ask="after", skill="all"):
    return {"method": method, "ask": ask, "skill": skill, "kl": str(kl), "kv_budget": str(budget), "keep_ratio": ""} | {
        "span_bytes": str(span * 1000), "span_bytes_dense": "1000"}  # fmt: skip


def test_best_rivals_within_and_above_a_budget():
    rows = [
        suite_row("int4", 0.2656, 3e-3, 0.265625),
        suite_row("kivi2", 0.19, 0.13, 0.19),
        suite_row("hadamard2", 0.1875, 0.04, 0.1875),
        suite_row("head-drop", 0.12, 0.01, 0.125),
        suite_row("head-drop", 0.05, 0.2, 0.0625),
        suite_row("int8", 0.5156, 1e-6, 0.515625),
        suite_row("int8", 0.5156, 0.0, 0.515625, ask="with"),
        suite_row("head-drop-native", 0.13, 0.9, 0.125),  # promised, though short images cost it more
        suite_row("rotatek", 0.1, 0.0, 0.125),
        suite_row("dense", 1, 0.0),
    ]

    def names(budget, count):
        return [(row["method"], row["kl"]) for row in codec.best_rivals(rows, budget, "after", count)]

    assert names(1 / 8, 2) == [("head-drop", "0.01"), ("head-drop-native", "0.9"), ("int8", "1e-06"), ("int4", "0.003")]
    assert names(1 / 4, 1) == [("head-drop", "0.01"), ("int8", "1e-06")]
    assert names(1 / 16, 1) == [("head-drop", "0.2"), ("int8", "1e-06")]


def test_broken_pages_are_what_their_names_say():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (10, 13, 3), dtype=np.uint8)
    page = Image.fromarray(pixels)
    made = {name: np.asarray(change(page, np.random.default_rng(1))) for name, change in broken.CHANGES.items()}
    assert (made["as they are"] == pixels).all() and (made["colours inverted"] == 255 - pixels).all()
    assert (made["mirrored"] == pixels[:, ::-1]).all() and (made["blank"] == 255).all()
    glyphs = made["other glyphs"]
    assert (glyphs[4:8, 8:12] == pixels[4:8, 8:12].transpose(1, 0, 2)).all()  # each cell by itself
    assert (glyphs[8:] == pixels[8:]).all() and (glyphs[:, 12:] == pixels[:, 12:]).all()
    moved = np.abs(made["strong noise"].astype(int) - pixels)
    assert 30 < moved.mean() < 90 and made["random pixels"].std() > 60
    sample = Sample(id="7", images=(page, page), question="q", answers=("a",))
    first, again = (broken.broken(sample, broken.CHANGES["random pixels"], 3) for _ in range(2))
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in again.images]
    assert first.images[0].tobytes() != first.images[1].tobytes() and first.question == "q"


def outcomes(method, exact, kl=0.5, fallback=()):
    sizes = {"total": 1, "dense": 4, "stored": 1, "span": 1, "span_dense": 4, "window": 0, "basis": 0, "slack": 0, "tables": 0}
    fallback = fallback or [0] * len(exact)
    made = [Outcome(str(n), "", method, e, 0.0, kl, 1, str(e), sizes | {"fallback_heads": fallback[n]}) for n, e in enumerate(exact)]
    return Row(method, made)


@pytest.mark.parametrize(
    ("right", "fell", "warned", "good"),
    [(50, [], [], 1), (49, [], [], 1), (47, [], [], 0), (47, [47, 48], [], 1), (47, [1, 2, 3], [], 0), (47, [], [48, 49], 1)],
)
def test_a_lost_answer_must_be_said(right, fell, warned, good):
    dense = outcomes("dense", [True] * 50)
    ours = outcomes("artifact", [n < right for n in range(50)], fallback=[3 * (n in fell) for n in range(50)])
    far = {"angle": 20.0, "calibrated_angle": 10.0, "usual_deviation": 1.5}
    said = [{"fallback_heads": 3 * (n in fell), "warned": n in warned, "deviation": 1.0 + (n == 7)} | far for n in range(50)]
    said[8] |= {"deviation": None, "usual_deviation": None}  # a short page
    row = broken.row_of("x", dense, ours, said)
    assert row["good"] == good and row["loss"] == pytest.approx(1 - right / 50) and row["span"] == 0.25
    assert row["same_answers"] == right / 50 and row["fallback_heads"] == 3 * len(fell) and row["kl"] == 0.5
    assert (row["fell_back"], row["warned_of"]) == (len(fell) / 50, len(warned) / 50)
    assert (row["deviation"], row["usual_deviation"], row["angle"]) == (2.0, 1.5, 20.0)
    unsaid = [n for n in range(right, 50) if n not in fell and n not in warned]
    assert row["silent_loss"] == pytest.approx(len(unsaid) / 50)


def write(file, rows):
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def result(method, setting, kl, **more):
    about = {
        "model": "m",
        "data": "d",
        "samples": "4",
        "device": "cpu",
        "dtype": "float32",
        "torch": "1",
        "transformers": "2",
        "ask": "after",
    }
    numbers = {f"{name}{end}": "0.5" for name in ("exact_match", "exact_match_loss") for end in ("", "_low", "_high")}
    costs = {f"kl{end}": str(kl) for end in ("", "_low", "_high")}
    none = {f"{name}{end}": "" for name in ("rival", "above") for end in ("", "_span", "_kl", "_ratio", "_low", "_high")}
    made = {"skill": "all", "method": method, "setting": setting, "span_bytes": "1", "span_bytes_dense": "16", "fallback_heads": "3"}
    kind = {"part": "curve", "budget": "0.0625", "group": "", "does_not_show": "", "base_ratio": "", "base_low": "", "base_high": ""}
    return about | numbers | costs | none | made | kind | more


def test_tables_are_merged_and_printed(tmp_path):
    rival = {
        "rival": "head-drop (x)",
        "rival_span": "0.06",
        "rival_kl": "0.2",
        "rival_ratio": "0.4",
        "rival_low": "0.3",
        "rival_high": "0.6",
    }
    write(tmp_path / "a.csv", [result("dense", "", 0), result("rotatek", "KV budget 0.0625", 0.08, exact_match_loss="0.03", **rival)])
    changed = {"part": "ablations", "group": "precision", "does_not_show": "speed", "base_ratio": "4", "base_low": "2", "base_high": "9"}
    base = [result("dense", "", 0, part="ablations"), result("rotatek", "KV budget 0.0625", 0.1, part="ablations", group="as planned")]
    write(tmp_path / "b.csv", [*base, result("rotatek", "KV budget 0.0625, 4-bit directions only", 0.4, **changed)])
    rows = printer.merged([tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "a.csv"])
    assert len(rows) == 5
    said = "\n".join(printer.tables(rows))
    assert "| 1/16 | planned from the artifact | 4 | 0.0625 | 0.500 [0.500, 0.500] |" in said and "0.4 [0.3, 0.6]" in said
    assert "- 1/16: loses 0.030 of dense exact match, NOT within 0.02" in said
    assert "- 1/16: at most half of the KL of head-drop (x)" in said and "by skill" not in said
    assert (
        "| precision | 4-bit directions only | 0.0625 | 0.500 [0.500, 0.500] | 4.0e-01 [4.0e-01, 4.0e-01] | 4 [2, 9] | 3 | speed |" in said
    )


def test_what_gives_way_is_shown_by_skill():
    rows = [result("dense", "", 0), result("dense", "", 0, skill="line", exact_match="1"), result("dense", "", 0, skill="cell")]
    for budget, words, right in (("0.03125", "", "0.75"), ("0.0625", "", "0.9"), ("0.0625", ", no fallback", "0.1")):
        rows.append(result("rotatek", f"KV budget {budget}{words}", 0.1, budget=budget, skill="line", exact_match=right))
    assert printer.skill_table(rows)[2:] == [
        "| budget | cell | line |", "|---|---|---|", "| dense | 0.500 | 1.000 |", "| 1/16 | - | 0.900 |", "| 1/32 | - | 0.750 |", "",
    ]  # fmt: skip


def test_plans_are_printed(tmp_path):
    found = {"plans": 40, "documents": 80, "rank_correlation": 0.9, "rank_correlation_interval": [0.5, 0.95], "chosen_rank": 2,
             "kl": {"chosen": 1e-3, "uniform": 0.1}, "random_kl": {"least": 9e-4, "median": 0.01, "largest": 1.0},
             "chosen_over_best_random": [0.5, 4.25]}  # fmt: skip
    about = {"skipped": 504, "device": "d", "dtype": "f", "torch": "1", "transformers": "2", "data": "mixed"}
    about |= {"num_samples": 96, "sensitivity_samples": 36}
    (tmp_path / "plans.json").write_text(json.dumps(about | {"models": {"m": {"seconds": {"x": 1}, "0.125": found}}}))
    said = printer.plans_table([tmp_path / "plans.json"])
    assert said[0].startswith("96 calibration documents of mixed, 36 of them cut; evaluation documents from the 505th on; d, f, torch 1")
    assert said[-1] == "| m | 1/8 | 40 | 80 | 0.90 [0.50, 0.95] | 2 of 41 | 1.0e-03 | 9.0e-04 | 1.0e-02 | 1.0e-01 | [0.5, 4.2] |"
    (tmp_path / "plans.json").write_text("{}")
    with pytest.raises(RotateKError, match="bench_plans"):
        printer.plans_table([tmp_path / "plans.json"])


def test_plans_that_were_chosen_anew_have_a_place_among_random_ones(tmp_path):
    random = [("m", 0.125, "random", kl) for kl in (3e-4, 1e-4, 5e-4)]
    others = [("m", 0.125, "chosen", 1e-9), ("m", 0.0625, "random", 1e-9), ("n", 0.125, "random", 1e-9)]  # none of these counts
    names = ("model", "budget", "plan", "measured_kl")
    write(tmp_path / "plans-m.csv", [dict(zip(names, row, strict=True)) for row in (*random, *others)])
    about = {"device": "cpu", "dtype": "float32", "torch": "1", "transformers": "2", "random_plans": "plans-m.csv"}
    row = {"model": "m", "budget": 0.125, "documents": 9, "kl": 4e-4, "kl_low": 2e-4, "kl_high": 6e-4, "most_of_one": 0.667} | about
    write(tmp_path / "t.csv", [row])
    said = printer.chosen_table(tmp_path / "t.csv")
    assert said[0] == "cpu, float32, torch 1, transformers 2"
    assert said[-1] == "| m | 1/8 | 9 | 3 of 4 | 4.0e-04 [2.0e-04, 6.0e-04] | 1.0e-04 | 0.67 |"
    write(tmp_path / "t.csv", [row | {"budget": 0.5}])
    with pytest.raises(RotateKError, match=r"plans-m\.csv has no random plan of m at 0\.5"):
        printer.chosen_table(tmp_path / "t.csv")
    write(tmp_path / "t.csv", [{"model": "m"}])
    with pytest.raises(RotateKError, match="cannot be read"):
        printer.chosen_table(tmp_path / "t.csv")


def test_nearly_blank_pages():
    data = sparse_pages.source("evaluation", 3)
    first, again, other = data.sample(0), data.sample(0), data.sample(1)
    assert first.images[0].tobytes() == again.images[0].tobytes() != other.images[0].tobytes() and first.id == "sparse/evaluation/3/0"
    for sample in (data.sample(n) for n in range(20)):
        [page] = sample.images
        grey = np.asarray(page.convert("L")).astype(int)
        paper = np.median(grey)
        rows = (np.abs(grey - paper) > 60).any(1)
        assert 0 < rows.mean() < 0.15 and len(sample.answers[0]) >= 3  # two lines of twenty, and blank paper


def test_another_table_is_refused(tmp_path):
    row = result("dense", "", 0)
    del row["part"]
    write(tmp_path / "c.csv", [row])
    assert read_results(tmp_path / "c.csv")
    with pytest.raises(RotateKError, match="bench_codec"):
        printer.merged([tmp_path / "c.csv"])


def test_budgets_of_plans_that_were_measured_one_by_one_are_put_together(tmp_path):
    plans = script("bench_plans")

    def file(name, budget, **changes):
        folder = tmp_path / name
        about = {"device": "cpu", "skipped": 504} | changes
        plans.save(
            folder,
            about | {"models": {"m": {"seconds": {"planning": 2.04}, f"{budget:g}": {"plans": 40}}}},
            [{"model": "m", "budget": budget}],
        )
        return folder / "plans.json"

    some = [file("a", 0.03125), file("b", 0.125)]
    whole, table = plans.merged(some)
    assert whole == {
        "device": "cpu",
        "skipped": 504,
        "models": {"m": {"seconds": {"planning": 4.0}, "0.125": {"plans": 40}, "0.03125": {"plans": 40}}},
    }
    assert [row["budget"] for row in table] == ["0.125", "0.03125"]
    assert plans.merged([some[0], file("e", 0.5, device="gpu")])[0]["device"] == "cpu, gpu"
    with pytest.raises(RotateKError, match=r"0\.125 again"):
        plans.merged([*some, file("c", 0.125)])
    with pytest.raises(RotateKError, match="skipped is 0, not 504"):
        plans.merged([*some, file("d", 0.25, skipped=0)])
