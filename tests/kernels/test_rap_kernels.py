"""The kernels for pruned attention against their specifications, in the interpreter, as machine code for sm_90, and on a GPU by hand."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rap_kernel_cases import brute_force, differing, narrow_error, narrow_inputs, pair_inputs

from kernel_caches import relative_error
from rotatek_compile.kernels import narrow, pairs
from rotatek_compile.kernels.decode_tuning import H100
from rotatek_compile.kernels.narrow_torch import narrow_attention_torch
from rotatek_compile.kernels.pairs_torch import turned

HERE = Path(__file__).parent
RUNNER = HERE.parent.parent / "tools" / "run_in_checkout.py"
INTERPRETED = re.findall(r'^    "([\w-]+)": \(', (HERE / "rap_kernel_cases.py").read_text(), re.MULTILINE)
COMPILED = re.findall(r'^    "([\w-]+)": \(', (HERE / "rap_compile_report.py").read_text(), re.MULTILINE)
HOPPER_SHARED_BYTES = 227 * 1024

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def lines_of(script, **environment):
    """What a script prints in a process of its own, by case, and its stderr."""
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, str(RUNNER), str(HERE / script)], env=own, capture_output=True, text=True, timeout=600)
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())} | {"stderr": done.stderr}


@pytest.fixture(scope="module")
def interpreted():
    return lines_of("rap_kernel_cases.py", TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="module")
def compiled():
    return lines_of("rap_compile_report.py")


@with_triton
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(interpreted, name):
    assert name in interpreted, interpreted["stderr"][-2000:]
    assert interpreted[name]["error"] <= interpreted[name]["limit"]


@with_triton
@pytest.mark.parametrize("name", COMPILED)
def test_machine_code(compiled, name):
    assert name in compiled, compiled["stderr"][-2000:]
    report = compiled[name]
    assert report.get("stack", 0) == 0 and report["shared_bytes"] < HOPPER_SHARED_BYTES, report
    if name.startswith("pairs"):
        assert report["fused"] == 0, report  # a fused product is not rounded, so it is not torch's
        if "m40" in name and "one-token" not in name or "m32" in name:  # whole 16 bytes
            assert report["wide_stores"] == report["stores"] > 0 and report["registers"] <= 128, report
    if name.startswith("split"):
        assert report["cp_async_bytes"] == [16] and report["mma"] > 0 and report["wgmma"] == 0, report
        assert report["loads_in_loops"] == 0, report
        if name.endswith("-g4"):  # the three programs on a multiprocessor that splits are counted for
            assert H100.programs * (report["shared_bytes"] + 1024) <= HOPPER_SHARED_BYTES, report
            assert H100.programs * 128 * report.get("registers", 0) <= 1 << 16, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_turns_by_its_own_angle(dtype):
    """Two heads, one pair each, by hand: a quarter turn of pair 1 for the first, half a turn of pair 0 for the second."""
    cos, sin = torch.tensor([[[-1.0, 0, -1, 0]]], dtype=dtype), torch.tensor([[[0.0, 1, 0, 1]]], dtype=dtype)
    x = torch.tensor([[[2.0, 3, 5, 7]]], dtype=dtype)
    assert turned(x, cos, sin, torch.tensor([[1], [0]])).tolist() == [[[-3, 2, -5, -7]]]


@pytest.mark.parametrize(("new", "stored"), [(1, 1), (1, 70), (3, 70), (4, 4)])
def test_the_specification_is_attention(new, stored):
    q, keys, values, scaling = narrow_inputs(2, 2, 3, new, stored, 24, 40, torch.float32)
    found = narrow_attention_torch(q, keys, values, scaling)
    assert found.shape == (2, new, 6, 40) and found.is_contiguous()
    assert relative_error(found, brute_force(q, keys, values, scaling)) < 1e-6


@pytest.mark.parametrize(
    ("stored", "splits", "expected"),
    [
        (1, 50, (1, 64)),
        (511, 50, (1, 512)),
        (512, 50, (2, 256)),
        (65536, 50, (49, 1344)),  # 1310.7 tokens each, whole tiles of 64
        (65537, 50, (49, 1344)),
        (8192, 6, (6, 1408)),
        (1602, 8, (6, 320)),
    ],
)
def test_splits_are_whole_tiles_and_none_is_empty(stored, splits, expected):
    count, tokens = narrow.cut(stored, splits, 64)
    assert (count, tokens) == expected and (count - 1) * tokens < stored <= count * tokens


def test_a_growing_cache_compiles_nothing_anew():
    """Values of 88 channels: strides are multiples of 16 for even lengths only, and of 8 for all."""
    seen = set()
    for stored in range(3000, 3033):
        q, keys, values, _ = narrow_inputs(1, 2, 4, 1, stored, 80, 88, torch.float16)
        seen.add(narrow.launch(q, keys, values).compiled)
        assert narrow.launch(q, keys, values).unit == 8
    assert len(seen) == 1


def test_refusals_name_the_reason():
    q, keys, values, _ = narrow_inputs(1, 2, 4, 1, 9, 16, 24, torch.float16)
    assert narrow.supported(q, keys, values) is None
    assert "5 new tokens exceed 4" in narrow.supported(torch.randn(1, 8, 5, 16).half(), keys, values)
    assert "do not fit" in narrow.supported(q, keys[..., :8], values) and "do not fit" in narrow.supported(q, keys[:, :, :4], values)
    assert "dtypes" in narrow.supported(q, keys.float(), values)
    assert "exceed 256" in narrow.supported(q, keys, torch.randn(1, 2, 9, 264).half())
    assert "one behind the other" in narrow.supported(q, keys.transpose(1, 2).contiguous().transpose(1, 2), values)
    with pytest.raises(ValueError, match="use narrow_torch"):
        narrow.narrow_attention(q, keys.float(), values, 1.0)
    q, k, cos, sin, kept = pair_inputs(2, 3, 2, 2, 4, 16, torch.float16)
    assert pairs.supported(q, k, cos, sin, kept) is None and pairs.supported(q, k, cos[:1], sin[:1], kept) is None
    assert "dtypes" in pairs.supported(q, k, cos.float(), sin.float(), kept)
    assert "not of the tokens" in pairs.supported(q, k, cos[:, :2], sin[:, :2], kept)
    assert "not heads of 8 channels" in pairs.supported(q, k[..., :8], cos, sin, kept)
    assert "not contiguous" in pairs.supported(q, k, cos, sin, kept[:, [0, 1, 2, 3, 0]][:, :4])
    with pytest.raises(ValueError, match="use pairs_torch"):
        pairs.turn(q, k.float(), cos, sin, kept)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, 1, 8, 4, 40, 128), (8, 1, 8, 4, 44, 128), (2, 4, 2, 7, 3, 16), (2, 777, 8, 4, 48, 128), (1, 65, 1, 8, 33, 96)]
)
def test_pairs_on_a_gpu(shape, dtype):
    for strided in (False, True):
        assert differing(*shape, dtype, device="cuda", strided=strided) == 0


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 3e-3), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "shape", [(1, 8, 4, 1, 5000, 80, 96), (8, 8, 4, 1, 601, 88, 88), (2, 2, 7, 3, 1602, 64, 112), (2, 1, 8, 4, 3001, 96, 80)]
)
def test_narrow_on_a_gpu(shape, dtype, limit):
    assert narrow_error(*shape, dtype, device="cuda", spare=5) < limit


@pytest.mark.gpu
@on_a_gpu
def test_narrow_in_a_cuda_graph():
    """A replay reads what the tensors hold then."""
    q, keys, values, scaling = narrow_inputs(2, 8, 4, 1, 3000, 80, 96, torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        narrow.narrow_attention(q, keys, values, scaling)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = narrow.narrow_attention(q, keys, values, scaling)
    for _ in range(2):
        q.normal_()
        graph.replay()
        assert relative_error(out, brute_force(q, keys, values, scaling)) < 1e-2


@pytest.mark.gpu
@on_a_gpu
def test_a_cache_of_more_than_2_to_the_31_numbers():
    q, keys, values, scaling = narrow_inputs(1, 1, 4, 1, 300, 80, 96, torch.bfloat16, device="cuda")
    far = torch.zeros(4, 1, 8_000_000, 96, dtype=torch.bfloat16, device="cuda")  # 6 GB, the last sequence beyond 2**31
    far[3, :, :300] = values[0]
    wide = far[..., :300, :]
    found = narrow.narrow_attention(q.expand(4, -1, -1, -1), keys.expand(4, -1, -1, -1), wide, scaling)
    assert relative_error(found[3:], brute_force(q, keys, values, scaling)) < 1e-2
