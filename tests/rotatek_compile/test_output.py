"""What a killed run leaves beside its target, and what the next run makes of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rotatek_compile import RotateKError
from rotatek_compile.output import CONFIG_FILE, LOCK_FILE, atomic_directory, recover

RUN = """
import os, signal, sys
from pathlib import Path
from rotatek_compile.output import atomic_directory
stop, target = sys.argv[1], Path(sys.argv[2])
replace = Path.replace
def replacing(self, to):
    if self.name == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, to)
Path.replace = replacing
with atomic_directory(target, True) as staging:
    (staging / "rotatek_config.json").write_text("new")
    if stop == "block":
        print("waiting", flush=True)
        sys.stdin.read()
"""


def killed(stop, target):
    ended = subprocess.run([sys.executable, "-c", RUN, stop, str(target)], timeout=60)
    assert ended.returncode == -signal.SIGKILL


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def target(tmp_path):
    made = tmp_path / "artifact"
    made.mkdir()
    (made / CONFIG_FILE).write_text("old")
    return made


def test_killed_between_the_renames(target, tmp_path):
    """The one moment in which neither is in place: the next run, even one that is refused, puts the old one back."""
    killed("new", target)
    assert not target.exists() and len(names(tmp_path)) == 1
    with pytest.warns(UserWarning, match="was killed while it replaced .*artifact; the old artifact is back in place"):  # noqa: SIM117
        with pytest.raises(RotateKError, match="is not empty; pass --overwrite"), atomic_directory(target, False):
            pass
    assert names(tmp_path) == ["artifact"] and (target / CONFIG_FILE).read_text() == "old"


def test_killed_before_the_renames(target, tmp_path):
    killed("artifact", target)
    assert (target / CONFIG_FILE).read_text() == "old" and len(names(tmp_path)) == 2
    with atomic_directory(target, True) as staging:
        assert len(names(tmp_path)) == 2  # what was left is gone, this run's own is there
        (staging / CONFIG_FILE).write_text("newer")
    assert names(tmp_path) == ["artifact"] and (target / CONFIG_FILE).read_text() == "newer"


def test_runs_that_are_alive_and_foreign_folders_are_left_alone(target, tmp_path):
    words = [sys.executable, "-c", RUN, "block", str(target)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    (tmp_path / ".artifact-mine").mkdir()
    (tmp_path / ".artifact-12345678").mkdir()  # named as ours are, but without our lock
    (tmp_path / ".artifact-b-12345678").mkdir()
    (tmp_path / ".artifact-b-12345678" / LOCK_FILE).touch()  # of the target `artifact-b`
    before = names(tmp_path)
    recover(target)
    assert names(tmp_path) == before
    process.communicate("", timeout=60)
    assert process.returncode == 0 and (target / CONFIG_FILE).read_text() == "new"
    assert names(tmp_path) == [".artifact-12345678", ".artifact-b-12345678", ".artifact-mine", "artifact"]


def test_files_are_on_the_disk_before_they_are_in_place(target, monkeypatch):
    synced, replaced = [], []
    fsync, replace = os.fsync, type(target).replace
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(str(Path(f"/proc/self/fd/{handle}").readlink())), fsync(handle))[1])
    monkeypatch.setattr(type(target), "replace", lambda self, to: (replaced.append((self.name, len(synced))), replace(self, to))[1])
    with atomic_directory(target, True) as staging:
        (staging / CONFIG_FILE).write_text("new")
        (staging / "deep").mkdir()
        (staging / "deep" / "file").write_text("words")
    assert [name for name, _ in replaced] == ["artifact", "new"]
    before = [path.split("/new")[-1] for path in synced[: replaced[0][1]]]
    assert sorted(before) == ["", "/deep", "/deep/file", f"/{CONFIG_FILE}"]
