"""Compile the decode kernels for sm_90 without a GPU and print what the machine code does, as one JSON line per configuration.

Run in its own process, because Triton cannot both interpret and compile in one: `python kernel_compile_report.py NAME...`
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rotatek_compile.kernels import decode_kernels
from rotatek_compile.kernels.decode import Config, Widths, config
from rotatek_compile.kernels.slabs import Slabs

RAW, BOTH, KEYS, VALUES = (True, True), (False, False), (False, True), (True, False)  # (raw Keys, raw Values)


class Case(NamedTuple):
    """One layer: G, T, D, its widest slabs and which pairs of raw and coded sides it holds."""

    group: int
    new: int
    dim: int
    key: Slabs
    value: Slabs
    pairs: tuple[tuple[bool, bool], ...]
    two_part: bool = False
    native: str = "bf16"


NONE = Slabs()
CASES = {
    "g4-d128-r32": Case(4, 1, 128, Slabs(32), NONE, (KEYS,)),
    "g4-d128-r32-two-part": Case(4, 1, 128, Slabs(32), NONE, (KEYS,), True),
    "g7-d128-r128": Case(7, 1, 128, Slabs(128), NONE, (KEYS, RAW)),
    "g4-d128-window-only": Case(4, 1, 128, NONE, NONE, ()),
    "g3-t5-d96-r64": Case(3, 5, 96, Slabs(64), NONE, (KEYS, RAW)),
    "g8-t8-d256-r256": Case(8, 8, 256, Slabs(256), NONE, (KEYS, RAW)),
    "g4-d128-k8-v8": Case(4, 1, 128, Slabs(0, 64), Slabs(0, 128), (BOTH,)),
    "g4-d128-k4-v4": Case(4, 1, 128, Slabs(0, 0, 32), Slabs(0, 0, 128), (BOTH,)),
    "g4-d128-k4-v64x4": Case(4, 1, 128, Slabs(0, 0, 32), Slabs(0, 0, 64), (BOTH,)),
    "g8-t2-d128-k4-v4": Case(8, 2, 128, Slabs(0, 0, 32), Slabs(0, 0, 128), (BOTH,)),
    "g7-d128-k8-raw-values": Case(7, 1, 128, Slabs(0, 64), NONE, (KEYS,)),
    "g4-d128-mixed": Case(4, 1, 128, Slabs(0, 16, 48), Slabs(0, 16, 48), (BOTH,), True),
    "g4-d128-mixed-dense": Case(4, 1, 128, Slabs(0, 32, 64), Slabs(0, 32, 64), (BOTH, RAW), True),
    "g1-d64-three-slabs": Case(1, 1, 64, Slabs(16, 16, 32), Slabs(16, 16, 32), (BOTH, RAW), True),
    "g8-t4-d64-every-pair": Case(8, 4, 64, Slabs(16, 16, 32), Slabs(16, 16, 32), (BOTH, KEYS, VALUES, RAW), True),
    "g4-d128-k4-v4-fp16": Case(4, 1, 128, Slabs(0, 0, 32), Slabs(0, 0, 64), (BOTH,), True, "fp16"),
    "g4-d128-mixed-fp32": Case(4, 1, 128, Slabs(32, 0, 64), Slabs(0, 32, 64), (BOTH,), False, "fp32"),
}


def split_source(case: Case, tiles: Config | None = None) -> tuple[ASTSource, dict]:
    """The split kernel of a case as Triton's compiler takes it, pointers and strides 16-aligned as at run time."""
    rows = max(8, 1 << (case.new * case.group - 1).bit_length())
    widths = Widths.of(case.key, case.value, frozenset(case.pairs))
    tiles = tiles or config(widths, case.dim, 4 if case.native == "fp32" else 2, rows)
    constants = {
        "HEADS": 8, "G": case.group, "T": case.new, "D": case.dim, "DP": 1 << (case.dim - 1).bit_length(), "M": max(16, rows),
        "APART_M": rows, "APART": tiles.warps * tiles.apart, "APPEND": True, "EARLY": True,
        **widths.constants(), "BLOCK_N": tiles.block_n, "STAGES": tiles.stages, "DENSE_BLOCK_N": tiles.dense_block_n,
        "DENSE_STAGES": tiles.dense_stages, "TWO_PART": case.two_part, "UPCAST": False,
        "PRECISION": "tf32x3" if case.native == "fp32" else "tf32",
    }  # fmt: skip
    types = {
        "records": "*i64", "table": "*i64", "codes": "*u8", "scales": "*bf16", "means": "*fp32", "own_means": "*fp16",
        "window_lengths": "*i32", "part_m": "*fp32", "part_l": "*fp32", "part_acc": "*fp32",
        "scale": "fp32",
    }  # fmt: skip
    kernel = decode_kernels.split_kernel
    types |= {name: "i32" for name in kernel.arg_names if name.startswith("stride_")}
    signature = {name: "constexpr" if name in constants else types.get(name, "*" + case.native) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name] not in ("constexpr", "fp32")}
    return ASTSource(kernel, signature, constexprs=constants, attrs=aligned), {"num_warps": tiles.warps, "maxnreg": tiles.registers}


def compiled(name: str, tiles: Config | None = None) -> triton.compiler.CompiledKernel:
    """The kernel of a case for sm_90."""
    source, options = split_source(CASES[name], tiles)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def report(name: str, tiles: Config | None = None) -> dict:
    kernel = compiled(name, tiles)
    ptx = kernel.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)", ptx)
    return {
        "case": name,
        "cp_async_bytes": sorted({int(c, 0) for c in copies}),
        "cp_async_count": len(copies),
        "loads_in_loops": loads_in_loops(ptx),
        "mma": len(re.findall(r"mma\.sync", ptx)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "shared_bytes": kernel.metadata.shared,
        **resources(kernel.asm["cubin"]),
    }


def loads_in_loops(ptx: str) -> int:
    """Loads from global memory to registers between a label and a branch back to it: tiles that are not copied asynchronously."""
    lines = ptx.splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"(\$\w+):", line))}
    loops = set()
    for number, line in enumerate(lines):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        if branch and labels[branch[1]] < number:
            loops.update(range(labels[branch[1]], number))
    return sum("ld.global" in lines[number] for number in loops)


def resources(cubin: bytes) -> dict:
    """Registers and stack of the kernel, read by the cuobjdump that comes with Triton; empty if there is none."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"]) + int(usage.get("LOCAL", 0))}


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        print(json.dumps(report(name)), flush=True)
