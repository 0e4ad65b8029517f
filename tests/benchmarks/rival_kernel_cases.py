"""The rivals' kernels in Triton's interpreter, or compiled for sm_90 without a GPU: one JSON line per case. Run in its own process.

TRITON_INTERPRET=1 python rival_kernel_cases.py            # largest relative error of each case
python rival_kernel_cases.py compile                       # bytes of machine code of each kind at the tiles that are timed
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import rival_kernels  # noqa: E402
from bench_rival_speed import LAUNCHES  # noqa: E402
from rival_speed_cases import METHODS, coded, dense, drawn, expected  # noqa: E402

DIM = 64


def errors() -> None:
    """Tokens that fill no tile, splits without tokens, every kind."""
    for tokens, launch in ((96, rival_kernels.Launch(64, 4)), (160, rival_kernels.Launch(32, 2))):
        keys, values, query = drawn(2, tokens, "cpu", torch.float32, DIM)
        cases = {
            f"{name} {kept}": coded(name, kept, keys, values, query)
            for name in METHODS
            for kept in (16, 32)
            if "kivi" not in name or kept == 16
        }
        found = {name: (stored, segment.rebuild) for name, (stored, segment) in cases.items()}
        found["dense"] = dense(keys, values), lambda keys=keys, values=values: (keys, values)
        for name, (stored, rebuild) in found.items():
            wanted = expected(query, rebuild)
            error = (rival_kernels.attention(query, stored, launch) - wanted).abs().max() / wanted.abs().max()
            print(json.dumps({"case": f"{name}, {tokens} tokens", "error": float(error)}))


def compiled() -> None:
    """Types as they are timed: bf16 numbers, uint8 codes, fp16 scales of kivi."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fp32 = dict.fromkeys(("part_m", "part_l", "part_acc", "scaling"), "*fp32") | {"scaling": "fp32"}
    for kind, kept, bits in (
        ("dense", 128, 4),
        ("think", 16, 4),
        ("spark-mean", 32, 4),
        ("spark-sign", 32, 4),
        ("kivi", 128, 4),
        ("kivi", 128, 2),
    ):
        types = dict.fromkeys(("q", "keys", "values", "size", "channel_size", "fill"), "*bf16")
        types |= (
            dict.fromkeys(("channels", "signs"), "*u8")
            | dict.fromkeys(("value_scale", "value_zero"), "*fp16")
            | fp32
            | {"S": "i32", "C": "i32", "splits": "i32"}
        )
        if kind == "kivi":
            types |= {"keys": "*u8", "values": "*u8", "size": "*fp16", "channel_size": "*fp16"}
        if kind == "think":
            types["channels"] = "*i32"
        for tile, warps in LAUNCHES:
            constants = {
                "G": 4,
                "D": 128,
                "WIDTH": kept if kind == "think" else 16,
                "KIND": kind,
                "BITS": bits,
                "TILE": tile,
                "ROWS": rival_kernels.ROWS,
            }
            names = rival_kernels.split_kernel.arg_names
            signature = {name: types.get(name, "constexpr") for name in names}
            source = ASTSource(fn=rival_kernels.split_kernel, signature=signature, constexprs=constants)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
            print(json.dumps({"case": f"{kind} {kept} {bits} {tile}", "bytes": len(made.asm["cubin"]), "shared": made.metadata.shared}))


if __name__ == "__main__":
    compiled() if sys.argv[1:] == ["compile"] else errors()
