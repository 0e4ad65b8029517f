"""What only a process of its own shows: start-up time, signals, file-size limits, and which `kernels` gets imported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def command(name, *arguments, **options):
    options = {"capture_output": True, "text": True, "timeout": 90} | options
    return subprocess.run([BIN / name, *map(str, arguments)], **options)


@pytest.mark.parametrize("words", [["rotatek"], ["rotatek", "compile"], ["rotatek-run"], ["rotatek-eval"], ["rotatek-inspect"]])
def test_help_is_quick(words):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        ended = command(*words, "--help")
        seconds.append(time.perf_counter() - started)
        assert ended.returncode == 0 and ended.stdout.startswith("Usage: ") and ended.stderr == ""
    assert min(seconds) < 0.5


@pytest.mark.parametrize("entry", ["compile_main", "run_main", "eval_main", "inspect_main", "main"])
def test_help_imports_no_torch(entry):
    code = (
        "import sys\nfrom rotatek_compile.commands import main\nsys.argv[1:] = ['--help']\n"
        f"try:\n    main.{entry}()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "sys.stderr.write(' '.join({'torch', 'transformers', 'numpy', 'datasets', 'PIL'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_exit_codes():
    assert command("rotatek").returncode == 2
    assert command("rotatek", "frobnicate").returncode == 2
    ended = command("rotatek", "run", "/no/artifact", "--prompt", "What?")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: artifact /no/artifact does not exist; make one with rotatek-compile\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_standard_output(unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ended = command("rotatek-compile", "--list-models", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (1, "error: no space is left to write to; free some and run the command again\n")


def test_version():
    from rotatek_compile import __version__

    assert command("rotatek", "--version").stdout == f"rotatek, version {__version__}\n"


def test_foreign_kernels_distribution_is_not_shadowed(compiled, tmp_path):
    """From the repository root, whose kernels/ is ours, `import kernels` must find the installed distribution of that name."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').write(__file__)\n")
    (site / "kernels-9.9.dist-info").mkdir()
    (site / "kernels-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9.9\n")
    # a .pth-like hook: after every start, report what `kernels` means to this process once it ends
    (site / "sitecustomize.py").write_text(
        "import atexit, importlib.util\n"
        f"atexit.register(lambda: open({str(tmp_path / 'found')!r}, 'w').write(str(importlib.util.find_spec('kernels').origin)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    expected = str(site / "kernels" / "__init__.py")
    for words in ([BIN / "rotatek-inspect", compiled], [sys.executable, "cli.py", "inspect", compiled]):
        (tmp_path / "found").unlink(missing_ok=True)
        ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        assert (tmp_path / "found").read_text() == expected


def test_interrupt_while_calibrating(checkpoint, data_file, tmp_path, untouched, small_run):
    """Ctrl-C in the second batch of a real process; the batch is slowed down so that the signal lands in it."""
    (tmp_path / "slow").mkdir()
    code = (
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may start with it ignored\n"
        "from rotatek_compile import calibrate\nfrom rotatek_compile.commands import main\nfast = calibrate.run_batch\n"
        "def run_batch(model, batch, collector, *rest):\n"
        "    if collector.moments.documents:\n        print('second batch', flush=True)\n        time.sleep(60)\n"
        "    fast(model, batch, collector, *rest)\n"
        "calibrate.run_batch = run_batch\nmain.compile_main()\n"
    )
    arguments = ["--model", checkpoint, "--calib", data_file, "-o", tmp_path / "out", *small_run]
    environment = os.environ | {"ROTATEK_CACHE": str(tmp_path / "slow")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "second batch\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1] == "error: interrupted; 2 of 4 documents are saved, run the same command with --resume to go on"
    assert "Traceback" not in err
    untouched(tmp_path, "slow")
    assert [file.suffix for file in (tmp_path / "slow").iterdir()] == [".safetensors"]


def test_file_size_limit(checkpoint, data_file, tmp_path, untouched, small_run):
    """A real failing write: files of this process may not grow beyond the limit."""
    (tmp_path / "cache").mkdir()
    words = [BIN / "rotatek-compile", "--model", checkpoint, "--calib", data_file, "-o", tmp_path / "out", *small_run]
    quoted = " ".join(f"'{word}'" for word in words)
    environment = os.environ | {"ROTATEK_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(["bash", "-c", f"ulimit -f 64; exec {quoted}"], capture_output=True, text=True, timeout=90, env=environment)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: could not ")
    untouched(tmp_path, "cache")
    untouched(tmp_path / "cache")


def test_reader_of_a_pipe_that_leaves_early(compiled):
    """`rotatek-inspect ARTIFACT | head` must not end in a traceback, buffered or not."""
    binary = Path(sys.executable).parent / "rotatek-inspect"
    for unbuffered in ("", "1"):
        process = subprocess.Popen(
            [str(binary), str(compiled), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == ("", 1)
