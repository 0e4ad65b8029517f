"""What tests of whole commands share: a random tiny checkpoint, a local data set, a compiled artifact, and a way to run a command.

Nothing reaches the network, and nothing is written outside pytest's temporary folders.
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
_DATASETS_CACHE = tempfile.mkdtemp(prefix="rotatek-tests-")
os.environ["HF_DATASETS_CACHE"] = _DATASETS_CACHE

ROOT = Path(__file__).resolve().parents[1]
GEOMETRY = {
    "hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 32, "feed_forward": 96,
    "vision_hidden": 64, "vision_layers": 1, "vision_feed_forward": 96,
}  # fmt: skip
SMALL_RUN = ("--num-samples", 4, "--batch-size", 2, "--device", "cpu")


def pytest_unconfigure():
    shutil.rmtree(_DATASETS_CACHE, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def moments_cache(tmp_path_factory):
    """ROTATEK_CACHE of the session; tests that count calibrations set their own."""
    before = os.environ.get("ROTATEK_CACHE")
    os.environ["ROTATEK_CACHE"] = str(tmp_path_factory.mktemp("moments"))
    yield Path(os.environ["ROTATEK_CACHE"])
    if before is None:
        del os.environ["ROTATEK_CACHE"]
    else:
        os.environ["ROTATEK_CACHE"] = before


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """Writes a tiny LLaVA-NeXT checkpoint with random weights; keywords change its geometry, `text` its text config."""
    sys.path.insert(0, str(ROOT / "tools"))
    from tiny_training import llava_next

    def make(name="tiny", seed=0, text=None, **changes):
        folder = tmp_path_factory.mktemp("checkpoint") / name
        config = llava_next.build_config(**GEOMETRY | changes)
        for key, value in (text or {}).items():
            setattr(config.text_config, key, value)
        llava_next.save_checkpoint(llava_next.build_model(config, seed), folder)
        return folder

    yield make
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint):
    """The checkpoint most tests use; read-only."""
    return make_checkpoint()


@pytest.fixture
def broken_checkpoint(checkpoint, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


def write_images(folder, count=3):
    """Small different pictures: gradients, not constants."""
    from PIL import Image

    for number in range(count):
        picture = Image.linear_gradient("L").rotate(90 * number).resize((96 + 16 * number, 80))
        picture.convert("RGB").save(folder / f"page{number}.png")


def write_rows(file, rows):
    """JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """JSON lines of four questions about three pictures, one of them about two at once."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder)
    rows = [{"question": f"What is {n}?", "answers": [f"word {n}"], "images": [f"page{n % 3}.png"]} for n in range(4)]
    rows[1]["images"].append("page2.png")
    return write_rows(folder / "pages.jsonl", rows)


@pytest.fixture
def write_data(tmp_path):
    """Writes JSON lines beside three pictures, and returns the file."""

    def write(*rows, name="rows.jsonl"):
        write_images(tmp_path)
        return write_rows(tmp_path / name, rows)

    return write


@pytest.fixture(scope="session")
def compiled(checkpoint, data_file, moments_cache, tmp_path_factory):
    """An artifact of the tiny checkpoint; read-only."""
    from rotatek_compile import CompileOptions, compile_artifact

    target = tmp_path_factory.mktemp("compiled") / "artifact"
    small = {"num_samples": 4, "batch_size": 2, "device": "cpu", "quiet": True}
    compile_artifact(CompileOptions(model=str(checkpoint), calib=str(data_file), output=target, **small))
    return target


@pytest.fixture
def broken_artifact(compiled, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(compiled, tmp_path / "artifact")


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def sentence(self, code=1):
        """The one sentence of a failure: last on stderr, nothing on stdout, no traceback."""
        assert (self.code, self.out) == (code, ""), (self.code, self.out, self.err)
        assert "Traceback" not in self.err
        last = self.err.rstrip("\n").splitlines()[-1]
        assert last.startswith(("error: ", "Error: ")), self.err
        assert sum(line.lower().startswith("error: ") for line in self.err.splitlines()) == 1, self.err
        return last


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command in this process through its console entry point: `cli("compile", "--model", ...)`."""
    from rotatek_compile.commands import main

    def call(command, *arguments):
        monkeypatch.setattr(sys, "argv", [f"rotatek-{command}", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the entry point replaces it
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            getattr(main, f"{command}_main")()
        captured = capsys.readouterr()
        return Ended(stop.value.code or 0, captured.out, captured.err)

    return call


@pytest.fixture
def small_run():
    """Options that keep a compilation quick."""
    return SMALL_RUN


@pytest.fixture
def untouched(tmp_path):
    """Asserts that nothing (also no hidden staging directory) was left in a folder but the names given."""

    def check(folder, *names):
        assert sorted(entry.name for entry in Path(folder).iterdir()) == sorted(names)

    return check
