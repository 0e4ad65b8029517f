"""The machine code for sm_90, compiled without a GPU: the cliffs of kernels.md section 4 must not come back.

A rank whose multiple-of-8 the compiler cannot see turns 16-byte asynchronous copies into 2-byte loads, five times slower.
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
NAMES = re.findall(r'^    "([\w-]+)": \(', (HERE / "kernel_compile_report.py").read_text(), re.MULTILINE)
HOPPER_SHARED_BYTES = 227 * 1024

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
    assert report["cp_async_bytes"] == [16], report
    assert report["cp_async_count"] > 0 and report["mma"] + report["wgmma"] > 0, report
    assert report["scalar_b16_loads"] == 0, report
    assert report["shared_bytes"] < HOPPER_SHARED_BYTES, report
    assert report.get("stack", 0) == 0, report
    if name.startswith("g4-d128-r32"):  # the headline case keeps four programs on a multiprocessor
        assert 4 * (report["shared_bytes"] + 1024) <= HOPPER_SHARED_BYTES, report
        assert report.get("registers", 0) <= 128, report
