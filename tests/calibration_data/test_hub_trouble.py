"""What can be wrong with data on the Hub: each ends in one sentence that names the place and says what to do."""

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image

from rotatek_compile.calibration_data import hub_data
from rotatek_compile.calibration_data.errors import DataError, EndOfData
from rotatek_compile.calibration_data.readers import DOCVQA
from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.calibration_data.streamed import PATIENCE, StreamedSamples

PAGE = {"questionId": "s", "question": "s", "answers": ["s"], "image": "image"}
GOOD = {"questionId": "1", "question": "What?", "answers": ["a"]}
DOC = "lmms-lab-encoder/DocVQA"


def failure(name, split="evaluation", **options):
    """The sentence in which opening and reading a data set ends."""
    with pytest.raises(DataError) as error:
        list(open_data(name, split, **options).samples(20))
    assert "\n" not in str(error.value)
    return str(error.value)


def docvqa(rows, columns=PAGE, split="validation"):
    return {"DocVQA": {split: (columns, rows)}}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, GOOD | {"image": None}], "has no image in column image; this copy of the data set is damaged"),
        ([GOOD | {"image": {"bytes": b"no picture", "path": "x.png"}}], "row 0: its image does not open as an image"),
        ([GOOD | {"question": None}], "row 0 does not hold what it should"),
    ],
)
def test_rows(hub_cache, rows, words):
    hub_cache(DOC, docvqa(rows))
    said = failure("docvqa")
    assert words in said and f"{DOC}:DocVQA/validation row " in said


def test_picture_that_is_cut_short(hub_cache, make_png):
    hub_cache(DOC, docvqa([GOOD | {"image": {"bytes": make_png()[:90], "path": None}}]))
    assert f"{DOC}:DocVQA/validation/1: its image does not open as an image" in failure("docvqa")


def test_rows_without_an_answer_are_left_out(hub_cache):
    hub_cache(
        DOC, docvqa([GOOD | {"answers": answers, "questionId": str(n)} for n, answers in enumerate([None, [], ["", " "], ["x", ""]])])
    )
    [sample] = open_data("docvqa", "evaluation").samples(20)
    assert sample.id.endswith("/3") and sample.answers == ("x",)


def test_split_without_public_answers_is_given_up(hub_cache, make_png):
    rows = [GOOD | {"answers": None, "image": make_png(size=(2, 2))}] * PATIENCE
    hub_cache(DOC, docvqa(rows))
    assert f"none of the first {PATIENCE} rows has an image and an answer" in failure("docvqa")


def test_missing_columns(hub_cache):
    hub_cache(DOC, docvqa([{"questionId": "1", "question": "What?"}], {"questionId": "s", "question": "s"}))
    assert "has no column answers, image; it has question, questionId" in failure("docvqa")
    hub_cache("someone/texts", {None: {"test": ({"text": "s"}, [{"text": "x"}])}})
    assert "someone/texts/test has no column question, answers, images; it has text" in failure("someone/texts")


def test_missing_splits_and_configurations(hub_cache):
    hub_cache(DOC, docvqa([GOOD], split="test"))
    said = failure("docvqa")
    assert f"{DOC}:DocVQA has no split validation, only test; evaluation must not read what is calibrated on" in said
    hub_cache("someone/two", {name: {"train": (PAGE, [GOOD])} for name in ("a", "b")})
    assert "someone/two has several configurations; use one of someone/two:a, someone/two:b" in failure("someone/two", "calibration")
    assert "someone/two has no configuration 'c'; use one of someone/two:a, someone/two:b" in failure("someone/two:c", "calibration")
    assert "someone/two:a has no split validation or val or testmini or test, only train" in failure("someone/two:a")
    [sample] = open_data("someone/two:a", "calibration").samples(9)
    assert (sample.question, sample.metric) == ("What?", "exact_match")  # asked as it stands


def test_hub_id_of_a_known_set_has_its_prompt_and_metric(hub_cache):
    for repository in (DOC, "HuggingFaceM4/ChartQA", "lmms-lab/textvqa"):
        hub_cache(repository)
    source = open_data(f"{DOC}:InfographicVQA", "evaluation")
    [sample] = source.samples(9)
    assert (source.metric, sample.question) == ("anls", "Which share?\nAnswer the question using a single word or phrase.")
    assert open_data("HuggingFaceM4/ChartQA", "evaluation").split == "val"
    assert open_data("lmms-lab/textvqa", "evaluation").split == "validation"
    assert open_data("lmms-lab/textvqa", "calibration").split == "train"
    assert f"{DOC} has several configurations; use one of {DOC}:DocVQA, {DOC}:InfographicVQA" in failure(DOC)
    said = failure(f"{DOC}:DocVQA", "calibration")
    assert f"{DOC}:DocVQA has no split train, only validation, test" in said and said.endswith("use docvqa, which reads the right one")


def test_nothing_but_text_for_a_text_only_model(hub_cache):
    hub_cache("someone/texts", {None: {"train": ({"question": "s", "answer": "s"}, [{"question": "Why?", "answer": "so"}])}})
    [sample] = open_data("someone/texts", "calibration", images=False).samples(9)
    assert (sample.question, sample.answers, sample.images) == ("Why?", ("so",), ())


@pytest.mark.parametrize("name", ["forms", "charts:chart", "rows.jsonl"])
def test_revision_of_what_has_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    assert f"a revision (v1) is for data on the Hub, but {name} is " in failure(name, revision="v1")


ANSWER = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("gated", response=ANSWER), "access to echo840/OCRBench is gated; ask for it at its page"),
        (
            RepositoryNotFoundError("none", response=ANSWER),
            "there is no data set echo840/OCRBench on the Hub (or it is private), and no such path here",
        ),
        (RevisionNotFoundError("none", response=ANSWER), "echo840/OCRBench has no revision 'v1'; pass a branch, tag or commit"),
        (ConnectionError("Name or service not known"), "no answer from the Hub (Name or service not known), and echo840/OCRBench"),
        (TimeoutError(""), "no answer from the Hub (TimeoutError), and echo840/OCRBench"),
    ],
)
def test_answers_of_the_hub(hub_cache, monkeypatch, error, words):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    assert words in failure("ocrbench", revision="v1")


def test_second_name_is_asked_for_when_the_first_is_unknown(monkeypatch):
    asked = []

    def info(self, name, **options):
        asked.append((name, options["revision"]))
        if name == "new/set":
            raise RepositoryNotFoundError("none", response=ANSWER)
        return type("Info", (), {"sha": "c" * 40})()

    monkeypatch.setattr(HfApi, "dataset_info", info)
    found = hub_data.find_repository(("new/set", "old/set"), "v1")
    assert asked == [("new/set", "v1"), ("old/set", "v1")]
    assert (found.id, found.commit, found.location, found.cached) == ("old/set", "c" * 40, "old/set", False)


def test_folder_that_hides_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo840" / "OCRBench").mkdir(parents=True)
    assert "the folder echo840/OCRBench here hides the Hub data set of that name" in failure("ocrbench")


def test_picture_in_a_file_of_its_own(tmp_path, make_png):
    (tmp_path / "x.png").write_bytes(make_png(3))

    def rows():
        for name in ("x.png", "gone.png"):
            yield {"questionId": name, "question": "What?", "answers": ["a"], "image": {"bytes": None, "path": str(tmp_path / name)}}

    samples = StreamedSamples(stream(rows), DOCVQA, "s", "anls", 0, 1, sparse=True)
    assert samples.sample(0).images[0].size == (48, 32)
    with pytest.raises(DataError, match=r"s row 1: image .*gone.png could not be read"):
        samples.sample(1)


def stream(rows):
    """A stream as `datasets` gives it, of rows made by a generator."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(rows)


def test_connection_that_breaks_in_the_middle(make_png):
    def rows():
        for number in range(3):
            yield {"questionId": str(number), "question": "What?", "answers": ["a"], "image": {"bytes": make_png(number), "path": None}}
        raise ConnectionResetError("connection reset by peer")

    samples = StreamedSamples(stream(rows), DOCVQA, "org/set/train", "anls", 0, 1, sparse=True)
    assert samples.sample(0).id == "org/set/train/0"
    with pytest.raises(DataError, match=r"reading org/set/train stopped after \d rows \(connection reset by peer\); check the connection"):
        samples.sample(3)


def test_nothing_is_read_before_it_is_asked_for_and_nothing_twice(make_png):
    given = []

    def rows():
        for number in range(100):
            given.append(number)
            yield {
                "questionId": str(number),
                "question": f"{number}?",
                "answers": ["a"],
                "image": {"bytes": make_png(number), "path": None},
            }

    samples = StreamedSamples(stream(rows), DOCVQA, "s", "anls", 0, 4, sparse=True)
    before = len(given)
    first = [samples.sample(number) for number in (5, 0, 5, 3)]
    assert len(given) - before <= 6 + 4 + 1  # as far as asked for, and the buffer
    assert first[0] == first[2] and len({sample.id for sample in first}) == 3
    for sample in first:
        expected = Image.linear_gradient("L").rotate(37 * int(sample.id.split("/")[1])).resize((48, 32)).convert("RGB")
        assert sample.images[0].tobytes() == expected.tobytes() and sample.question.startswith(f"{sample.id.split('/')[1]}?")
    with pytest.raises(EndOfData):
        samples.sample(100)


def test_page_with_several_questions_is_kept_once(make_png):
    def rows():
        for number in range(6):
            picture = {"bytes": make_png(number % 2), "path": None}
            yield {"questionId": str(number), "question": f"{number}?", "answers": ["a"], "image": picture}

    samples = StreamedSamples(stream(rows), DOCVQA, "s", "anls", 0, 1, sparse=True)
    pixels = {sample.id[2:]: sample.images[0].tobytes() for sample in map(samples.sample, range(6))}
    assert samples.end == len(make_png(0)) + len(make_png(1))
    assert pixels["0"] == pixels["2"] == pixels["4"] != pixels["1"] == pixels["3"] == pixels["5"]


def test_order_follows_the_seed(hub_cache):
    hub_cache(DOC)
    orders = [[sample.id for sample in open_data("docvqa", "evaluation", seed=seed).samples(50)] for seed in (0, 0, 1, 2, 3)]
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) >= 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(orders[0]))}
