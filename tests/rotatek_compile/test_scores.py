"""Scores on hand values."""

import pytest

from rotatek_compile.scores import METRICS, anls, box_iou, edits, exact_match, normalise, score
from rotatek_compile.vqa_words import CONTRACTIONS, vqa_normalise


def test_exact_match_normalises():
    assert normalise("  a \t b\n") == "a b"
    assert exact_match("Cafe\u0301  noir ", ["x", "Caf\u00e9 noir"])
    assert not exact_match("cafe noir", ["Cafe noir"])  # case counts
    assert not exact_match("ab", ["a b"])
    assert not exact_match("x", [])


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("Hello", ["hello"], 1.0),
        ("hella", ["hello"], 0.8),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abxy"], 0.5),
        ("abc", ["axy"], 0.0),
        ("hella", ["zzz", "hello"], 0.8),
        ("", ["a"], 0.0),
        ("a  b", ["a b"], 1.0),
        ("", [""], 1.0),
    ],
)
def test_anls_by_hand(text, answers, expected):
    assert anls(text, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("42", ["40"], 1.0),  # exactly 5 %
        ("42.1", ["40"], 0.0),
        ("38", ["40"], 1.0),
        ("-41", ["-40"], 1.0),
        ("40", ["-40"], 0.0),
        ("5%", ["0.05"], 1.0),
        ("0.05", ["5%"], 1.0),
        ("5", ["5%"], 0.0),
        ("5.2%", ["5%"], 1.0),
        ("0", ["0"], 1.0),
        ("0.0", ["0"], 0.0),  # no relative change of zero: text
        ("0.01", ["0"], 0.0),
        ("Yes", ["yes"], 1.0),
        ("1,000", ["1000"], 0.0),  # no number here, as in the reference
        ("2010", ["2100"], 1.0),  # years too
        ("about 40", ["40"], 0.0),
        (" 40 \n", ["40"], 1.0),
        ("nan", ["nan"], 1.0),
        ("inf", ["40"], 0.0),
        ("x", ["y", "X"], 1.0),
        ("", ["a"], 0.0),
    ],
)
def test_relaxed_accuracy_by_hand(text, answers, expected):
    assert score("relaxed_accuracy", text, answers, {}) == expected


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("stop", ["stop"] * 10, 1.0),
        ("stop", ["go"] * 10, 0.0),
        # three said so: each of them has two others, each other person has three
        ("stop", ["stop"] * 3 + ["go"] * 7, (3 * 2 / 3 + 7 * 1) / 10),
        ("stop", ["stop"] * 2 + ["go"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("stop", ["stop"] + ["go"] * 9, 9 * (1 / 3) / 10),
        ("stop", ["stop"] * 4 + ["go"] * 6, 1.0),
        ("The Stop!", ["stop"] * 10, 1.0),
        ("two", ["2"] * 10, 1.0),
        ("stop", ["stop"], 0.0),  # nobody else was asked
        ("stop", [], 0.0),
    ],
)
def test_vqa_accuracy_by_hand(text, answers, expected):
    assert score("vqa_accuracy", text, answers, {}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Two, CATS.", "2 cats"),
        ("a dog and an owl", "dog and owl"),
        ("it's 3.50", "it 's 3.50"),
        ("1,000", "1000"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("well-known (old)", "well known old"),
        ("x- y-z", "x yz"),  # one beside a blank drops them all
        ("e.g. 3. ", "eg 3"),
        ("\n\ttea\tand\nmilk", "tea and milk"),
        ("?!", ""),
    ],
)
def test_vqa_normalisation_by_hand(text, expected):
    assert vqa_normalise(text) == expected


def test_contractions():
    assert len(CONTRACTIONS) == 114 and CONTRACTIONS["y'allll"] == "y'all'll" and CONTRACTIONS["'ow'sat"] == "'ow's'at"


@pytest.mark.parametrize(
    ("text", "answers", "dataset", "expected"),
    [
        ("The word is Hello.", ["HELLO"], "IIIT5K", 1.0),
        ("Helo", ["Hello"], "IIIT5K", 0.0),
        ("two\nlines", ["two lines"], "SROIE", 1.0),
        ("\uff12\uff15\uff19\uff10", ["2590"], "SROIE", 1.0),  # full-width digits
        ("both\u3000sides", ["both sides"], "SROIE", 1.0),
        ("\u2460", ["1"], "SROIE", 0.0),  # other compatibility characters keep their meaning
        ("x+1", ["x + 1"], "HME100k", 1.0),
        ("X + 1", ["x + 1"], "HME100k", 0.0),
        ("\uff58+1", ["x+1"], "HME100k", 0.0),
        ("b", ["a", "b"], "IIIT5K", 1.0),
        ("b", [], "IIIT5K", 0.0),
    ],
)
def test_ocrbench_by_hand(text, answers, dataset, expected):
    assert score("ocrbench", text, answers, {"dataset": dataset}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("B", 1.0), (" B\n", 1.0), ("B. green", 1.0), ("A", 0.0), ("b", 0.0), ("(B)", 0.0), ("B green", 0.0), ("A. B", 0.0), ("", 0.0)],
)
def test_exact_choice_by_hand(text, expected):
    assert score("exact_choice", text, ["B"], {}) == expected


def mathvista(text, answers, question_type="free_form", answer_type="integer", precision=0, choices=()):
    details = {"question_type": question_type, "answer_type": answer_type, "precision": precision, "choices": list(choices)}
    return score("mathvista_quick", text, answers, details)


def test_mathvista_by_hand():
    colours = {"question_type": "multi_choice", "answer_type": "text", "choices": ["red", "green", "blue"]}
    for text, expected in [
        ("B", 1),
        ("green", 1),
        ("(B) green", 1),
        ("(b)", 1),
        ('The answer is "green".', 1),
        ("grean", 1),
        ("A", 0),
        ("bleu", 0),
    ]:
        assert mathvista(text, ["B", "green"], **colours) == expected, text
    for text, expected in [("12", 1), (" 12 ", 1), ("12.7", 1), ("13", 0), ("twelve", 0), ("It is 12", 0), ("", 0), ("inf", 0)]:
        assert mathvista(text, ["12"]) == expected, text
    for text, expected in [("1.5", 1), ("1.52", 1), ("1.56", 0), ("2", 0), ("x", 0)]:
        assert mathvista(text, ["1.5"], answer_type="float", precision=1) == expected, text
    assert mathvista("[1, 2]", ["[1, 2]"], answer_type="list") == 1 and mathvista("[1,2]", ["[1, 2]"], answer_type="list") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.0, 0.0, 0.5, 0.5]", 1.0),
        ("The box is [0, 0, 0.5, 1] I think, or [0,0,0.5,0.5].", 0.5),  # the first counts
        ("[0.25, 0.25, 0.75, 0.75]", 0.0625 / (0.25 + 0.25 - 0.0625)),
        ("[0.5, 0.5, 1, 1]", 0.0),
        ("[0.6,0.6,1,1]", 0.0),
        ("[0.5, 0.5, 0.0, 0.0]", 0.0),  # corners the wrong way round
        ("0.0, 0.0, 0.5, 0.5", 0.0),
        ("[0.0, 0.0, 0.5]", 0.0),
        ("[-0.5, 0, 0.5, 0.5]", 0.25 / 0.5),
        ("", 0.0),
    ],
)
def test_iou_by_hand(text, expected):
    assert score("iou", text, [], {"box": [0.0, 0.0, 0.5, 0.5]}) == pytest.approx(expected)


def test_iou_of_nothing_with_nothing():
    assert box_iou("[0, 0, 0, 0]", [0.0, 0.0, 0.0, 0.0]) == 0.0


@pytest.mark.parametrize(
    ("a", "b", "expected"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("x", "x", 0)]
)
def test_edits_by_hand(a, b, expected):
    assert edits(a, b) == expected


def test_plain_metrics_go_by_name():
    assert score("exact_match", " a  b", ["a b"], {}) == 1.0 and score("anls", "hella ", ["hello"], {}) == pytest.approx(0.8)
    assert set(METRICS) == {
        "exact_match", "anls", "relaxed_accuracy", "vqa_accuracy", "ocrbench", "exact_choice", "mathvista_quick", "iou",
    }  # fmt: skip
