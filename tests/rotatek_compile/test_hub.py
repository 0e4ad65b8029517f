"""The Hub, against a server of our own: what is pushed is pulled by name and revision, and runs."""

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rotatek_compile import api, compiler, hub, weights
from rotatek_compile.errors import RotateKError, UsageError
from rotatek_compile.hub import fetch, locate, open_artifact

_spec = importlib.util.spec_from_file_location("rotatek_hub_fixtures", Path(__file__).parents[1] / "hub_fixtures.py")
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
server, pushed, page = _shared.server, _shared.pushed, _shared.page
environment, ask, ASK = _shared.environment, _shared.ask, _shared.ASK
BIN, ROOT = Path(sys.executable).parent, Path(__file__).resolve().parents[2]


def test_what_was_pushed_is_pulled_and_runs(pushed, cli, compiled, checkpoint, page):
    files = pushed.repos["lab/art"].files()
    assert files["rotatek.safetensors"] == (compiled / "rotatek.safetensors").read_bytes()
    assert set(files) == {".gitattributes", *(file.name for file in compiled.iterdir())}
    there, here = (ask(cli, name, page, "--model", checkpoint) for name in ("lab/art", compiled))
    assert there["text"] == here["text"] and there["kv_bytes"] == here["kv_bytes"] < here["kv_bytes_dense"]
    assert pushed.called("PUT", "/lfs/") and pushed.called("GET", "/lfs/")  # through large-file storage, both ways


def test_weights_are_pushed_and_used(server, cli, compiled, checkpoint, page, tmp_path):
    assert cli("push", compiled, "lab/whole", "--with-weights").code == 0
    files = server.repos["lab/whole"].files()
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes() and "config.json" in files
    assert "base model's, unchanged" in files["README.md"].decode() and "--model PATH" not in files["README.md"].decode()
    server.requests.clear()
    assert ask(cli, "lab/whole", page)["text"] == ask(cli, compiled, page)["text"]
    # weights are fetched where they are needed only
    shutil.rmtree(server.cache)
    server.requests.clear()
    assert cli("inspect", "lab/whole").code == 0
    fetched = {path.removeprefix("/lfs/") for _, path, _ in server.called("GET", "/lfs/")}
    large = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name.endswith(".safetensors")}
    assert large["rotatek.safetensors"] in fetched and large["model.safetensors"] not in fetched


def test_processes_of_their_own(server, compiled, checkpoint, page):
    """Nothing but the environment tells the commands where the Hub is."""
    push = subprocess.run(
        [BIN / "rotatek", "push", compiled, "lab/cli", "--with-weights"], env=environment(server), capture_output=True, text=True
    )
    assert push.returncode == 0 and push.stderr == "", push.stderr
    assert push.stdout.startswith(f"pushed to {server.endpoint}/lab/cli: ")
    command = [str(word) for word in (BIN / "rotatek-run", "lab/cli", "--image", page, *ASK)]
    run = subprocess.run(command, env=environment(server), capture_output=True, text=True)
    assert run.returncode == 0 and json.loads(run.stdout)["new_tokens"] <= 3, run.stderr


def test_compile_from_the_hub_and_push(server, cli, checkpoint, data_file, small_run, page, tmp_path):
    base = server.add("museum/base", {file.name: file.read_bytes() for file in checkpoint.iterdir()})
    compile_command = ("compile", "--model", "museum/base", "--calib", data_file, "-o", tmp_path / "out", *small_run)
    ended = cli(*compile_command, "--push-to-hub", "lab/new", "--private", "--json")
    assert ended.code == 0, ended.err
    said, repo = json.loads(ended.out), server.repos["lab/new"]
    assert said["pushed"]["repo"] == "lab/new" and said["pushed"]["commit"] == repo.resolve("main") and repo.private
    config = json.loads(repo.files()["rotatek_config.json"])
    assert config["base_model"] == {"id": "museum/base", "revision": base.resolve("main"), "fingerprint": None}
    assert "model.safetensors" not in repo.files() and "base_model: museum/base" in repo.files()["README.md"].decode()
    more = ("--with-weights", "--overwrite", "--quiet")
    assert cli(*compile_command, *more).code == 0
    [cached] = server.cache.glob("models--museum--base/snapshots/*/model.safetensors")
    assert (tmp_path / "out" / "model.safetensors").samefile(cached.resolve())
    first = ask(cli, "lab/new", page)
    ended = cli("run", tmp_path / "out", "--image", page, *ASK)
    assert (ended.err, json.loads(ended.out)["text"]) == ("", first["text"])  # no warning: they are the recorded weights
    base.commit({"config.json": b"{}"})  # a later commit of the base changes nothing: the recorded one is loaded
    assert ask(cli, "lab/new", page)["text"] == first["text"]


def test_load_enable_and_inspect_by_id(pushed, cli, compiled, checkpoint):
    model, processor = api.load("lab/art", model=str(checkpoint), device="cpu")
    from rotatek_compile.runtime.enable import active, enable

    assert active(model).artifact.remote.repo == "lab/art" and processor.tokenizer is not None
    active(model).disable()
    with enable(model, "lab/art@main") as enabled:
        assert enabled.artifact.plan() == open_artifact(compiled).plan()
    assert "(llava_next)" in cli("inspect", "lab/art").out
    assert cli("inspect", "lab/art", compiled).out.splitlines()[-1] == cli("inspect", compiled, compiled).out.splitlines()[-1]


def test_blobs_that_repositories_share(pushed):
    """huggingface_hub 2 keeps a large file once, in `blobs` of the whole cache; the repository's blob is a link to it."""
    path, _ = fetch("lab/art")
    blob = (path / "rotatek.safetensors").resolve()
    shared = pushed.cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    assert open_artifact("lab/art").plan()
    shared.rename(pushed.cache / "elsewhere")
    blob.unlink()
    blob.symlink_to(pushed.cache / "elsewhere")
    with pytest.raises(RotateKError, match="outside the artifact"):
        open_artifact(path)


def test_help_is_quick_and_says_what_is_what():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        ended = subprocess.run([BIN / "rotatek", "push", "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5 and ended.stderr == ""
    assert all(f"--{name}" in ended.stdout for name in ("private", "create-pr", "revision", "with-weights", "dry-run"))


def test_revisions(pushed, compiled, cli, tmp_path):
    repo = pushed.repos["lab/art"]
    first = repo.resolve("main")
    other = shutil.copytree(compiled, tmp_path / "other")
    (other / "report.json").write_text('{"kv_bytes_per_token": {"dense": 1, "compressed": 1}}')
    assert cli("push", other, "lab/art", "--revision", "trial").code == 0
    assert repo.resolve("main") == first and repo.resolve("trial") != first
    for name, revision, expected in (
        ("lab/art", None, first),
        ("lab/art", "trial", repo.resolve("trial")),
        ("lab/art@trial", None, repo.resolve("trial")),
        (f"lab/art@{first}", first, first),
    ):
        path, remote = locate(name, revision)
        assert (remote.commit, path.name) == (expected, expected)
    assert json.loads((fetch("lab/art", "trial")[0] / "report.json").read_text())["kv_bytes_per_token"]["dense"] == 1
    with pytest.raises(RotateKError, match="lab/art has no revision v9; name a branch"):
        locate("lab/art", "v9")
    with pytest.raises(UsageError, match="names revision trial, --revision names main"):
        locate("lab/art@trial", "main")
    with pytest.raises(UsageError, match="--revision main is for artifacts on the Hub"):
        locate(str(compiled), "main")


def test_directories_win_and_paths_stay_paths(pushed, compiled, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pushed.requests.clear()
    shutil.copytree(compiled, tmp_path / "lab" / "art")
    assert locate("lab/art") == (Path("lab/art"), None)
    for name in (Path("no/art"), "./no/art", "/no/art", "a/b/c", "name"):
        assert locate(name)[1] is None
        with pytest.raises(RotateKError, match="does not exist"):
            open_artifact(name)
    assert pushed.requests == []


def test_local_base_is_not_looked_for_in_the_working_directory(pushed, cli, checkpoint, page, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "here" / checkpoint.name)
    monkeypatch.chdir(tmp_path / "here")
    said = cli("run", "lab/art", "--image", page, *ASK).sentence()
    assert f"base model was at {checkpoint.name}, which is gone; pass its new place with --model" in said


def test_what_cannot_be_pulled(server, cli, checkpoint, compiled, monkeypatch):
    server.add("lab/model", {"config.json": b"{}"})
    server.add("lab/gated", {file.name: file.read_bytes() for file in compiled.iterdir()}, gated=True)
    server.add("ada/secret", {"rotatek_config.json": b"{}"}, private=True)
    assert "lab/model on the Hub is no RotateK artifact: it has no rotatek_config.json" in cli("inspect", "lab/model").sentence()
    assert f"lab/gated is gated; ask for access at {server.endpoint}/lab/gated" in cli("inspect", "lab/gated").sentence()
    assert "lab/none is no local directory, and no repository on the Hub that this token can read" in cli("inspect", "lab/none").sentence()
    monkeypatch.delenv("HF_TOKEN")
    assert "ada/secret is no local directory, and no repository" in cli("inspect", "ada/secret").sentence()
    server.broken = ("/api/models/", 503)
    assert "the Hub answered 503 when asked to read lab/model" in cli("inspect", "lab/model").sentence()


def test_offline(pushed, cli, compiled, monkeypatch):
    from huggingface_hub import constants

    commit = fetch("lab/art")[1].commit
    pushed.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("lab/art")[1] == hub.HubArtifact("lab/art", commit, False)
    assert "lab/none is no local directory, HF_HUB_OFFLINE is set, and no whole copy" in cli("inspect", "lab/none").sentence()
    assert "lab/x cannot be written to: HF_HUB_OFFLINE is set" in cli("push", compiled, "lab/x").sentence()
    assert pushed.requests == []


def test_unreachable_hub(pushed, cli, compiled, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    commit = fetch("lab/art")[1].commit
    for place, name in ((constants, "ENDPOINT"), (huggingface_hub.hf_api.api, "endpoint")):
        monkeypatch.setattr(place, name, "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match=f"the Hub cannot be reached; using the cached commit {commit[:12]}"):
        assert fetch("lab/art")[1].commit == commit
    assert "the Hub at http://127.0.0.1:9 cannot be reached, and no whole copy of lab/none" in cli("inspect", "lab/none").sentence()
    assert "the Hub at http://127.0.0.1:9 cannot be reached" in cli("push", compiled, "lab/x").sentence()


def test_disk_space(pushed, cli, monkeypatch, compiled, checkpoint, data_file, tmp_path):
    shutil.rmtree(pushed.cache, ignore_errors=True)
    usage = type(shutil.disk_usage("/"))(10**9, 10**9, 100)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    assert "lab/art in the Hub's cache needs 0.00 GB" in cli("inspect", "lab/art").sentence()
    arguments = ("--model", checkpoint, "--calib", data_file, "-o", tmp_path / "out")
    assert "the artifact needs 0.00 GB" in cli("compile", *arguments).sentence()
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage._replace(free=300_000))  # enough for the artifact alone
    monkeypatch.setattr(weights, "_device", lambda path: -1)  # another disk: hard links are impossible
    assert "a copy of the weights needs" in cli("compile", *arguments, "--with-weights").sentence()
    assert not (tmp_path / "out").exists()


def test_room_that_is_asked_for_is_enough_and_not_far_too_much(compiled):
    artifact = open_artifact(compiled)
    options = compiler.CompileOptions(model="m", calib="c", output=Path("o"))
    bound, size = compiler.sidecar_bytes(artifact.geometry, options), (compiled / "rotatek.safetensors").stat().st_size
    assert size - 10_000 < bound < 4 * size


def test_compile_with_weights(cli, checkpoint, data_file, small_run, page, tmp_path, compiled):
    ended = cli("compile", "--model", checkpoint, "--calib", data_file, "-o", tmp_path / "out", *small_run, "--with-weights")
    assert ended.code == 0, ended.err
    assert (tmp_path / "out" / "model.safetensors").samefile(checkpoint / "model.safetensors")  # linked, not copied
    assert "base model's, unchanged" in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "rotatek_config.json").read_text())
    moved = shutil.copytree(tmp_path / "out", tmp_path / "moved")
    config["base_model"]["id"] = "/gone"
    (moved / "rotatek_config.json").write_text(json.dumps(config))
    ended = cli("run", moved, "--image", page, *ASK)
    # the carried weights have the recorded fingerprint, so there is no warning
    assert (ended.code, ended.err) == (0, "") and json.loads(ended.out)["text"] == ask(cli, compiled, page)["text"]


def test_examples_of_the_documentation(server, cli, checkpoint, data_file, small_run, page, tmp_path, monkeypatch):
    """Every command and every line of Python in docs/hub.md, with a base model, data and documents that are here."""
    server.add("museum/base", {file.name: file.read_bytes() for file in checkpoint.iterdir()})
    monkeypatch.chdir(tmp_path)
    shutil.copy(page, tmp_path / "page.png")
    small = {"compile": small_run, "run": ("--max-new-tokens", 2, "--device", "cpu"), "eval": ("--max-new-tokens", 2, "--device", "cpu")}
    assert cli("compile", "--model", "museum/base", "--calib", data_file, "-o", "artifact", *small_run).code == 0
    blocks = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs" / "hub.md").read_text(encoding="utf-8"), re.DOTALL)
    commands = 0
    for language, block in blocks:
        if language == "python":
            exec(block, {"__name__": "example"})
            continue
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "eval":
                continue  # test_shell_completion
            words = [{"llava-next": "museum/base", "docvqa": str(data_file)}.get(word, word) for word in words]
            ended = cli(words[0].removeprefix("rotatek-"), *words[1:], *small.get(words[0].removeprefix("rotatek-"), ()))
            assert ended.code == 0, (line, ended.err)
            commands += 1
    assert commands == 11
    assert "| artifact |" in (tmp_path / "artifact" / "README.md").read_text()


def test_shell_completion():
    def complete(words, **settings):
        return subprocess.run([BIN / words[0]], env=os.environ | settings, capture_output=True, text=True).stdout

    assert "complete -o nosort -F" in complete(["rotatek"], _ROTATEK_COMPLETE="bash_source")
    asked = {"COMP_WORDS": "rotatek push --cr", "COMP_CWORD": "2", "_ROTATEK_COMPLETE": "bash_complete"}
    assert complete(["rotatek"], **asked) == "plain,--create-pr\n"
    asked = {"COMP_WORDS": "rotatek-run --rev", "COMP_CWORD": "1", "_ROTATEK_RUN_COMPLETE": "bash_complete"}
    assert complete(["rotatek-run"], **asked) == "plain,--revision\n"
