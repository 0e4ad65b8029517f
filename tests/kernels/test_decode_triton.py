"""The Triton kernels in the interpreter, against float64; pools and windows carry NaN wherever nothing is stored.

The cases are in `interpreter_cases.py`, which runs in two processes of its own: the interpreter is chosen at import.
"""

import dataclasses
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
    from kernel_caches import EMPTY, Coded, Segment, random_cache
    from rotatek_compile.kernels import decode

    cache = random_cache([[[Segment(9, Coded(8), Coded(0, 0, 16))]]], [3], 64, 8, torch.float32)
    q = torch.randn(1, 4, 1, 64)
    assert "tensors are on cpu" in decode.supported(q, cache.view)
    assert "exceed 64 rows" in decode.supported(torch.randn(1, 4, 17, 64), cache.view)
    assert "exceed 32 rows over 8- and 4-bit codes" in decode.supported(torch.randn(1, 4, 9, 64), cache.view)
    assert "queries are torch.float16" in decode.supported(q.half(), cache.view)
    assert "no multiple" in decode.supported(q, random_cache([[[EMPTY]] * 3], [3], 64, 8, torch.float32).view)
    assert "head_dim 32" in decode.supported(torch.randn(1, 4, 1, 32), cache.view)
    beams = dataclasses.replace(cache.view, table=cache.view.table.expand(2, -1, -1, -1))
    assert "table must be contiguous" in decode.supported(q, beams)
    windows = cache.view.windows
    across = dataclasses.replace(cache.view, windows=windows.mT.contiguous().mT)
    assert across.windows.shape == windows.shape and "strides" in decode.supported(q, across)
    for name in ("windows", "bases", "own_bases"):
        other = dataclasses.replace(cache.view, **{name: getattr(cache.view, name).half()})
        assert "queries are torch.float32" in decode.supported(q, other)
    with pytest.raises(ValueError, match="no Triton decode attention: tensors are on cpu"):
        decode.decode_attention(q, cache.view, 1.0)


@pytest.mark.parametrize(("name", "dtype"), [("C_NIBBLES_BF16", torch.bfloat16), ("C_NIBBLES_FP16", torch.float16)])
def test_assembly_of_nibbles(name, dtype):
    """The instructions that no interpreter runs, carried out here: all sixteen levels, in order, from low and high halves."""
    from rotatek_compile.kernels import decode_sides

    text = getattr(decode_sides, name).value
    for first in range(0, 256, 4):
        packed = [first, first + 1, first + 2, first + 3]
        registers = execute(text, int.from_bytes(bytes(packed), "little"), dtype)
        words = b"".join(registers[f"${i}"].to_bytes(4, "little") for i in range(4))
        numbers = torch.frombuffer(bytearray(words), dtype=dtype).tolist()
        assert numbers == [(x & 15) - 8 for x in packed] + [(x >> 4) - 8 for x in packed]


@pytest.mark.parametrize("name", ["C_KEYS_4", "C_VALUES_4", "C_KEYS_8", "C_VALUES_8"])
def test_assembly_of_codes_to_fp16(name):
    """As above: every byte, at every place of a register. Keys are four bytes in a row; Values two tokens' pairs of bytes."""
    from rotatek_compile.kernels import decode_widen

    text, outputs = getattr(decode_widen, name).value, 4 if name.endswith("4") else 2
    for first in range(256):
        packed = [first, 255 - first, first * 7 % 256, first ^ 0x5A]
        registers = execute(text, int.from_bytes(bytes(packed), "little"), torch.float16, f"${outputs}")
        words = [registers[f"${i}"].to_bytes(4, "little") for i in range(outputs)]
        found = [torch.frombuffer(bytearray(word), dtype=torch.float16).tolist() for word in words]
        signed = [x - 256 * (x > 127) for x in packed]
        low, high = [(x & 15) - 8 for x in packed], [(x >> 4) - 8 for x in packed]
        expected = {
            "C_KEYS_4": [low[:2], low[2:], high[:2], high[2:]],
            "C_VALUES_4": [low[::2], high[::2], low[1::2], high[1::2]],
            "C_KEYS_8": [signed[:2], signed[2:]],
            "C_VALUES_8": [signed[::2], signed[1::2]],
        }
        assert found == expected[name]


def execute(text, argument, dtype, source="$4"):
    """The PTX instructions mov, and, xor, shr, prmt, lop3 and fma on 32-bit registers."""
    registers = {source: argument}

    def value(name):
        return int(name, 0) if name[0].isdigit() else registers[name]

    def halves(x):
        return torch.frombuffer(bytearray(x.to_bytes(4, "little")), dtype=dtype)

    for instruction in filter(None, (part.strip() for part in text.strip("{}\n ").replace("\n", " ").split(";"))):
        operation, _, operands = instruction.partition(" ")
        into, *names = operands.replace(" ", "").split(",")
        kind = operation.split(".")[0]
        if kind == "":  # .reg
            continue
        a, *more = map(value, names)
        if kind == "mov":
            result = a
        elif kind == "and":
            result = a & more[0]
        elif kind == "xor":
            result = a ^ more[0]
        elif kind == "lop3":
            results = [more[2] >> i & 1 for i in range(8)]  # of the bits a, b, c, a first
            places = range(32)
            bits = [results[(a >> i & 1) * 4 + (more[0] >> i & 1) * 2 + (more[1] >> i & 1)] for i in places]
            result = sum(bit << i for i, bit in zip(places, bits, strict=True))
        elif kind == "shr":
            result = a >> more[0]
        elif kind == "prmt":
            eight = a.to_bytes(4, "little") + more[0].to_bytes(4, "little")
            result = int.from_bytes(bytes(eight[more[1] >> 4 * i & 7] for i in range(4)), "little")
        else:
            assert kind == "fma", operation
            found = (halves(a).double() * halves(more[0]).double() + halves(more[1]).double()).to(dtype)
            result = int.from_bytes(found.view(torch.uint8).numpy().tobytes(), "little")
        registers[into] = result
    return registers
