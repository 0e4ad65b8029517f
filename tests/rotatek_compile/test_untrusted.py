"""Files somebody else may have written: what is refused, and in which words."""

import os

import pytest

from rotatek_compile.errors import ArtifactError
from rotatek_compile.untrusted import inside, parse_json, printable, read_file, shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' stands twice in one object"),
        (b'{"a": {"b": 1, "c": 1, "b": 1}}', "key 'b' stands twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e400}', "number 1e400 is too large"),
        (b'{"a": 12345678901234567890}', "number 12345678901234567890... has 20 digits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "has 5000 digits"),
        (b"[" * 100_000, "is not readable JSON"),
        (b'{"a": ' * 40 + b"1" + b"}" * 40, "nests more than 32 levels deep"),
        (b'{"a": "\\u001b[2J"}', "holds the text '\\x1b[2J' with control characters"),
        (b'{"a\\nb": 1}', "holds the text 'a\\nb' with control characters"),
        (b'{"a": ["\\ud800"]}', "with control characters"),
        ('{"a": "\u202egpj.exe"}'.encode(), "with control characters"),
        (b"\xef\xbb\xbf{}", "is not readable JSON"),
        (b"\xff", "is not readable JSON"),
        (b"[1]", "holds a list, expected an object"),
    ],
)
def test_refused_json(text, words):
    with pytest.raises(ArtifactError) as error:
        parse_json(text, "x.json")
    said = str(error.value)
    assert said.startswith("x.json ") and words in said and said.endswith("; compile the artifact again") and said.isprintable()


def test_json_that_is_read():
    deep = b'{"a": ' * 31 + b"{}" + b"}" * 31
    assert parse_json(b'{"a": [1, -2.5e3, "\xc3\xa4", true, null], "b": 9223372036854775807}', "") == {
        "a": [1, -2500.0, "ä", True, None], "b": 9223372036854775807,
    }  # fmt: skip
    assert parse_json(deep, "")
    assert parse_json(b'{"chat_template": "a\\nb"}', "", printable=False) == {"chat_template": "a\nb"}


def test_values_in_sentences():
    assert shown("a'b") == '"a\'b"' and shown(None) == "None" and shown([1, [2, [3]]]) == "[1, [2, [...]]]"
    for value in ("x" * 10**6, list(range(10**5)), {"a": {"b": {"c": "d" * 500}}}, "\x1b[2J\n\u202e\ud800", 10**18):
        assert shown(value).isprintable() and len(shown(value)) < 300
    assert printable("a\nb\x1b\u202ec") == "a?b??c" and printable("größe 1.png") == "größe 1.png"


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "artifact"
    made.mkdir()
    (made / "file").write_bytes(b"12345")
    (tmp_path / "outside").write_bytes(b"secret")
    return made


def refused(folder, name="file", limit=100):
    with pytest.raises(ArtifactError) as error:
        read_file(folder, name, limit)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_size(folder):
    assert read_file(folder, "file", 5) == b"12345"
    assert "has 5 bytes, at most 4 are allowed" in refused(folder, limit=4)
    os.truncate(folder / "file", 1 << 42)  # sparse: it takes no room, and reading it would take days
    assert "has 4398046511104 bytes" in refused(folder)


def test_links(folder):
    (folder / "inner").symlink_to("file")
    assert read_file(folder, "inner", 100) == b"12345"
    for number, target in enumerate((folder.parent / "outside", "../outside", "/etc/passwd", "/dev/zero")):
        (folder / f"link{number}").symlink_to(target)
        assert "outside the artifact; put the file itself there" in refused(folder, f"link{number}")
    (folder / "loop").symlink_to("loop")
    assert "it has no loop" in refused(folder, "loop")
    (folder.parent / "way").symlink_to(folder)
    assert read_file(folder.parent / "way", "file", 100) == b"12345"  # the directory itself may be reached through a link


def test_hub_cache_links_to_its_blobs_alone(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_bytes(b"12345")
    (tmp_path / "outside").write_bytes(b"secret")
    (snapshot / "file").symlink_to("../../blobs/abc")
    (snapshot / "other").symlink_to("../../../outside")
    assert read_file(snapshot, "file", 5) == b"12345"
    assert inside(snapshot, snapshot / "file") and not inside(snapshot, snapshot / "other")
    assert "outside the artifact" in refused(snapshot, "other")


def test_what_is_no_file(folder):
    os.mkfifo(folder / "pipe")
    (folder / "directory").mkdir()
    assert "is no regular file" in refused(folder, "pipe")
    assert "cannot be read (Is a directory)" in refused(folder, "directory") or "is no regular file" in refused(folder, "directory")
    assert "cannot be read (" in refused(folder, "x" * 300)
    assert "it has no a" in refused(folder, "a\0b")
    assert "does not exist; make one with rotatek-compile" in refused(folder / "nowhere")
