"""A short run of the fuzzer, and that it sees each kind of fault it looks for. The full run is `make fuzz`."""

import importlib
import json
import socket
import subprocess
import sys
import time

import pytest

CASES = 400


@pytest.fixture(scope="module")
def fuzzer(tools):
    return importlib.import_module("fuzz_artifact")


@pytest.fixture(scope="module")
def watch(tools):
    from artifact_trust.guard import Watch

    return Watch(tools.parent)


@pytest.fixture(scope="module")
def bases(tools):
    from artifact_trust.reading import sound_artifacts

    return sound_artifacts()


def test_short_run(tools):
    ended = subprocess.run(
        [sys.executable, tools / "fuzz_artifact.py", "--cases", str(CASES), "--workers", "2"], capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    first = ended.stdout.splitlines()[0].split()
    assert first[:2] == [str(CASES), "cases"] and ended.stdout.splitlines()[0].endswith(" 0 failed")
    refused, accepted = int(first[4]), int(first[6])
    assert refused + accepted == CASES and refused > CASES / 2 and accepted > CASES / 20


def test_cases_follow_from_their_numbers(bases):
    from artifact_trust.mutations import make_case

    first, again, other = (make_case(bases, seed, 7) for seed in (0, 0, 1))
    assert first.files == again.files and first.done == again.done
    assert first.files != other.files


def opens_something(directory):
    with open("/etc/hostname") as stream:  # noqa: PTH123
        stream.read()


def writes_a_file(directory):
    (directory / "new").write_text("words")


def connects(directory):
    with socket.socket() as line:
        line.connect_ex(("127.0.0.1", 9))


FAULTS = {
    opens_something: "did what a reader may not: [\"open '/etc/hostname'\"]",
    writes_a_file: 'did what a reader may not: ["open for writing',
    connects: "did what a reader may not: ['socket.",
    lambda directory: {}["shape"]: "KeyError: 'shape'",
    lambda directory: b"x" * (400 << 20): "took ",
    lambda directory: time.sleep(60): "too slow",
}


@pytest.mark.parametrize(("fault", "words"), FAULTS.items())
def test_faults_are_seen(fuzzer, bases, watch, tmp_path, monkeypatch, fault, words):
    from artifact_trust import guard, reading

    def faulty(directory):
        fault(directory)
        return None, "a refusal"

    monkeypatch.setattr(reading, "read_and_use", faulty)
    monkeypatch.setattr(guard, "SECONDS", 1 if words == "too slow" else 30)  # a busy machine takes its time to hand out 400 MB
    found = fuzzer.one(bases, 0, 1, tmp_path / "case", watch)
    assert found["wrong"].startswith(words)
    monkeypatch.setattr(reading, "read_and_use", lambda directory: (None, "a refusal"))
    assert fuzzer.one(bases, 0, 1, tmp_path / "case", watch)["wrong"] is None


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ("two\nlines", "a refusal that cannot be printed"),
        ("\x1b[2J", "a refusal that cannot be printed"),
        ("x" * 5000, "a refusal of 5000"),
    ],
)
def test_bad_refusals_are_seen(refusal, words):
    from artifact_trust.reading import wrong_refusal

    assert wrong_refusal(refusal).startswith(words) and wrong_refusal("damaged; get it again") is None


def test_bad_artifacts_are_seen(bases, tmp_path):
    """What is accepted is checked without the reader: each property broken after reading is found."""
    from artifact_trust.reading import read_and_use, wrong_artifact

    for name, content in bases[0].items():
        (tmp_path / name).write_bytes(content)

    def after(change):
        artifact, refusal = read_and_use(tmp_path)
        assert refusal is None
        change(artifact)
        return wrong_artifact(artifact, tmp_path)

    assert after(lambda a: None) is None
    assert after(lambda a: a.tensors["layers.0.knockout"].fill_(float("nan"))) == "accepted layers.0.knockout, which is not finite"
    assert after(lambda a: a.tensors["layers.0.knockout"].neg_()) == "accepted layers.0.knockout, which is negative"
    assert after(lambda a: a.tensors["layers.0.key_plan"].fill_(7)) == "accepted the slabs (7, 7, 7)"
    assert after(lambda a: a.tensors["layers.2.value_plan"][1].fill_(16)) == "accepted the slabs (16, 16, 16)"
    assert after(lambda a: a.tensors["layers.2.visual.key_encode"][0].mul_(1e-20)) is None  # small, but invertible
    assert "has no inverse" in after(lambda a: a.tensors["layers.2.visual.key_encode"][0].view(-1)[:32].fill_(1 + 1e-16))
    assert after(lambda a: a.base_model.update(id="/models/../x")) == "accepted the base '/models/../x'"
    assert after(lambda a: a.calibration.update(data="\x1b[2J")) == "accepted the text '\\x1b[2J'"
    config = json.loads((tmp_path / "rotatek_config.json").read_text())
    config["files"]["rotatek.safetensors"]["sha256"] = "0" * 64

    def forget(artifact):
        (tmp_path / "rotatek_config.json").write_text(json.dumps(config))

    assert after(forget) == "accepted tensors with another checksum"
