"""Compile the kernels for pruned attention for sm_90 without a GPU and print what the machine code does, one JSON line per case.

Run in its own process, as kernel_compile_report.py, whose counts these are: `python rap_compile_report.py NAME...`
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from kernel_compile_report import loads_in_loops, resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rotatek_compile.kernels import narrow, narrow_kernels, pairs, pairs_kernels

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
CASES = {  # name: (kernel, its shape)
    "pairs-m40-g4": ("pairs", (4, 40, "bf16", False)),
    "pairs-m40-g4-one-token": ("pairs", (4, 40, "bf16", True)),
    "pairs-m44-g8": ("pairs", (8, 44, "fp16", False)),
    "pairs-m32-g7-fp32": ("pairs", (7, 32, "fp32", False)),
    "split-k80-v96-g4": ("split", (4, 1, 80, 96, "bf16")),
    "split-k96-v96-g4": ("split", (4, 1, 96, 96, "bf16")),
    "split-k88-v88-g4": ("split", (4, 1, 88, 88, "bf16")),
    "split-k64-v112-g4": ("split", (4, 1, 64, 112, "bf16")),
    "split-k128-v128-g8-t4": ("split", (8, 4, 128, 128, "bf16")),
    "split-k112-v64-g7": ("split", (7, 1, 112, 64, "fp16")),
    "split-k176-v256-g8-t4": ("split", (8, 4, 176, 256, "bf16")),
    "split-k80-v96-g4-fp32": ("split", (4, 1, 80, 96, "fp32")),
    "merge-v96": ("merge", (4, 1, 96, "bf16")),
}


def source(kernel: Any, constants: dict[str, Any], types: dict[str, str], native: str, loose: tuple[str, ...]) -> ASTSource:
    """A kernel as Triton's compiler takes it; pointers and numbers are multiples of 16 but for `loose` ones."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*" + native) for name in names}
    free = {*loose, *(name for name in names if signature[name] in ("constexpr", "fp32"))}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in free}
    return ASTSource(kernel, signature, constexprs=constants, attrs=aligned)


def pairs_source(group: int, count: int, native: str, few: bool) -> tuple[ASTSource, dict[str, Any]]:
    power = 1 << (count - 1).bit_length()
    constants = {"G": group, "PAIRS": count, "MP": power, "BLOCK_T": 1 if few else pairs.block_of(count), "SPREAD": few}
    kernel = pairs_kernels.pairs_kernel
    types = {name: "i32" for name in kernel.arg_names if name.startswith("stride_")} | {"pairs": "*i64", "tokens": "i32", "blocks": "i32"}
    built = source(kernel, constants, types, native, ("tokens", "blocks", "stride_cd", "stride_sd"))
    return built, dict(pairs.options(few))


def split_source(group: int, new: int, width: int, value: int, native: str) -> tuple[ASTSource, dict[str, Any]]:
    rows = group * new
    tiles = narrow.config(width, value, rows, SIZES[native])
    constants = {
        "HEADS": 8, "G": group, "T": new, "K": width, "V": value, "KN": narrow.tile(width), "VN": narrow.tile(value),
        "M": max(16, 1 << (rows - 1).bit_length()), "UNIT": 8, "BLOCK_N": tiles.dense_block_n, "STAGES": tiles.dense_stages,
        "EARLY": True, "UPCAST": False, "PRECISION": "tf32x3" if native == "fp32" else "tf32",
    }  # fmt: skip
    kernel = narrow_kernels.narrow_split_kernel
    numbers = ("stored", "per_split", "splits", *(name for name in kernel.arg_names if name.startswith("stride_")))
    types = dict.fromkeys(numbers, "i32") | dict.fromkeys(("part_m", "part_l", "part_acc"), "*fp32") | {"scale": "fp32"}
    loose = tuple(name for name in numbers if name not in ("stride_qh", "stride_qt"))
    return source(kernel, constants, types, native, loose), {"num_warps": tiles.warps}


def merge_source(group: int, new: int, value: int, native: str) -> tuple[ASTSource, dict[str, Any]]:
    constants = {"HEADS": 8, "G": group, "T": new, "V": value, "BLOCK_S": 64, "BLOCK_D": 32, "EARLY": True}
    kernel = narrow_kernels.narrow_merge_kernel
    types = dict.fromkeys(("splits", "stride_ob", "stride_oh", "stride_ot"), "i32")
    types |= dict.fromkeys(("part_m", "part_l", "part_acc"), "*fp32")
    return source(kernel, constants, types, native, ("splits",)), {"num_warps": 4}


def report(name: str) -> dict[str, Any]:
    kind, shape = CASES[name]
    built, options = {"pairs": pairs_source, "split": split_source, "merge": merge_source}[kind](*shape)
    kernel = triton.compile(built, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = kernel.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)", ptx)
    return {
        "case": name,
        "cp_async_bytes": sorted({int(c, 0) for c in copies}),
        "cp_async_count": len(copies),
        "loads_in_loops": loads_in_loops(ptx),
        "wide_stores": len(re.findall(r"st\.global\.v4\.b32", ptx)),
        "stores": len(re.findall(r"st\.global", ptx)),
        "fused": len(re.findall(r"\bfma\.", ptx)),
        "mma": len(re.findall(r"mma\.sync", ptx)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "shared_bytes": kernel.metadata.shared,
        **resources(kernel.asm["cubin"]),
    }


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        print(json.dumps(report(name)), flush=True)
