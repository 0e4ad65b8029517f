"""The scripts that measure the codec: which rivals and variants they take, how pages are broken, and what their tables say."""

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
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


codec, broken, refresh, printer = (script(name) for name in ("bench_codec", "bench_broken_inputs", "bench_refresh", "print_codec"))


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


def outcomes(method, exact, kl=0.5, fallback=0):
    sizes = {"total": 1, "dense": 4, "stored": 1, "span": 1, "span_dense": 4, "window": 0, "basis": 0, "slack": 0, "tables": 0}
    made = [Outcome(str(n), "", method, e, 0.0, kl, 1, str(e), sizes | {"fallback_heads": fallback}) for n, e in enumerate(exact)]
    return Row(method, made)


@pytest.mark.parametrize(
    ("right", "fallback", "angles", "good"),
    [(50, 0, None, 1), (49, 0, None, 1), (47, 0, None, 0), (47, 1, None, 1), (47, 0, (40.0, 20.0), 1), (47, 0, (30.0, 20.0), 0)],
)
def test_a_lost_answer_must_be_said(right, fallback, angles, good):
    dense, ours = outcomes("dense", [True] * 50), outcomes("artifact", [n < right for n in range(50)], fallback=fallback)
    row = broken.row_of("x", dense, ours, angles)
    assert row["good"] == good and row["loss"] == pytest.approx(1 - right / 50) and row["span"] == 0.25
    assert row["same_answers"] == right / 50 and row["fallback_heads"] == 50 * fallback and row["kl"] == 0.5


def encoded(prompt, end, places=None):
    sample = Sample(id="1", images=(), question="q", answers=("a",))
    return refresh.Encoded(sample, prompt, [9], end, {}, places)


def test_pages_and_text_become_one_sequence():
    a, b = encoded([5, 5, 1, 2], 2), encoded([5, 5, 5, 3], 3)
    whole = refresh.joined([a, [7, 8], b])
    assert whole.prompt == [5, 5, 7, 8, 5, 5, 5] and whole.positions is None
    places = torch.tensor([[0, 0, 2, 3], [0, 1, 2, 3]])
    numbered = refresh.joined([replace(a, positions=places), [7, 8], replace(a, positions=places)])
    assert numbered.positions.tolist() == [[0, 0, 2, 3, 4, 4], [0, 1, 2, 3, 4, 5]]
    assert refresh.question(a) == [1, 2]


def test_divergence_and_texts():
    dense, got = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).double().log(), torch.tensor([[0.5, 0.5], [0.1, 0.9]]).double().log()
    assert refresh.divergence(dense, got).tolist() == pytest.approx([0, 0.8 * np.log(9)])
    given = refresh.texts([encoded([5, 1, 2], 1)], 5, 20, (5, 9), 0)
    assert given["questions of other documents"] == [1, 2, 1, 2, 1]
    assert len(given["random tokens"]) == 5 and not {5, 9} & set(given["random tokens"])


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
    kind = {"part": "curve", "budget": "0.0625", "group": "", "does_not_show": ""}
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
    changed = {"part": "ablations", "group": "precision", "does_not_show": "speed"}
    base = result("rotatek", "KV budget 0.0625", 0.1, part="ablations", group="as compiled")
    write(tmp_path / "b.csv", [base, result("rotatek", "KV budget 0.0625, 4-bit directions only", 0.4, **changed)])
    rows = printer.merged([tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "a.csv"])
    assert len(rows) == 4
    said = "\n".join(printer.tables(rows))
    assert "| 1/16 | planned from the artifact | 4 | 0.0625 | 0.500 [0.500, 0.500] |" in said and "0.4 [0.3, 0.6]" in said
    assert "- 1/16: loses 0.030 of dense exact match, NOT within 0.02" in said
    assert "- 1/16: at most half of the KL of head-drop (x)" in said
    assert "| precision | 4-bit directions only | 0.0625 | 0.500 [0.500, 0.500] | 4.0e-01 [4.0e-01, 4.0e-01] | 4 | 3 | speed |" in said


def test_another_table_is_refused(tmp_path):
    row = result("dense", "", 0)
    del row["part"]
    write(tmp_path / "c.csv", [row])
    assert read_results(tmp_path / "c.csv")
    with pytest.raises(RotateKError, match="bench_codec"):
        printer.merged([tmp_path / "c.csv"])
