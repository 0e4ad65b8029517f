"""The Triton kernels in the interpreter, against float64; pools and windows carry NaN wherever nothing is stored.

The cases are in `interpreter_cases.py`, which runs in two processes of its own: the interpreter is chosen at import.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
RUNNER = HERE.parent.parent / "tools" / "run_in_checkout.py"
NAMES = re.findall(r'^    "([\w-]+)": \(', (HERE / "interpreter_cases.py").read_text(), re.MULTILINE)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def results():
    command = [sys.executable, str(RUNNER), str(HERE / "interpreter_cases.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    halves = [NAMES[0::2], NAMES[1::2]]
    running = [subprocess.Popen([*command, *h], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for h in halves]
    found = {}
    for process in running:
        out, err = process.communicate(timeout=600)
        found.update({line["case"]: line for line in map(json.loads, out.splitlines())})
        found.setdefault("stderr", "")
        found["stderr"] += err
    return found


@pytest.mark.parametrize("name", NAMES)
def test_matches_float64(results, name):
    assert name in results, results["stderr"]
    assert results[name]["error"] < results[name]["limit"]


def test_refusals_name_the_reason():
    """On the CPU without the interpreter nothing is launched, and the caller learns why."""
    from kernel_caches import random_cache
    from rotatek_compile.kernels import decode

    cache = random_cache([[[("coded", 9, 8)]]], [3], 64, 8, torch.float32)
    q = torch.randn(1, 4, 1, 64)
    assert "tensors are on cpu" in decode.supported(q, cache.view)
    assert "exceed 64 rows" in decode.supported(torch.randn(1, 4, 17, 64), cache.view)
    assert "queries are torch.float16" in decode.supported(q.half(), cache.view)
    assert "no multiple" in decode.supported(q, random_cache([[[("empty", 0, 0)]] * 3], [3], 64, 8, torch.float32).view)
    assert "head_dim 32" in decode.supported(torch.randn(1, 4, 1, 32), cache.view)
    with pytest.raises(ValueError, match="no Triton decode attention: tensors are on cpu"):
        decode.decode_attention(q, cache.view, 1.0)
