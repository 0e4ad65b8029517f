"""A rerun beside committed results: what agrees, what is outside, what cannot be compared."""

import csv

import check_results
import pytest
from check_results import Tolerance, compare, outside

from rotatek_compile.errors import RotateKError


def row(exact=(0.9, 0.8, 1.0), kl=(0.1, 0.05, 0.2), samples=100, span=3000.0, **about):
    names = {"ask": "after", "method": "int4", "setting": "", "skill": "all", "model": "m", "data": "d", "axis": "kv"} | about
    scores = {
        f"{name}{end}": str(x)
        for name, values in (("exact_match", exact), ("kl", kl))
        for end, x in zip(("", "_low", "_high"), values, strict=True)
    }
    return names | scores | {"samples": str(samples), "span_bytes": str(span), "kv_bytes": "5000"}


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (row(), None),
        (row(exact=(0.79, 0.5, 0.8)), None),  # a document below the interval
        (row(exact=(0.78, 0.5, 0.9)), "exact match 0.78, committed 0.9 [0.8, 1]"),
        (row(kl=(0.2000001, 0.1, 0.3)), None),
        (row(kl=(0.21, 0.1, 0.3)), "KL per token 0.21, committed 0.1 [0.05, 0.2]"),
        (row(kl=(0.03, 0.02, 0.06)), "KL per token 0.03, committed 0.1 [0.05, 0.2]"),
        (row(kl=(0.03, 0.02, 0.06), samples=20), None),  # fewer documents: the intervals meet
        (row(kl=(0.03, 0.02, 0.04), samples=20), "KL per token [0.02, 0.04], committed 0.1 [0.05, 0.2]"),
        (row(kl=("nan", "nan", "nan")), "KL per token nan, committed 0.1 [0.05, 0.2]"),
        (row(span="nan"), "span bytes nan, committed 3000"),
        (row(span=3007.0), "span bytes 3007, committed 3000"),
        (row(span=3005.0), None),
        (row(span=4000.0, samples=20), None),
    ],
)
def test_outside(new, said):
    assert outside(row(), new, Tolerance()) == ([said] if said else [])


def test_small_kls_agree():
    old, new = row(kl=(1e-7, 1e-8, 2e-7)), row(kl=(9e-6, 1e-6, 1e-5))
    assert outside(old, new, Tolerance()) == []
    assert len(outside(old, new, Tolerance(negligible=1e-6))) == 1


def test_a_degenerate_interval_leaves_room_for_one_document():
    old = row(exact=(1.0, 1.0, 1.0))
    assert outside(old, row(exact=(0.99, 0.97, 1.0)), Tolerance()) == []
    assert outside(old, row(exact=(0.98, 0.95, 1.0)), Tolerance()) != []


def test_rows_are_matched_by_what_they_are():
    old = [row(), row(setting="x"), row(axis="keys"), row(skill="chart"), row(ask="with")]
    del old[0]["axis"]  # of an older table
    new = [row(), row(axis="keys", kl=(1, 1, 1)), row(skill="chart", kl=(1, 1, 1)), row(method="int8")]
    found, missing, count = compare(old, new, Tolerance())
    assert count == 2 and [one.split(":")[1] for one in found] == [" int4, keys"]
    assert missing == [
        "after: int4 (x): only in the committed table", "with: int4: only in the committed table", "after: int8: only in the rerun",
    ]  # fmt: skip
    assert compare(old, new, Tolerance(), skills=True)[0][1].startswith("after: int4, chart: KL")
    with pytest.raises(RotateKError, match="different things: model m and n"):
        compare(old, [row(model="n")], Tolerance())
    with pytest.raises(RotateKError, match="8 documents are too few to compare with 100"):
        compare(old, [row(samples=8)], Tolerance())


def trained(asked, setting, span=3000.0, name="leank-learned", **about):
    """Of a rival that learns, asked for a share of 8,000 bytes."""
    asked = {"requested_budget": str(asked), "kv_budget": str(asked), "span_bytes_dense": "8000"}
    return row(method=name, setting=setting, span=span, **asked, **about) | {"kv_bytes": str(span + 500)}


def test_rows_of_a_trained_rival_are_known_by_what_was_asked_for():
    old = [trained(0.5, "640 channels"), trained(0.25, "224 channels", span=1900.0)]
    new = [trained(0.5, "672 channels", span=3900.0), trained(0.25, "192 channels", span=1500.0)]
    assert compare(old, new, Tolerance()) == ([], [], 2)
    assert check_results.kept_otherwise(old, new, Tolerance()) == [
        "after: leank-learned (requested_budget 0.5): keeps 672 channels, committed 640 channels",
        "after: leank-learned (requested_budget 0.25): keeps 192 channels, committed 224 channels",
    ]
    assert check_results.kept_otherwise(old, old, Tolerance()) == []
    found, _, _ = compare(old, [new[0], trained(0.25, "192 channels", span=1500.0, kl=(1, 1, 1))], Tolerance())
    assert found == ["after: leank-learned (requested_budget 0.25): KL per token 1, committed 0.1 [0.05, 0.2]"]
    named = [row(setting=words, requested_budget="0.5") for words in ("x", "y")]  # not trained: known by the setting
    assert compare(named[:1], named[1:], Tolerance())[2] == 0


@pytest.mark.parametrize(
    ("span", "rest", "said"),
    [
        (4008.0, 500.0, []),  # within the half that was asked for
        (4020.0, 500.0, ["span bytes 4020, committed 3000"]),
        (float("nan"), 500.0, ["span bytes nan, committed 3000", "kv without span bytes nan, committed 500"]),
        (10.0, 500.0, []),
        (0.0, 500.0, ["span bytes 0, committed 3000"]),
        (3000.0, 600.0, ["kv without span bytes 600, committed 500"]),  # a window that it had not
    ],
)
def test_bytes_of_a_trained_rival_stay_within_its_budget(span, rest, said):
    new = trained(0.5, "672 channels", span=span) | {"kv_bytes": str(span + rest)}
    assert outside(trained(0.5, "640 channels"), new, Tolerance()) == said


def test_a_trained_rival_may_take_what_it_took_above_its_budget():
    committed = trained(0.25, "640 channels")  # short images cost more
    assert outside(committed, trained(0.25, "x", span=3000.0), Tolerance()) == []
    assert outside(committed, trained(0.25, "x", span=3010.0), Tolerance()) == ["span bytes 3010, committed 3000"]


def test_the_next_larger_budget_stands_for_one_of_equal_setting():
    old = [trained(0.5, "640", span=1900.0), trained(0.25, "224", span=1500.0), trained(0.125, "64", span=900.0)]
    new = [trained(0.5, "640", span=1900.0), trained(0.125, "64", span=900.0)]  # at 0.25 it kept 640, too
    for first, second in ((old, new), (new, old)):
        assert compare(first, second, Tolerance()) == ([], [], 3)
    assert check_results.kept_otherwise(old, new, Tolerance()) == ["after: leank-learned (requested_budget 0.25): keeps 640, committed 224"]
    assert compare(old, new[1:], Tolerance())[1] == [  # nothing larger is left
        f"after: leank-learned (requested_budget {asked}): only in the committed table" for asked in (0.5, 0.25)
    ]
    alone = "after: leank-learned (requested_budget 0.25): only in the committed table"
    other = [trained(0.5, "640", span=1900.0, axis="keys"), new[1]]  # another axis stands for nothing
    assert alone in compare(old, other, Tolerance())[1]
    wide = [trained(0.5, "700", span=2100.0), new[1]]  # of 8,000, too much for a quarter: the row is lost, not equal
    assert compare([trained(0.5, "700", span=2100.0), *old[1:]], wide, Tolerance()) == ([], [alone], 2)
    palu = [trained(asked, "x", span=1900.0, name="palu") for asked in (0.5, 0.25)]
    assert compare(palu, palu[:1], Tolerance()) == ([], [], 2)
    plain = [row(setting=words, requested_budget=asked, kv_budget=asked) for words, asked in (("x", "0.5"), ("y", "0.25"))]
    assert compare(plain, plain[:1], Tolerance())[1] == ["after: int4 (y): only in the committed table"]


def test_the_smallest_of_the_larger_budgets_stands():
    old = [trained(0.5, "a", span=1000.0), trained(0.25, "b", span=800.0), trained(0.125, "c", span=600.0)]
    found, missing, count = compare(old, [old[0] | {"kl": "9", "kl_low": "9", "kl_high": "9"}, old[1]], Tolerance())
    assert count == 3 and not missing and [one.split(":")[1] for one in found] == [" leank-learned (requested_budget 0.5)"]


def test_rows_of_keys_are_known_by_both_budgets():
    old = [trained(0.5, "x", key_budget="0.25"), trained(0.5, "y", key_budget="0.125")]
    assert compare(old, old, Tolerance()) == ([], [], 2)


def test_tables_without_budgets_are_matched_by_setting():
    new = [trained(0.5, "640"), trained(0.25, "224")]
    old = [{name: x for name, x in one.items() if name != "requested_budget"} for one in new]
    assert compare(old, new, Tolerance())[1:] == ([], 2)
    assert compare(old, new[:1], Tolerance())[1] == ["after: leank-learned (224): only in the committed table"]


def test_tables_that_cannot_be_matched():
    with pytest.raises(RotateKError, match="two rows after: leank-learned .requested_budget 0.5."):
        compare([trained(0.5, "x"), trained(0.5, "y")], [trained(0.5, "y")], Tolerance())
    with pytest.raises(RotateKError, match="leank-learned has requested_budget 'abc', which is no number"):
        compare([trained("abc", "x")], [trained(0.5, "y")], Tolerance())


def write(file, rows):
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def test_exit_status(tmp_path, monkeypatch, capsys):
    old = write(tmp_path / "old.csv", [row(), row(setting="x")])
    worse = write(tmp_path / "worse.csv", [row(), row(setting="x", kl=(1, 1, 1))])
    fewer = write(tmp_path / "fewer.csv", [row()])
    other = write(tmp_path / "other.csv", [row(data="e")])
    learned, again = (write(tmp_path / f"{words}.csv", [trained(0.5, words)]) for words in ("640", "672"))
    damaged = write(tmp_path / "damaged.csv", [row() | {"kl": "lots"}])
    for arguments, status, words in (
        ([fewer, damaged], 2, "error: could not convert string to float: 'lots'"),
        ([learned, again], 0, "(requested_budget 0.5): keeps 672, committed 640"),
        ([old, old], 0, "2 of 2 rows as committed, 0 in one table only"),
        ([old, worse], 1, "after: int4 (x): KL per token 1, committed 0.1 [0.05, 0.2]"),
        ([old, fewer], 1, "only in the committed table"),
        ([old, fewer, "--some"], 0, "1 of 1 rows as committed, 1 in one table only"),
        ([old, other], 2, "different things: data d and e"),
        ([old, str(tmp_path / "none.csv")], 2, "cannot be read"),
    ):
        monkeypatch.setattr("sys.argv", ["check_results", *arguments])
        assert check_results.main() == status
        said = capsys.readouterr()
        assert words in said.out + said.err
