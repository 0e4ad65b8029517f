"""The machine code for sm_90, compiled without a GPU: the cliffs of kernels.md section 4 must not come back.

A width whose multiple-of-8 the compiler cannot see turns asynchronous copies of 8 or 16 bytes into loads of single numbers, five times
slower.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUNNER = HERE.parent.parent / "tools" / "run_in_checkout.py"
NAMES = re.findall(r'^    "([\w-]+)": Case\(', (HERE / "kernel_compile_report.py").read_text(), re.MULTILINE)
HOPPER_SHARED_BYTES = 227 * 1024
# these may spill a little
FEW_REGISTERS_LEFT = {"g8-t4-d64-every-pair", "g4-d128-mixed-fp32", "g1-d64-three-slabs", "g4-d128-mixed-dense", "g4-d128-k8-v8"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def reports():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(RUNNER), str(HERE / "kernel_compile_report.py")]
    halves = [NAMES[0::2], NAMES[1::2]]
    running = [subprocess.Popen([*command, *h], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for h in halves]
    found = {"stderr": ""}
    for process in running:
        out, err = process.communicate(timeout=600)
        found.update({line["case"]: line for line in map(json.loads, out.splitlines())})
        found["stderr"] += err
    return found


@pytest.mark.parametrize("name", NAMES)
def test_machine_code(reports, name):
    assert name in reports, reports["stderr"]
    report = reports[name]
    coded = "-k" in name or "mixed" in name or "slabs" in name or "pair" in name
    # Rows of numbers are whole 16 bytes, those of codes whole 8; in fp32 tiles are so small that a thread fetches fewer.
    assert set(report["cp_async_bytes"]) <= {16, *([8] if coded else []), *([4] if name.endswith("fp32") else [])}, report
    assert report["cp_async_count"] > 0 and report["mma"] + report["wgmma"] > 0, report
    assert report["loads_in_loops"] == 0, report
    # Instructions of a group of warps gave wrong results with codes (Triton 3.6 on an H100).
    assert not (coded and report["wgmma"]), report
    assert report["shared_bytes"] < HOPPER_SHARED_BYTES, report
    assert report.get("stack", 0) <= (128 if name in FEW_REGISTERS_LEFT else 0), report
    if name.startswith("g4-d128-r32"):  # what the README's figures are of: four programs on a multiprocessor
        assert 4 * (report["shared_bytes"] + 1024) <= HOPPER_SHARED_BYTES, report
        assert report.get("registers", 0) <= 128, report
    if name.startswith("g4-d128-") and coded and not name.endswith("fp32"):  # three of these
        assert 3 * (report["shared_bytes"] + 1024) <= HOPPER_SHARED_BYTES, report
        assert report.get("registers", 0) <= 168, report
    if name in ("g4-d128-k4-v64x4", "g4-d128-k4-v4-fp16"):  # and four
        assert 4 * (report["shared_bytes"] + 1024) <= HOPPER_SHARED_BYTES and report.get("registers", 0) <= 128, report
