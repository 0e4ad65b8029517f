"""Compile the decode kernels for sm_90 without a GPU and print what the machine code does, as one JSON line per configuration.

Run in its own process, because Triton cannot both interpret and compile in one: `python compile_report.py NAME...`
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rotatek_compile.kernels import decode_kernels
from rotatek_compile.kernels.decode import config

CASES = {  # name: (G, T, D, RANK_TILE, two_part_query, has_dense)
    "g4-d128-r32": (4, 1, 128, 32, False, False),
    "g4-d128-r32-two-part": (4, 1, 128, 32, True, False),
    "g4-d128-r16-dense": (4, 1, 128, 16, False, True),
    "g7-d128-r128": (7, 1, 128, 128, False, True),
    "g4-d128-window-only": (4, 1, 128, 0, False, False),
    "g1-d64-r64": (1, 1, 64, 64, False, True),
    "g3-t5-d96-r64": (3, 5, 96, 64, False, True),
    "g8-t8-d256-r256": (8, 8, 256, 256, False, True),
}


def split_source(case: str, tiles=None) -> tuple[ASTSource, dict]:
    """The split kernel of a case as Triton's compiler takes it, pointers and strides 16-aligned as at run time."""
    group, new, dim, rank_tile, two_part, has_dense = CASES[case]
    rows = max(16, 1 << (new * group - 1).bit_length())
    tiles = tiles or config(rank_tile, dim, 2, has_dense, rows)
    power = 1 << (dim - 1).bit_length()
    constants = {
        "HEADS": 8, "G": group, "T": new, "D": dim, "DP": power, "M": rows,
        "RANK_TILE": rank_tile, "BLOCK_N": tiles.block_n, "STAGES": tiles.stages, "DENSE_BLOCK_N": tiles.dense_block_n,
        "DENSE_STAGES": tiles.dense_stages, "TWO_PART": two_part, "UPCAST": False, "PRECISION": "tf32",
    }  # fmt: skip
    types = {
        "records": "*i64", "means": "*fp32", "window_lengths": "*i32", "part_m": "*fp32", "part_l": "*fp32", "part_acc": "*fp32",
        "scale": "fp32", **dict.fromkeys(("stride_qb", "stride_qh", "stride_qt", "stride_wb", "stride_wh"), "i32"),
    }  # fmt: skip
    kernel = decode_kernels.split_kernel
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name] not in ("constexpr", "fp32")}
    return ASTSource(kernel, signature, constexprs=constants, attrs=aligned), {"num_warps": tiles.warps}


def report(case: str, tiles=None) -> dict:
    source, options = split_source(case, tiles)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)", ptx)
    return {
        "case": case,
        "cp_async_bytes": sorted({int(c, 0) for c in copies}),
        "cp_async_count": len(copies),
        "scalar_b16_loads": len(re.findall(r"ld\.global[.\w:]*\.b16", ptx)),
        "mma": len(re.findall(r"mma\.sync", ptx)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "shared_bytes": compiled.metadata.shared,
        **resources(compiled.asm["cubin"]),
    }


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
