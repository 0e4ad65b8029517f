"""Local data sets: every file format and column variant gives the same samples; damage is reported with its row."""

import csv
import json

import pytest
from PIL import Image

from rotatek_compile.calibration_data.errors import DataError
from rotatek_compile.calibration_data.local import open_image, open_local

ROW = {"question": "What?", "answers": ["a", "b"], "images": ["page0.png", "page1.png"]}


def read(path, count=10):
    data = open_local(path)
    return [data.sample(number) for number in range(min(count, len(data.rows)))]


def pixels(images):
    return [(image.mode, image.size, image.tobytes()) for image in images]


@pytest.fixture
def expected(write_data, tmp_path):
    write_data(ROW)
    return pixels(open_image(tmp_path / name, "page") for name in ROW["images"])


def test_json_lines(write_data, expected):
    [sample] = read(write_data(ROW))
    assert (sample.question, sample.answers) == ("What?", ("a", "b"))
    assert pixels(sample.images) == expected and expected[0][:2] == ("RGB", (96, 80))


@pytest.mark.parametrize(
    ("row", "answers", "images"),
    [
        ({"question": "?", "answer": "a", "image": "page0.png"}, ("a",), 1),
        ({"question": "?", "answer": 12, "image": "page0.png"}, ("12",), 1),
        ({"question": "?", "answers": [1, 2], "images": ["page0.png"]}, ("1", "2"), 1),
        ({"question": "?", "answers": None, "answer": "b", "images": None, "image": "page1.png"}, ("b",), 1),
        ({"question": "?", "answers": [], "images": []}, (), 0),
        ({"question": "Größe?", "answers": ["≥ 3"], "images": ["page0.png", "page1.png", "page2.png"]}, ("≥ 3",), 3),
    ],
)
def test_columns(write_data, row, answers, images):
    [sample] = read(write_data(row))
    assert (sample.question, sample.answers, len(sample.images)) == (row["question"], answers, images)


def test_csv(tmp_path, write_data, expected):
    write_data(ROW)
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["question", "answer", "image"], ["What, then?", "a", "page0.png"]])
    [sample] = read(tmp_path / "rows.csv")
    assert (sample.question, sample.answers, pixels(sample.images)) == ("What, then?", ("a",), expected[:1])


ODD_TEXTS = ["0012", "12", "1.50", "2026-01-02", "NA", "None", "true", "1,234"]


def test_csv_answers_stay_as_they_are_written(tmp_path, write_data):
    """A column of numbers with a gap would become fractions, `NA` nothing at all."""
    write_data(ROW)
    rows = [["What?", text, "page0.png"] for text in ODD_TEXTS] + [["What?", "", "page0.png"], ["2026", "7", ""]]
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["question", "answer", "image"], *rows])
    samples = read(tmp_path / "rows.csv")
    assert [sample.answers for sample in samples] == [*((text,) for text in ODD_TEXTS), (), ("7",)]
    assert samples[-1].question == "2026" and samples[-1].images == ()
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["question", "answer", "image"], ["What?", "12", "page0.png"], ["What?", "", "page0.png"]])
    assert [sample.answers for sample in read(tmp_path / "rows.csv")] == [("12",), ()]


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ('["none", "b"]', ("none", "b")),
        ("[]", ()),
        ('["none", "b"', ('["none", "b"',)),
        ("[0.1, 0.2]", ("[0.1, 0.2]",)),
        ("[x]", ("[x]",)),
        ('{"a": 1}', ('{"a": 1}',)),
    ],
)
def test_csv_cells_that_hold_lists(tmp_path, write_data, expected, cell, answers):
    """Lists of texts only: a box is a text that begins with a bracket too. A single `answer` stays what is written."""
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["question", "answers", "images"], ["What?", cell, json.dumps(ROW["images"])]])
    [sample] = read(tmp_path / "rows.csv")
    assert (sample.answers, pixels(sample.images)) == (answers, expected)
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["question", "answer", "images"], ["What?", cell, "page0.png"]])
    [sample] = read(tmp_path / "rows.csv")
    assert (sample.answers, pixels(sample.images)) == ((cell,), expected[:1])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("column", ["answer", "answers"])
def test_dates_in_json_stay_text(write_data, name, column):
    """Where all answers look like dates, a reader of tables makes them times, and `00:00:00` of what was not written."""
    answers = ["2026-01-02", "2026-11-21T08:00:00"]
    file = write_data(*(ROW | {"answers": None, column: [a] if column == "answers" else a} for a in answers), name=name)
    assert [sample.answers for sample in read(file)] == [(a,) for a in answers]


def test_answers_of_several_types_in_json(write_data):
    file = write_data(*(ROW | {"answers": None, "answer": a} for a in (1.5, 12, "12 kg", "", None)))
    assert [sample.answers for sample in read(file)] == [("1.5",), ("12",), ("12 kg",), (), ()]
    with pytest.raises(DataError, match="row 0: an answer is a dict, expected text; write it as text"):
        read(write_data(ROW | {"answers": {"text": ["a"]}}))


def test_json_over_several_lines(tmp_path, write_data):
    write_data(ROW)
    (tmp_path / "rows.json").write_text(json.dumps([ROW, ROW | {"question": "line\u2028end"}], indent=1, ensure_ascii=False))
    assert [sample.question for sample in read(tmp_path / "rows.json")] == ["What?", "line\u2028end"]
    for content, words in (("0\n", "a row is 0, expected an object"), ('{"question": "\\ud800"}', "surrogates not allowed")):
        (tmp_path / "rows.json").write_text(content)
        with pytest.raises(DataError, match=f"could not be read as json .*{words}"):
            open_local(tmp_path / "rows.json")


def test_parquet_times_are_refused(tmp_path, write_data):
    import datetime

    import datasets

    write_data(ROW)
    datasets.Dataset.from_list([ROW | {"answers": [datetime.datetime(2026, 1, 2)]}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet row 0: an answer is a datetime, expected text; write it as text"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize("embedded", [False, True])
def test_parquet(tmp_path, write_data, expected, embedded):
    import datasets

    file = write_data(ROW)
    pages = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in ROW["images"]]
    rows = [ROW | {"images": pages}] if embedded else [json.loads(file.read_text())]
    table = datasets.Dataset.from_list(rows)
    if embedded:
        table = table.cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(tmp_path / "rows.parquet")
    if embedded:
        for name in ROW["images"]:
            (tmp_path / name).unlink()
    [sample] = read(tmp_path / "rows.parquet")
    assert (sample.answers, pixels(sample.images)) == (("a", "b"), expected)


@pytest.mark.parametrize("column", ["image", "images"])
def test_broken_embedded_image_is_reported_with_its_row(tmp_path, column):
    import datasets

    picture = {"bytes": b"no picture", "path": "scan.png"}
    row = {"question": "?", "answers": ["a"], column: [picture] if column == "images" else picture}
    feature = datasets.List(datasets.Image()) if column == "images" else datasets.Image()
    datasets.Dataset.from_list([row]).cast_column(column, feature).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet row 0: image bytes does not open as an image"):
        read(tmp_path / "rows.parquet")


def test_folder_is_read_in_order_of_names(write_data, tmp_path):
    write_data(ROW | {"question": "second"}, name="b.jsonl")
    write_data(ROW | {"question": "first"}, name="a.jsonl")
    assert [sample.question for sample in read(tmp_path)] == ["first", "second"]
    assert [sample.question for sample in read(tmp_path, 1)] == ["first"]


@pytest.mark.parametrize("name", ["rows [1].jsonl", "rows *.jsonl", "größe?.jsonl", "a b.jsonl"])
def test_odd_file_names(write_data, name):
    assert [sample.question for sample in read(write_data(ROW, name=name))] == ["What?"]


def test_id_and_digest_follow_the_content(write_data, tmp_path):
    file = write_data(ROW, ROW)
    first, second = (sample.id for sample in read(file))
    digest = open_local(file).digest
    assert first.startswith("rows.jsonl/0-") and second.startswith("rows.jsonl/1-") and first.split("-")[1] == second.split("-")[1]
    assert [sample.id for sample in read(file)] == [first, second] and open_local(file).digest == digest
    Image.new("RGB", (96, 80)).save(tmp_path / "page0.png")
    assert read(file)[0].id != first and open_local(file).digest == digest
    file.write_text(file.read_text() + "\n" + json.dumps(ROW) + "\n")
    assert open_local(file).digest != digest


def test_mixed_and_empty_folders(write_data, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file; expected one of .csv, .json, .jsonl, .parquet"):
        open_local(tmp_path / "empty")
    write_data(ROW)
    (tmp_path / "rows.csv").write_text("question\n")
    with pytest.raises(DataError, match=r"mixes .csv, .jsonl files; keep one kind"):
        open_local(tmp_path)
    with pytest.raises(DataError, match="holds no data file"):
        open_local(tmp_path / "page0.png")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.csv", b"question,answer,image\n", "holds no rows"),
        ("rows.csv", b"", "could not be read as csv"),
        ("rows.parquet", b"PAR1 but not really", "could not be read as parquet"),
        ("rows.parquet", b"", "could not be read as parquet"),
        ("rows.json", b"{", "could not be read as json"),
    ],
)
def test_damaged_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        open_local(tmp_path / name)
    assert words in str(error.value) and str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "LA", "I;16", "I;16B"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    Image.new(mode, (8, 6)).save(tmp_path / "picture.tif")
    image = open_image(tmp_path / "picture.tif", "picture")
    assert (image.mode, image.size) == ("RGB", (8, 6))
