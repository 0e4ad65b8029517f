"""Where a step's time goes: kernels by their names, time that counts once, and parts that add up to the step."""

import pytest
import step_parts
import torch
from measuring import read_csv
from step_parts import IDLE, OTHER, PARTS, Profiled, main, part_of, parted, printed

from rotatek_compile.errors import UsageError

NAMES = {
    "attention, merge": ["merge_kernel", "void pytorch_flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<128, 64>>"],
    "attention": [
        "split_kernel",
        "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4, cutlass::bfloat16_t>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_cga1x1x1_kernel0_0",
        "aten::scaled_dot_product_attention",
    ],
    "matrix products": [
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16>",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>",
        "aten::linear",
        "aten::bmm",
    ],
    "copies by the driver": ["Memcpy DtoD (Device -> Device)", "Memset (Device)"],
    "RoPE, norms, elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float>>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps>>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2>>",
        "aten::mul",
        "aten::mm_out_of_nothing",
        "_rms_norm_forward_kernel",  # of liger-kernel, as the next two
        "_triton_rope",
        "_swiglu_forward_kernel",
    ],
    OTHER: ["pack_kernel", "ncclDevKernel_AllReduce"],
}


def test_names_of_kernels():
    assert NAMES.keys() == {*PARTS, OTHER}
    for part, names in NAMES.items():
        assert {name: part_of(name) for name in names} == dict.fromkeys(names, part)


def test_time_counts_once():
    """Two steps: a product of 100 us, a split of 200 whose merge begins in it and ends 50 later, one kernel inside another, a gap."""
    events = [("merge_kernel", 250, 350), ("split_kernel", 100, 300), ("aten::linear", 0, 100), ("aten::addmm", 10, 90)]
    events += [("aten::mul", 1000, 1030), ("aten::add", 1030, 1040), ("aten::mul", 1030, 1035)]
    found = parted(events, 2)
    got = {part: (one["part_ms"], one["launches"], one["largest"]) for part, one in found.items() if one["launches"]}
    assert got == {
        "attention, merge": (pytest.approx(0.025), 0.5, "merge_kernel"),
        "attention": (pytest.approx(0.1), 0.5, "split_kernel"),
        "matrix products": (pytest.approx(0.05), 0.5, "aten::linear"),
        "RoPE, norms, elementwise": (pytest.approx(0.02), 1, "aten::mul"),
    }
    assert found.keys() == NAMES.keys() and found[OTHER] == {"part_ms": 0, "launches": 0, "largest": ""}


def test_small_run(tmp_path, capsys):
    """On a CPU: products and attention of every layer, parts that add up to what the steps took, and a file that prints the same."""
    file = tmp_path / "parts.csv"
    assert main(["--small", "--models", "llava-next-mistral-7b", "--steps", "2", "--output", str(file)]) == 0
    out, rows = capsys.readouterr().out, read_csv(file)
    caches = ["dense, captured", "ours K 16x8, V 32x8, captured"]
    assert [(row["cache"], row["part"]) for row in rows] == [(cache, part) for cache in caches for part in NAMES]
    dense = {row["part"]: row for row in rows[:6]}
    # three layers of seven products each, and the head; one attention per layer
    assert (dense["matrix products"]["launches"], dense["matrix products"]["largest"]) == ("22", "aten::linear")
    assert (dense["attention"]["launches"], dense["attention"]["largest"]) == ("3", "aten::scaled_dot_product_attention")
    assert [dense[part]["launches"] for part in ("attention, merge", "copies by the driver", OTHER)] == ["0"] * 3
    for cache in caches:
        mine = [row for row in rows if row["cache"] == cache]
        spent = sum(float(row["part_ms"]) for row in mine)
        assert 0 < spent < 20 * float(mine[0]["step_ms"]) and len({row["step_ms"] for row in mine}) == 1
    assert main(["--print", str(file)]) == 0 and capsys.readouterr().out == out
    with pytest.raises(UsageError, match="a point needs a batch here"):
        main(["--points", "fullx64"])


def test_the_models_of_another_package(monkeypatch, capsys):
    """--liger replaces parts before a model is made, and its rows say so; without the package a sentence does."""
    seen = []
    monkeypatch.setattr(step_parts, "random_model", lambda config, device: seen.append("made") or torch.nn.Linear(1, 1))
    monkeypatch.setattr(step_parts, "fused", lambda title: seen.append(title) or f"{title}, liger-kernel")
    monkeypatch.setattr(step_parts, "profiled", lambda name, *_: [{"model": name}])
    monkeypatch.setattr(step_parts, "show_table", lambda options, measure, _: print(*(row["model"] for row in measure(options))))
    ask = ["--small", "--models", "qwen3-vl-4b"]
    monkeypatch.setattr(step_parts, "find_spec", lambda name: name == "liger_kernel")
    assert main(ask) == 0 and seen == ["made"] and capsys.readouterr().out == "qwen3-vl-4b\n"
    seen.clear()
    assert main([*ask, "--liger"]) == 0 and seen == ["qwen3-vl-4b", "made"]
    assert capsys.readouterr().out == "qwen3-vl-4b, liger-kernel\n"
    monkeypatch.setattr(step_parts, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--liger needs the package liger-kernel"):
        main([*ask, "--liger"])


def test_table_adds_up():
    row = {"device": "a GPU", "torch": "2", "transformers": "5", "model": "m", "point": "2x64", "batch": 2, "tokens": 64}
    rows = []
    for cache, step, spent in (("dense", "4", (0.5, 1.25, 2)), ("ours", "3", (1, 0.25, 1.5))):
        for part, ms in zip(("attention", "matrix products", OTHER), spent, strict=True):
            rows.append(row | {"cache": cache, "step_ms": step, "part": part, "part_ms": ms, "launches": "2.0", "largest": "x"})
    assert printed(rows).splitlines()[2:] == [
        "m, B 2, T 64",
        "",
        "| | dense | ours |",
        "|---|---|---|",
        "| attention | 0.50 (2) | 1.00 (2) |",
        "| matrix products | 1.25 (2) | 0.25 (2) |",
        "| other | 2.00 (2) | 1.50 (2) |",
        f"| {IDLE} | 0.25 | 0.25 |",
        "| step | 4.00 | 3.00 |",
    ]


def test_a_profiler_that_sees_nothing_is_said(monkeypatch):
    class Blind:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            return []

    monkeypatch.setattr(step_parts, "profile", Blind)
    bench = Profiled.__new__(Profiled)
    bench.device, bench.found = torch.device("cpu"), []
    with pytest.raises(UsageError, match="saw no kernel"):
        bench.clock(lambda number: None, 1, 1)
