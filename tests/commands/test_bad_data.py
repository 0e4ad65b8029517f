"""Data sets and pictures that cannot be used: a sentence with file and row, nothing written."""

import io

import pytest
from PIL import Image

GOOD = {"question": "What?", "answers": ["a"], "image": "page0.png"}


def attempts(cli, model, artifact, data, target):
    """The same data to compile and to eval."""
    yield cli("compile", "--model", model, "--calib", data, "-o", target, "--device", "cpu", "--num-samples", 4)
    yield cli("eval", artifact, "--data", data, "--device", "cpu", "--num-samples", 4)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "What?", "image": "page0.png"}], "has no column question, answers (or answer); it has image, text"),
        ([{"question": "What?", "answers": ["a"]}], "has no column image (or images)"),
        ([GOOD, GOOD | {"question": None}], "row 1: the question is None, expected text"),
        ([GOOD | {"question": "  "}], "row 0: the question is '  ', expected text"),
        ([GOOD | {"image": None}], "no usable sample: each needs at least one image and one answer"),
        ([GOOD | {"answers": []}], "no usable sample"),
        ([GOOD, GOOD | {"image": "gone.png"}], "gone.png does not exist"),
        ([GOOD | {"image": 7}], "image is a int, expected a path or an image"),
        ([GOOD | {"question": "What is <image>?"}], "holds <image>, which stands for an image"),
    ],
)
def test_rows(cli, compiled, checkpoint, write_data, tmp_path, rows, words):
    file = write_data(*rows)
    for ended in attempts(cli, checkpoint, compiled, file, tmp_path / "out"):
        assert words in ended.sentence()
    assert not [entry for entry in tmp_path.iterdir() if "out" in entry.name]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "What?", "answers": ["a"', "could not be read as json"),
        ("", "could not be read as json"),
        ("[1, 2, 3]\n", "rows.jsonl"),
        ("\x00\x01\x02", "could not be read as json"),
    ],
)
def test_broken_json_lines(cli, compiled, checkpoint, tmp_path, untouched, content, words):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    for ended in attempts(cli, checkpoint, compiled, file, tmp_path / "out"):
        assert words in ended.sentence()
    untouched(tmp_path, "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("forms2", "unknown data set 'forms2'; use one of forms, tables, letters, charts, mixed, docvqa,"),
        ("forms2", "or a path to a .jsonl, .parquet or folder of them; did you mean forms?"),
        ("DocVQA", "; did you mean docvqa?"),
        ("forms:cell", "unknown skill in 'forms:cell'; forms has forms:field, forms:missing, forms:larger, forms:page"),
        ("charts:", "unknown skill in 'charts:'; charts has charts:chart"),
        ("", "unknown data set ''"),
    ],
)
def test_data_names(cli, compiled, checkpoint, tmp_path, name, words):
    for ended in attempts(cli, checkpoint, compiled, name, tmp_path / "out"):
        assert words in ended.sentence(2)


def test_data_path_that_does_not_exist(cli, compiled, checkpoint, tmp_path):
    for ended in attempts(cli, checkpoint, compiled, "./no.jsonl", tmp_path / "out"):
        assert "data path ./no.jsonl does not exist" in ended.sentence()


def png(size=(90, 70)):
    stream = io.BytesIO()
    Image.effect_noise(size, 50).save(stream, "PNG")
    return stream.getvalue()


DAMAGED = [b"", b"no picture", png()[:2000], png()[:60], b"GIF89a", b"II*\x00" + b"\xff" * 20, b"BM" + b"\x00" * 60]


@pytest.mark.parametrize("content", DAMAGED, ids=["empty", "text", "truncated", "header", "gif", "tiff", "bmp"])
def test_picture_that_does_not_open(cli, compiled, checkpoint, write_data, tmp_path, content):
    file = write_data(GOOD, GOOD | {"image": "bad.png"})
    (tmp_path / "bad.png").write_bytes(content)
    for ended in attempts(cli, checkpoint, compiled, file, tmp_path / "out"):
        said = ended.sentence()
        assert f"{file} row 1: image {tmp_path / 'bad.png'} does not open as an image" in said
    said = cli("run", compiled, "--image", tmp_path / "bad.png", "--prompt", "What?").sentence()
    assert f"--image {tmp_path / 'bad.png'} does not open as an image" in said
    assert not (tmp_path / "out").exists()


def test_missing_picture_and_folder_in_its_place(cli, compiled, tmp_path):
    said = cli("run", compiled, "--image", tmp_path / "gone.png", "--prompt", "What?").sentence()
    assert said == f"error: --image {tmp_path / 'gone.png'} does not exist; check the path"
    said = cli("run", compiled, "--image", tmp_path, "--prompt", "What?").sentence()
    assert said == f"error: --image {tmp_path} is a folder; name a picture in it"


def test_picture_on_the_web_is_not_fetched(cli, compiled, checkpoint, write_data, tmp_path):
    address = "https://example.org/page.png"
    words = "is a web address, and nothing is fetched from there; download it and pass the file"
    assert cli("run", compiled, "--image", address, "--prompt", "?").sentence() == f"error: --image {address} {words}"
    file = write_data(GOOD, GOOD | {"image": address})
    for ended in attempts(cli, checkpoint, compiled, file, tmp_path / "out"):
        assert ended.sentence() == f"error: {file} row 1: image {address} {words}"
    file = write_data(GOOD | {"image": "."})
    for ended in attempts(cli, checkpoint, compiled, file, tmp_path / "out"):
        assert ended.sentence() == f"error: {file} row 0: image {tmp_path} is a folder; name a picture in it"


def test_prompt_with_the_placeholder(cli, compiled, data_file):
    said = cli("run", compiled, "--image", data_file.parent / "page0.png", "--prompt", "<image> What?").sentence()
    assert "holds <image>, which stands for an image; leave it out" in said


@pytest.mark.parametrize(("mode", "size"), [("RGB", (1, 1)), ("RGBA", (3, 700)), ("P", (700, 3)), ("I;16", (40, 40)), ("1", (40, 40))])
def test_odd_pictures_are_read(cli, compiled, tmp_path, mode, size):
    Image.new(mode, size).save(tmp_path / "odd.png")
    ended = cli("run", compiled, "--image", tmp_path / "odd.png", "--prompt", "What?", "--max-new-tokens", 2, "--json")
    assert ended.code == 0, ended.err
