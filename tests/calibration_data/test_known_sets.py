"""Every known benchmark, read from a miniature of its repository: splits, prompts, answers, and what is recorded."""

import pytest

from rotatek_compile.calibration_data import readers
from rotatek_compile.calibration_data.errors import DataError
from rotatek_compile.calibration_data.known_sets import KNOWN, owners
from rotatek_compile.calibration_data.registry import listing, open_data, table
from rotatek_compile.scores import METRICS, score

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def read(name, split, **options):
    source = open_data(name, split, **options)
    return source, {sample.id: sample for sample in source.samples(50)}


def questions(samples):
    return sorted((sample.question, sample.answers) for sample in samples.values())


# name, split asked for, repository, its split, commit is recorded, (question, answers) sorted
CASES = [
    ("docvqa", "calibration", "HuggingFaceM4/DocumentVQA", "train", [(f"Who is {n}?{SHORT}", (f"t{n}",)) for n in range(8)]),
    ("docvqa", "evaluation", "lmms-lab-encoder/DocVQA:DocVQA", "validation",
     [(f"What is {n}?{SHORT}", (f"v{n}", "other")) for n in range(6)]),
    ("infovqa", "calibration", "HuggingFaceM4/the_cauldron:infographic_vqa", "train",
     [("And?", ("more.",)), ("And?", ("more.",)), ("What is 0?\nBe brief.", ("c0.",)), ("What is 1?\nBe brief.", ("c1.",))]),
    ("infovqa", "evaluation", "lmms-lab-encoder/DocVQA:InfographicVQA", "validation", [(f"Which share?{SHORT}", ("12 %",))]),
    ("chartqa", "calibration", "HuggingFaceM4/ChartQA", "train", [("How many?\nAnswer the question with a single word.", ("3",))] * 2),
    ("chartqa", "evaluation", "lmms-lab-encoder/ChartQA", "test",
     [("How high?\nAnswer the question with a single word.", ("40",)), ("How low?\nAnswer the question with a single word.", ("0.5",))]),
    ("textvqa", "calibration", "lmms-lab/textvqa", "train", [(f"What does the sign say?{SHORT}", ("stop",) * 6 + ("halt",) * 3 + ("go",))]),
    ("textvqa", "evaluation", "lmms-lab/textvqa", "validation",
     [(f"What does the sign say?{SHORT}", ("stop",) * 6 + ("halt",) * 3 + ("go",))]),
    ("ocrbench", "evaluation", "echo840/OCRBench", "test", [("formula?", ("x + 1",)), ("what is written?", ("Hello",))]),
    ("scienceqa", "calibration", "derek-thomas/ScienceQA", "train", [(f"Which is {n}?\nA. yes\nB. no\n{LETTER}", ("B",)) for n in (0, 2)]),
    ("scienceqa", "evaluation", "lmms-lab-encoder/ScienceQA:ScienceQA-IMG", "test",
     [(f"Context: Look.\nWhich?\nA. a\nB. b\nC. c\n{LETTER}", ("C",))]),
    ("mathvista", "evaluation", "AI4Math/MathVista", "testmini",
     [(f"How much?\nA. red\nB. green\n{LETTER}", ("B", "green")),
      ("How much?\nAnswer the question using a Python list.", ("[1, 2]",)),
      ("How much?\nAnswer the question using a single integer number.", ("12",)),
      ("How much? (Unit: cm)\nAnswer the question using a single floating-point number with one decimal place.", ("1.5",))]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "split", "repository", "actual", "expected"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_read(hub_cache, hub_commit, name, split, repository, actual, expected):
    hub_cache(repository.partition(":")[0])
    source, samples = read(name, split)
    assert (source.name, source.repository, source.split, source.revision, source.size) == (name, repository, actual, hub_commit, None)
    assert questions(samples) == expected
    known = KNOWN[name]
    for key, sample in samples.items():
        assert key.startswith(f"{repository}/{actual}/")
        assert [(image.mode, image.size) for image in sample.images] == [("RGB", (48, 32))]
        assert sample.metric == source.metric == known.metric in METRICS
        if name != "infovqa":
            assert score(sample.metric, sample.answers[0], sample.answers, sample.details) > 0.5  # the reference is right
    assert source.max_new_tokens == known.max_new_tokens


def test_refcoco_asks_for_every_expression(hub_cache):
    hub_cache("lmms-lab-encoder/RefCOCO")
    source, samples = read("refcoco", "evaluation")
    assert source.split == "val" and sorted(samples) == [f"lmms-lab-encoder/RefCOCO/val/val-{n}" for n in (0, 1)]
    first = samples["lmms-lab-encoder/RefCOCO/val/val-0"]
    assert first.question.startswith("Bounding box coordinates") and first.question.endswith("this sentence describes: left dog")
    assert first.details["box"] == [0.25, 0.25, 0.75, 0.75] and first.answers == ("[0.25, 0.25, 0.75, 0.75]",)
    assert score("iou", first.answers[0], first.answers, first.details) == 1.0
    assert read("refcoco:testA", "evaluation")[0].split == "testA"


def test_skills_are_those_of_the_benchmark(hub_cache):
    for repository in ("lmms-lab-encoder/ChartQA", "HuggingFaceM4/ChartQA", "echo840/OCRBench"):
        hub_cache(repository)
    for split in ("calibration", "evaluation"):
        assert {sample.skill for sample in read("chartqa", split)[1].values()} == {"human", "augmented"}
    asked = [readers.CHARTQA_TRAIN.ask({"query": "?", "label": ["1"], "human_or_machine": kind}, ()) for kind in (0, 1)]
    assert [one.skill for [one] in asked] == ["human", "augmented"]
    halves = {"How high?": "human", "How low?": "augmented"}
    assert {s.question.partition("\n")[0]: s.skill for s in read("chartqa", "evaluation")[1].values()} == halves
    kinds = {sample.skill: sample.details for sample in read("ocrbench", "evaluation")[1].values()}
    assert kinds["Handwritten Mathematical Expression Recognition"] == {"dataset": "HME100k"} and len(kinds) == 2


def test_old_organisation_name_is_tried_after_the_new_one(hub_cache):
    hub_cache("lmms-lab-encoder/ChartQA", under="lmms-lab/ChartQA")
    assert read("chartqa", "evaluation")[0].repository == "lmms-lab/ChartQA"
    hub_cache("lmms-lab-encoder/ChartQA")
    assert read("chartqa", "evaluation")[0].repository == "lmms-lab-encoder/ChartQA"


def test_revision_is_honoured(hub_cache):
    other = "f" * 40
    rows = {None: {"train": ({"query": "s", "label": ["s"], "human_or_machine": ("human", "machine"), "image": "image"},
                             [{"query": "Old?", "label": ["1"], "human_or_machine": 0}])}}  # fmt: skip
    hub_cache("HuggingFaceM4/ChartQA", rows, commit=other)
    hub_cache("HuggingFaceM4/ChartQA")
    source, samples = read("chartqa", "calibration", revision=other)
    assert source.revision == other and [q.partition("\n")[0] for q, _ in questions(samples)] == ["Old?"]
    assert read("chartqa", "calibration")[0].revision != other
    with pytest.raises(DataError, match="HuggingFaceM4/ChartQA at revision v9 is not in the local cache"):
        open_data("chartqa", "calibration", revision="v9")


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        (
            "ocrbench",
            "calibration",
            "ocrbench has no train split (echo840/OCRBench has test), and calibration must not read what is evaluated",
        ),
        ("mathvista", "calibration", "calibrate on docvqa, infovqa, chartqa, textvqa, scienceqa or your own documents"),
        ("refcoco", "calibration", "has val, test, testA, testB"),
        ("docvqa:validation", "calibration", "calibration reads train splits only; write docvqa instead of docvqa:validation"),
        ("docvqa:test", "evaluation", "docvqa has no split 'test' for evaluation; use docvqa:validation"),
        ("refcoco:", "evaluation", "refcoco has no split '' for evaluation; use refcoco:val, refcoco:test"),
    ],
)
def test_splits_that_are_refused_before_anything_is_read(name, split, words):
    with pytest.raises(DataError) as error:
        open_data(name, split)
    assert words in str(error.value)


def test_table_and_listing():
    shown = listing()
    assert shown["docvqa"] == {
        "about": "scanned documents, one page", "calibration": "HuggingFaceM4/DocumentVQA train",
        "evaluation": "lmms-lab-encoder/DocVQA:DocVQA validation", "licence": "apache-2.0", "metric": "anls",
    }  # fmt: skip
    assert shown["mathvista"]["calibration"] == "none" and shown["forms"]["evaluation"] == "generated"
    heading, *lines = table().splitlines()
    assert heading.split() == ["name", "calibration", "evaluation", "licence", "metric", "about"]
    assert [line.split()[0] for line in lines] == list(shown) and {*KNOWN} < {*shown}


def test_ids_name_their_sets_whatever_their_case():
    assert [name for name, _, _ in owners("LMMS-lab/docvqa", None)] == ["docvqa", "infovqa"]
    assert [name for name, _, _ in owners("lmms-lab/DocVQA", "InfographicVQA")] == ["infovqa"]
    assert owners("lmms-lab/DocVQA", "nope") == [] and owners("someone/else", None) == []
