"""Pushing, against a server of our own: what goes up, and every refusal in one sentence before any work."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

from rotatek_compile import compile_inputs, hub_push, weights
from rotatek_compile.errors import RotateKError
from rotatek_compile.hub import locate

_spec = importlib.util.spec_from_file_location("rotatek_hub_fixtures", Path(__file__).parents[1] / "hub_fixtures.py")
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
server, pushed = _shared.server, _shared.pushed
hub_server = _shared.hub_server


def test_pull_request(pushed, compiled, cli, tmp_path):
    repo = pushed.repos["lab/art"]
    before = repo.resolve("main")
    changed = shutil.copytree(compiled, tmp_path / "changed")
    (changed / "chat_template.jinja").write_text("{{ messages }}")
    ended = cli("push", changed, "lab/art", "--create-pr", "--json")
    said = json.loads(ended.out)
    assert said["pull_request"] == f"{pushed.endpoint}/lab/art/discussions/1" and repo.resolve("main") == before
    assert repo.files("refs/pr/1")["chat_template.jinja"] == b"{{ messages }}"
    assert (locate("lab/art@refs/pr/1")[0] / "chat_template.jinja").read_text() == "{{ messages }}"
    pushed.tokens[hub_server.READ] = hub_server.account("eve", "write")
    os.environ["HF_TOKEN"] = hub_server.READ  # monkeypatched by the fixture
    assert "no right to write to lab/art" in cli("push", changed, "lab/art").sentence()
    assert cli("push", changed, "lab/art", "--create-pr").code == 0 and repo.pull_requests == 2


def test_sidecar_into_the_repository_of_a_checkpoint(server, compiled, checkpoint, cli):
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()} | {"README.md": b"---\nlicense: mit\n---\nTheir card."}
    server.add("lab/model", files)
    assert "lab/model holds files but no artifact" in cli("push", compiled, "lab/model").sentence()
    assert cli("push", compiled, "lab/model", "--create-pr").code == 0
    proposed = server.repos["lab/model"].files("refs/pr/1")
    assert all(proposed[name] == data for name, data in files.items()) and "rotatek.safetensors" in proposed


def test_pushed_again(pushed, compiled, cli, tmp_path):
    repo = pushed.repos["lab/art"]
    again = cli("push", compiled, "lab/art")
    assert "holds this artifact already" in again.out and len(repo.commits) == 2
    repo.commit(repo.files() | {"spiece.model": b"old", "notes.txt": b"theirs", "config.json": b"{}"})
    assert cli("push", compiled, "lab/art").code == 0
    assert "spiece.model" not in repo.files() and repo.files()["notes.txt"] == b"theirs"
    other = shutil.copytree(compiled, tmp_path / "other")
    config = json.loads((other / "rotatek_config.json").read_text())
    config["base_model"]["fingerprint"] = "0" * 64
    (other / "rotatek_config.json").write_text(json.dumps(config))
    assert "lab/art holds the weights of another base model; push --with-weights" in cli("push", other, "lab/art").sentence()


def test_weights_that_were_there_do_not_outlive_others(server, compiled, cli):
    """A whole file would be read before shards, and shards that nobody names change the fingerprint."""
    assert cli("push", compiled, "lab/whole", "--with-weights").code == 0
    repo, shards = server.repos["lab/whole"], {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}"}
    whole = repo.files()
    repo.commit(whole | shards | {"notes.txt": b"theirs", "other.safetensors": b"theirs"})
    assert cli("push", compiled, "lab/whole").code == 0 and shards.keys() <= repo.files().keys()  # weights are not this push's matter
    assert cli("push", compiled, "lab/whole", "--with-weights").code == 0
    assert repo.files() == whole | {"notes.txt": b"theirs", "other.safetensors": b"theirs"}


def test_only_known_files_and_no_local_path(server, compiled, checkpoint, data_file, cli, tmp_path):
    artifact = shutil.copytree(compiled, tmp_path / "artifact")
    for name in (".env", "notes.txt", "model.py", "pytorch_model.bin", "moments.safetensors"):
        (artifact / name).write_text("secret")
    (artifact / ".git").mkdir()
    (artifact / ".git" / "config").write_text("secret")
    ended = cli("push", artifact, "lab/clean", "--dry-run", "--json")
    assert json.loads(ended.out)["commit"] is None and "lab/clean" not in server.repos
    assert cli("push", artifact, "lab/clean").code == 0
    files = server.repos["lab/clean"].files()
    assert (
        set(files) == {".gitattributes", *(file.name for file in compiled.iterdir())} == {".gitattributes", *json.loads(ended.out)["files"]}
    )
    everything = b"\n".join(files.values()).decode("utf-8", "ignore")
    for path in (checkpoint, data_file, tmp_path, Path.home() / "x"):
        assert str(path) not in everything
    config = json.loads(files["rotatek_config.json"])
    assert (config["base_model"]["id"], config["calibration"]["data"]) == (checkpoint.name, data_file.name)
    assert "lab/clean" in files["README.md"].decode() and "THIS_DIRECTORY" not in files["README.md"].decode()


@pytest.mark.parametrize(
    ("file", "value", "words"),
    [
        ("tokenizer_config.json", {"name_or_path": str(Path(__file__).parent)}, "tokenizer_config.json holds the local path"),
        ("processor_config.json", {"token": "hf_" + "a" * 34}, "processor_config.json holds what looks like a Hub token"),
    ],
)
def test_secrets_in_edited_files(server, broken_artifact, cli, file, value, words):
    (broken_artifact / file).write_text(json.dumps(json.loads((broken_artifact / file).read_text()) | value))
    assert words in cli("push", broken_artifact, "lab/leak").sentence()
    assert "lab/leak" not in server.repos


@pytest.mark.parametrize(
    ("repo", "options", "token", "words"),
    [
        ("lab/x", (), None, "pushing to lab/x needs a token that can write; set HF_TOKEN, or run: hf auth login"),
        ("lab/x", (), "hf_" + "z" * 30, "the Hub does not accept the token"),
        ("lab/x", (), hub_server.READ, "the token of ada can only read"),
        ("nasa/x", (), hub_server.WRITE, "ada is no member of nasa, so nasa/x cannot be made; push to ada/x"),
        ("museum/x", (), hub_server.WRITE, "ada can only read in museum"),
        ("lab/x", ("--create-pr",), hub_server.WRITE, "there is no repository lab/x to open a pull request for"),
        ("lab/public", ("--private",), hub_server.WRITE, "lab/public exists and is public"),
        ("museum/theirs", (), hub_server.WRITE, "the token has no right to write to museum/theirs"),
    ],
)
def test_push_is_refused_before_any_work(server, compiled, checkpoint, data_file, cli, monkeypatch, tmp_path, repo, options, token, words):
    server.add("lab/public")
    server.add("museum/theirs")
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert words in cli("push", compiled, repo, *options).sentence()
    if "--create-pr" not in options:
        monkeypatch.setattr(compile_inputs, "load_model", None)  # work would begin with it
        told = cli("compile", "--model", checkpoint, "--calib", data_file, "-o", tmp_path / "out", "--push-to-hub", repo, *options)
        assert words in told.sentence() and not (tmp_path / "out").exists()
    assert set(server.repos) == {"lab/public", "museum/theirs"} and not server.called("POST", "commit")


def test_fine_grained_token(server, compiled, cli):
    token = server.tokens[hub_server.WRITE]["auth"]["accessToken"]
    token |= {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "lab"}, "permissions": ["repo.content.read"]}]}}
    assert "the fine-grained token of ada has no right to write" in cli("push", compiled, "lab/x").sentence()
    token["fineGrained"]["scoped"][0]["permissions"].append("repo.write")
    assert cli("push", compiled, "lab/x").code == 0


@pytest.mark.parametrize("repo", ["a/b/c", "lab/", "lab/a b", "", "lab/-x"])
def test_names_that_are_none(server, compiled, cli, repo):
    assert "is no name of a Hub repository" in cli("push", compiled, repo).sentence(2)
    assert server.requests == []


def test_short_name_is_of_the_own_account(server, compiled, cli):
    assert cli("push", compiled, "mine").code == 0 and "ada/mine" in server.repos


def test_push_options(server, compiled, tmp_path, cli):
    commit = "0" * 40
    assert f"--revision {commit} is a commit" in cli("push", compiled, "lab/x", "--revision", commit).sentence(2)
    assert "does not exist; pass the directory" in cli("push", tmp_path / "no", "lab/x").sentence()
    assert "is no artifact: it has no rotatek_config.json" in cli("push", tmp_path, "lab/x").sentence()
    assert "--private comes with --push-to-hub" in cli("compile", "--model", "tiny-llava-next", "--calib", "forms", "--private").sentence(2)


def test_damaged_artifact_is_not_pushed(server, broken_artifact, cli):
    data = bytearray((broken_artifact / "rotatek.safetensors").read_bytes())
    data[-1] ^= 1
    (broken_artifact / "rotatek.safetensors").write_bytes(data)
    assert "rotatek.safetensors" in cli("push", broken_artifact, "lab/x").sentence()
    assert "lab/x" not in server.repos


def test_weights_in_another_format(server, cli, checkpoint, data_file, tmp_path):
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    server.add("museum/old", files)
    arguments = ("--model", "museum/old", "--calib", data_file, "-o", tmp_path / "out", "--with-weights")
    assert "museum/old has no safetensors weights" in cli("compile", *arguments).sentence()


def test_failing_push_after_a_compilation_says_where_the_artifact_is(server, cli, checkpoint, data_file, small_run, tmp_path):
    server.broken = ("/lfs/", 507)
    arguments = ("--model", checkpoint, "--calib", data_file, "-o", tmp_path / "out", *small_run)
    said = cli("compile", *arguments, "--push-to-hub", "lab/late").sentence()
    assert "the Hub answered 507" in said and f"push it with: rotatek-push {tmp_path / 'out'} lab/late" in said
    server.broken = None
    assert cli("push", tmp_path / "out", "lab/late").code == 0


def test_sharded_and_missing_weights(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    with pytest.raises(RotateKError, match="has no model.safetensors and no model.safetensors.index.json"):
        weights.checkpoint_files(folder)
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name].contiguous() for name in own}, folder / shard, metadata={"format": "pt"})
    index = {"weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "rotatek.safetensors").touch()  # not of the checkpoint
    found = [file.name for file in weights.checkpoint_files(folder)]
    assert found == ["config.json", "model.safetensors.index.json", *shards]
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RotateKError, match="names model-00002-of-00002.safetensors, which is missing"):
        weights.checkpoint_files(folder)
    index["weight_map"][names[0]] = "../../etc/model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RotateKError, match="expected names like model-00001"):
        weights.checkpoint_files(folder)


def test_public_config_keeps_hub_ids():
    config = {"base_model": {"id": "org/base", "fingerprint": None}, "calibration": {"data": "org/data", "split": "train"}, "other": 1}
    assert hub_push.public_config(config) == config
