"""One compilation by two real processes over gloo: the artifact of one process, one voice, and no waiting for the dead."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rotatek_compile import parallel
from rotatek_compile.errors import RotateKError, UsageError

BIN = Path(sys.executable).parent
MAIN = "from rotatek_compile.commands.main import compile_main\ncompile_main()\n"
# the process with rank 1 (of two) fails in its second batch, in the way that `fail` says
FAILING = (
    "import os\nfrom rotatek_compile import calibrate\nfrom rotatek_compile.errors import RotateKError\nfast = calibrate.run_batch\n"
    "def run_batch(model, batch, collector, *rest):\n"
    "    if collector.moments.documents and os.environ['RANK'] == '1':\n        {fail}\n"
    "    fast(model, batch, collector, *rest)\n"
    "calibrate.run_batch = run_batch\n" + MAIN
)


def start(arguments, cache, code=MAIN, size=2):
    """`size` processes as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ROTATEK_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes, timeout=90):
    """(exit code, stdout, stderr) of each; a process that does not end is killed and fails the test."""
    ends = time.monotonic() + timeout
    try:
        out = [process.communicate(timeout=max(1, ends - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, out, strict=True)]


@pytest.fixture
def arguments(checkpoint, write_data, tmp_path):
    """Nine documents, one of them kept aside: the second of two processes has four to read, and none to check the plan on."""
    rows = [{"question": f"What is {n}?", "answers": [f"word {n}"], "images": [f"page{n % 3}.png"]} for n in range(9)]
    file = write_data(*rows)
    return ["--model", checkpoint, "--calib", file, "-o", tmp_path / "out", "--num-samples", 9, "--batch-size", 1, "--device", "cpu"]


def single(arguments, cache, output):
    swapped = [output if word == arguments[5] else word for word in arguments]
    ended = subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, swapped), "--json"],
        env=os.environ | {"ROTATEK_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_two_processes_make_the_artifact_of_one(arguments, tmp_path):
    alone = single(arguments, tmp_path / "cache-1", tmp_path / "alone")
    (code, out, err), other = finish(start([*arguments, "--json"], tmp_path / "cache-2"))
    assert (code, err) == (0, ""), err
    assert other == (0, "", "")  # one voice
    summary = json.loads(out)
    assert summary["plan"]["ranks"] == alone["plan"]["ranks"]
    assert summary["plan"]["predicted_kl"] == pytest.approx(alone["plan"]["predicted_kl"], rel=1e-3)
    one, two = (load_file(folder / "rotatek.safetensors") for folder in (tmp_path / "alone", tmp_path / "out"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.endswith("_encode"):  # a basis is free in sign; the moments that it comes from are compared below
            continue
        assert torch.allclose(two[name].double(), tensor.double(), rtol=1e-3, atol=1e-4 * float(tensor.double().abs().max())), name
    (first,), (second,) = (list((tmp_path / f"cache-{n}").glob("*")) for n in (1, 2))  # and no share is left
    assert first.name == second.name
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert float((two[name] - tensor).abs().max()) <= 1e-5 * float(tensor.abs().max()), name


def test_whoever_fails_first_says_so_and_nobody_hangs(arguments, tmp_path):
    code = FAILING.format(fail="raise RotateKError('the second process has had enough')")
    ended = finish(start(arguments, tmp_path / "cache", code))
    assert [code for code, _, _ in ended] == [1, 1]
    assert "".join(err for _, _, err in ended) == "error: the second process has had enough\n"
    assert not (tmp_path / "out").exists()


def test_a_killed_process_is_noticed_and_its_run_resumes(arguments, tmp_path):
    code = FAILING.format(fail="os.kill(os.getpid(), 9)")
    began = time.monotonic()
    first, killed = finish(start(arguments, tmp_path / "cache", code))
    assert time.monotonic() - began < 60
    assert killed[0] == -signal.SIGKILL
    assert first[0] == 1
    assert first[2] == (
        "error: another process of this run ended or hangs, so this one stops too; "
        "see what that one printed, then run the same command with --resume\n"
    )
    # process 0 has its share on disk: one process cannot go on with it, two can
    refused = subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, arguments), "--resume"],
        env=os.environ | {"ROTATEK_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=90,
    )
    words = "the interrupted calibration ran with 2 processes, this one has 1; start 2 again, or leave --resume out to begin anew"
    assert (refused.returncode, refused.stderr) == (1, f"error: {words}\n")
    resumed = finish(start([*arguments, "--resume", "--quiet"], tmp_path / "cache"))
    assert [code for code, _, _ in resumed] == [0, 0], resumed
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_rival_has_nothing_to_share(arguments, tmp_path):
    ended = finish(start([*arguments, "--method", "int4"], tmp_path / "cache"))
    assert [code for code, _, _ in ended] == [2, 2]
    assert "".join(err for _, _, err in ended) == "error: --method int4 has no calibration pass to share; start it without a launcher\n"


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("-1", "1")])
def test_an_environment_that_makes_no_sense(rank, size, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError, match=f"RANK={rank} and WORLD_SIZE={size}"):
        parallel.launched()


def test_each_process_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parallel.local_device(None) is None
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert [parallel.local_device(name) for name in (None, "cuda", "cpu", "cuda:0")] == ["cuda:1", "cuda:1", "cpu", "cuda:0"]
    with pytest.raises(UsageError, match="--device auto spreads one model"):
        parallel.local_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RotateKError, match="process 2 of this machine has no GPU: there are 2; start 2 processes"):
        parallel.local_device(None)


def test_a_single_process_needs_no_group():
    together, sums = parallel.Processes(), {"x": torch.ones(2)}
    assert (together.main, together.share([1, 2]), together.gather(3), together.broadcast(4)) == (True, [1, 2], [3], 4)
    assert together.sum_named(sums) == sums
    assert together.sum(torch.tensor([1.5])).tolist() == [1.5]
    shares = [parallel.Processes(rank, 3).share(range(8)) for rank in range(3)]
    assert sorted(x for share in shares for x in share) == list(range(8))


def test_evaluations_run_in_one_process(compiled, data_file, cli, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    said = cli("eval", compiled, "--data", data_file).sentence(2)
    assert said == "error: rotatek-eval runs in one process; start it without torchrun, with --device auto to use several GPUs"
