"""What tests of the Hub share: a server of our own, an artifact pushed there, and a run that is asked of it. Loaded by path."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("rotatek_hub_server", Path(__file__).parent / "hub_server.py")
hub_server = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = hub_server
_spec.loader.exec_module(hub_server)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub, a token that may write to `ada` and `lab`, and an empty cache; everything huggingface_hub reads points there."""
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants

    with hub_server.HubServer() as running:
        cache = tmp_path / "hub-cache"
        patches = {
            "ENDPOINT": running.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
            "HUGGINGFACE_HUB_CACHE": str(cache),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }
        for name, value in patches.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", running.endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # it keeps a client, and with it an endpoint
        monkeypatch.setenv("HF_TOKEN", hub_server.WRITE)
        running.cache = cache
        yield running


@pytest.fixture
def pushed(server, compiled, cli):
    """The artifact of a local checkpoint, as `lab/art` on the server."""
    assert cli("push", compiled, "lab/art").code == 0
    return server


def environment(server):
    """For a process of its own."""
    settings = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub_server.WRITE}
    return os.environ | settings | {"HF_HOME": str(server.cache), "OMP_NUM_THREADS": "1"}


ASK = ("--prompt", "What is it?", "--max-new-tokens", 3, "--device", "cpu", "--json")


def ask(cli, artifact, page, *more):
    ended = cli("run", artifact, "--image", page, *ASK, *more)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


@pytest.fixture
def page(data_file):
    return data_file.parent / "page1.png"
