"""Decoding with each of two real processes holding half of the KV heads: the tokens and logits of one process."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rotatek_compile.errors import RotateKError
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.models import bundled_path
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.prepared import PreparedArtifact
from rotatek_compile.runtime.tensor_parallel import Shard, shard_of

# loads the model as transformers distributes it, and does with it what the second argument says
WORKER = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig
from rotatek_compile.runtime.enable import enable
folder, job = sys.argv[1:]
job = torch.load(job, weights_only=False)
plan = DistributedConfig(tp_plan="auto", tp_size=2)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, distributed_config=plan).eval()
rank = torch.distributed.get_rank()
found = []
try:
    for artifact in job["artifacts"]:
        with enable(model, artifact):
            out = model.generate(**job["inputs"], **job["options"])
        layer = out.past_key_values.layers[0]
        found.append((out.sequences, torch.stack(out.logits, 1), layer.store.heads, layer.prepared.plan))
except Exception as error:
    found = f"{type(error).__name__}: {error}"
torch.save(found, f"{sys.argv[2]}.{rank}")
torch.distributed.destroy_process_group()
"""
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True, "output_logits": True}
RAW = Slabs(32)
PLAN = [  # every head another number of directions at other precisions, of the Values too
    [HeadPlan(Slabs(8), RAW), HeadPlan(Slabs(8, 8, 16), Slabs(0, 16))],
    [HeadPlan(RAW, Slabs(0, 8, 16)), HeadPlan(Slabs(0, 16), RAW)],
    [HeadPlan(Slabs(), Slabs(8)), HeadPlan(Slabs(16), Slabs(0, 0, 32))],
]


def in_two_processes(folder, job, tmp_path):
    torch.save(job, tmp_path / "job")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), str(tmp_path / "job")],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    return [torch.load(tmp_path / f"job.{rank}", weights_only=False) for rank in range(2)]


def test_two_processes_decode_what_one_decodes(model, ragged, make_artifact, tmp_path):
    model.save_pretrained(tmp_path / "model")
    whole, half, stock = make_artifact(), make_artifact(plan=PLAN), model.generate(**ragged, **OPTIONS)
    expected = []
    for artifact in (whole, half):
        with enable(model, artifact):
            expected.append(model.generate(**ragged, **OPTIONS))
    assert torch.equal(expected[0].sequences, stock.sequences)
    assert (torch.stack(expected[0].logits, 1) - torch.stack(expected[1].logits, 1)).abs().max() > 0.1  # the cut shows
    results = in_two_processes(tmp_path / "model", {"artifacts": [whole, half], "inputs": ragged, "options": OPTIONS}, tmp_path)
    for rank, found in enumerate(results):
        assert not isinstance(found, str), found
        for n, (sequences, logits, heads, plan) in enumerate(found):
            assert torch.equal(sequences, expected[n].sequences), (rank, n)
            assert (logits - torch.stack(expected[n].logits, 1)).abs().max() < 1e-4
            assert (heads, plan) == (1, ((HeadPlan(RAW, RAW),), (PLAN[0][rank],))[n])  # its own head and nothing else


def test_a_model_without_a_plan_is_refused(ragged, make_artifact, tmp_path):
    """transformers has no plan for Qwen3-VL: each process would silently hold all heads."""
    from rotatek_compile.geometry import geometry_of
    from rotatek_compile.models import load_config, resolve

    artifact = make_artifact(shape=geometry_of(load_config(resolve("tiny-qwen3-vl"))))
    results = in_two_processes(bundled_path("tiny-qwen3-vl"), {"artifacts": [artifact], "inputs": {}, "options": {}}, tmp_path)
    words = "RotateKError: Qwen3VLForConditionalGeneration has no tensor-parallel plan for its attention, so each of the 2 processes"
    assert [result[: len(words)] for result in results] == [words, words]


def model_of(*placements, kv_heads=2, layers=2):
    """Attention modules whose Key projections are split as `placements` says: (rank, parts) each."""

    def weight(rank, parts):
        mesh = SimpleNamespace(size=lambda dimension: parts, get_local_rank=lambda dimension: rank)
        return SimpleNamespace(placements=(SimpleNamespace(is_shard=lambda dim: dim == 0),), device_mesh=mesh)

    made = nn.Module()
    made.layers = nn.ModuleList()
    for index, (rank, parts) in enumerate(placements):
        attention = nn.Module()
        attention.layer_idx = index
        object.__setattr__(attention, "k_proj", SimpleNamespace(weight=weight(rank, parts)))
        made.layers.append(attention)
    layer = LayerGeometry(layer_type="full_attention", query_heads=2 * kv_heads, kv_heads=kv_heads, head_dim=8)
    return made, Geometry(model_type="x", layers=(layer,) * len(placements), visual_token_ids=(5,))


def test_whose_heads():
    assert shard_of(*model_of((0, 1), (0, 1))) == Shard()
    assert shard_of(*model_of((1, 2), (1, 2))) == Shard(1, 2)
    assert [Shard(rank, 4).heads(8) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    with pytest.raises(RotateKError, match="has 2 KV heads in layer 0, which 4 processes cannot share; use a number of processes that"):
        shard_of(*model_of((1, 4), (1, 4)))
    with pytest.raises(RotateKError, match="no tensor-parallel plan"):
        shard_of(*model_of((1, 2), (0, 1)))  # one layer only is split
    whole, geometry = model_of((0, 1), (0, 1))
    whole.tp_size = 2
    with pytest.raises(RotateKError, match="each of the 2 processes holds all of it"):
        shard_of(whole, geometry)


def test_a_part_is_its_heads_of_the_whole(make_artifact):
    artifact = make_artifact(plan=PLAN)
    whole = PreparedArtifact(artifact).layer(1, torch.device("cpu"), torch.float32)
    for rank in range(2):
        part = PreparedArtifact(artifact, Shard(rank, 2)).layer(1, torch.device("cpu"), torch.float32)
        assert (part.plan, part.geometry.kv_heads, part.geometry.query_heads) == ((whole.plan[rank],), 1, 2)
        for mine, all_ in zip(part.kinds["visual"].sides, whole.kinds["visual"].sides, strict=True):
            for name in ("encode", "decode", "spectrum", "mean", "balance"):
                assert torch.equal(getattr(mine, name), getattr(all_, name)[rank : rank + 1]), name
            assert (mine.slabs, mine.expected, mine.number) == ((all_.slabs[rank],), (all_.expected[rank],), all_.number)
        # two shared matrices, of Keys and of Values, one head of each
        assert torch.equal(part.bases.view(2, 1, 32, 32), whole.bases.view(2, 2, 32, 32)[:, rank : rank + 1])
        assert torch.equal(part.means.view(2, 1, 32), whole.means.view(2, 2, 32)[:, rank : rank + 1])
    with pytest.raises(RotateKError, match="rivals need all heads"):
        PreparedArtifact(artifact, Shard(0, 2)).plain_layer(0)


def test_the_command_under_torchrun(model, checkpoint, compiled, tmp_path):
    """rotatek-run in two processes says once what it says in one."""
    from PIL import Image

    Image.linear_gradient("L").convert("RGB").resize((90, 60)).save(tmp_path / "page.png")
    words = ["rotatek-run", str(compiled), "--image", str(tmp_path / "page.png"), "--prompt", "What?", "--max-new-tokens", "6", "--quiet"]
    folder = os.path.dirname(sys.executable)  # noqa: PTH120
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    alone, both = (
        subprocess.run([*start, os.path.join(folder, words[0]), *words[1:]], env=environment, capture_output=True, text=True, timeout=120)  # noqa: PTH118
        for start in ([], launcher)
    )
    assert (alone.returncode, both.returncode) == (0, 0), both.stderr
    assert both.stdout == alone.stdout != ""
