"""Whole steps: caches hold what a row says, the dense baseline attends like transformers' cache, and ratios are those of the figures."""

import argparse
import sys
import time
import types

import bench_steps
import pytest
import step_loops
import torch
from bench_full_size import llava_next, random_model
from bench_steps import Saved, point_of, qwen3_vl_4b, row_bytes, row_of
from print_decode import read
from step_caches import DENSE, FixedLayer, artifact_of, dense_attention, fill_many, fill_ours, random_kv
from step_loops import Bench, NotCapturedError, TooLongError, at_most
from step_tables import reached, steps_table
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3_vl import modeling_qwen3_vl

from rotatek_compile.geometry import geometry_of
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.table import KEY, KIND, LENGTH, OFFSET, Kind
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.enable import enable
from rotatek_compile.text_attention import attended_by

PLAN = ((0, 16, 0), (0, 32, 0))


@pytest.fixture(scope="module")
def model():
    return random_model(llava_next(small=True), torch.device("cpu"))


@torch.no_grad()
def test_the_dense_baseline_is_a_stock_step(model):
    """The newest token in the last place, no mask, and the model as it was afterwards."""
    bench = Bench(model, 2, 40, 2)
    kv = [random_kv(bench.geometry, i, 2, 40, bench.like) for i in range(3)]
    stock = DynamicCache(config=model.config.get_text_config())
    for i, (keys, values) in enumerate(kv):
        stock.update(keys[:, :, :-1], values[:, :, :-1], i)
    places = torch.full((2, 1), 39)
    expected = model(input_ids=bench.ids, position_ids=places, past_key_values=stock, use_cache=True).logits
    with attended_by(model, DENSE, dense_attention, masked=False):
        assert model.config.get_text_config()._attn_implementation == DENSE
        fixed = Cache(layers=[FixedLayer(keys.clone(), values.clone()) for keys, values in kv])
        got = model(input_ids=bench.ids, position_ids=places, past_key_values=fixed, use_cache=True).logits
    assert torch.allclose(got, expected, atol=1e-5) and expected.std() > 0.05
    assert model.config.get_text_config()._attn_implementation == "sdpa"


@torch.no_grad()
def test_what_ours_is_filled_with(model):
    """Pages of 2880 tokens, the rest of them, and a question in the window; different in every row."""
    geometry, like = geometry_of(model.config), next(model.parameters())
    with enable(model, artifact_of(geometry, Slabs(0, 16, 0), Slabs(0, 32, 0)), backend="torch") as enabled:
        cache = enabled.new_cache()
        fill_ours(cache, geometry, 2, 2880 + 100 + 24, like)
    store = cache.layers[1].store
    coded = store.table[:, 0][store.table[:, 0, :, KIND] == Kind.CODED][:, LENGTH]
    assert sorted(coded.tolist()) == [100, 100, 2880, 2880] and store.window.host.tolist() == [24, 24]
    assert cache.get_seq_length() == 3004 and cache.stats()["fallback_heads"] == 0
    assert not torch.equal(store.window.keys[0], store.window.keys[1])


@torch.no_grad()
def test_copied_rows_lie_at_places_of_their_own(model):
    """The same logits as the rows they were copied from, and the bytes of a batch of which every row was coded."""
    geometry, like = geometry_of(model.config), next(model.parameters())
    stored, logits = [], []
    for batch, fill in ((2, fill_ours), (6, fill_ours), (6, lambda *args: fill_many(*args, coded=2))):
        with enable(model, artifact_of(geometry, Slabs(8, 8, 0), Slabs(0, 32, 0)), backend="torch") as enabled:
            cache = enabled.new_cache()
            fill(cache, geometry, batch, 200, like)
            ids, places = torch.arange(10, 10 + batch)[:, None] // 3, torch.full((batch, 1), 200)
            if batch == 2:
                ids = torch.tensor([[3], [5]])
            if fill is not fill_ours:
                ids = torch.tensor([3, 3, 3, 5, 5, 5])[:, None]
                store = cache.layers[0].store
                offsets = store.table[:, :, 0, KEY + OFFSET].reshape(-1)
                assert len(set(offsets.tolist())) == offsets.size and len(set(store.ids.reshape(-1).tolist())) == 6
                store.codes[: len(store.codes) // 3] = 0  # what the first copies read
            logits.append(model(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True).logits)
            stored.append(cache_bytes(cache).stored)
    assert stored[2] == stored[1] > 2.5 * stored[0]
    for row, copies in ((0, (1, 2)), (1, (4, 5))):
        for copy in copies:
            assert torch.allclose(logits[2][copy], logits[0][row], atol=1e-5)
    assert not torch.allclose(logits[2][0], logits[0][0], atol=1e-4)


@torch.no_grad()
def test_the_static_row_is_a_loop_of_transformers(model, monkeypatch):
    made = []

    class Kept(step_loops.StaticCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(step_loops, "StaticCache", Kept)
    seconds, held = Bench(model, 2, 40, 4).static(60)
    steps = 6 + 2 + 1  # the last one's token is never read
    assert 0 < seconds < 5 and held == 2 * 3 * 2 * 2 * (40 + steps + 1) * 32 * 4
    layer = made[0].layers[2]
    assert int(layer.get_seq_length()) == 40 + steps
    assert torch.equal(layer.keys[:, :, :40], random_kv(geometry_of(model.config), 2, 2, 40, layer.keys)[0])
    with pytest.raises(TooLongError, match="took longer than 0 s"), at_most(0.05):
        time.sleep(5)


def test_what_does_not_fit_is_said_and_the_next_batch_tried(capsys):
    def refused():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def uncaptured():
        raise NotCapturedError("nothing was captured")

    def wrong():
        raise ValueError("no")

    row = row_of("fullx64", "ours a", iter([(8, refused), (7, uncaptured), (6, lambda: (0.5, 10**9)), (5, wrong)]))
    assert row == {"point": "fullx64", "batch": 6, "tokens": 64, "cache": "ours a", "ms": 500, "tokens_per_second": 12, "cache_gb": 1}
    assert row_of("2x64", "static, compiled", [(2, wrong)]) is None and row_of("2x64", "dense", [(2, refused)]) is None
    with pytest.raises(ValueError, match="no"):
        row_of("2x64", "ours a", [(2, wrong)])
    with pytest.raises(NotCapturedError):
        row_of("2x64", "ours a", [(2, uncaptured)])
    assert capsys.readouterr().out.splitlines() == [
        "fullx64, ours a, B 8: does not fit in memory",
        "fullx64, ours a, B 7: does not run here (NotCapturedError: nothing was captured)",
        "2x64, static, compiled, B 2: does not run here (ValueError: no)",
        "2x64, dense, B 2: does not fit in memory",
        "2x64, dense: no batch fits in memory",
    ]


@torch.no_grad()
def test_largest_batches_come_from_bytes(model, monkeypatch):
    geometry = geometry_of(model.config)
    dense, ours = row_bytes(model, 320, None), row_bytes(model, 320, PLAN)
    assert dense == 3 * 2 * 2 * 320 * 32 * 4
    with enable(model, artifact_of(geometry, *(Slabs(*side) for side in PLAN)), graphs=False) as enabled:
        cache = enabled.new_cache()
        fill_ours(cache, geometry, 1, 320, next(model.parameters()))
        assert ours == cache_bytes(cache).stored + 40 * dense // 320
    monkeypatch.setattr(bench_steps, "free_bytes", lambda device: int(bench_steps.SPARE * 1e9) + 25 * dense + 1)
    assert [batch for batch, _ in bench_steps.largest(model, 320, 2, None)][:4] == [25, 24, 23, 22]
    tried = [batch for batch, _ in bench_steps.largest(model, 320, 2, PLAN)]
    assert tried[0] == 25 * dense // ours // 4 * 4 and len(tried) <= 8 and all(batch % 4 == 0 for batch in tried)


def test_rows_are_saved_as_they_come(tmp_path):
    """Rows of the same model, point and cache are replaced; those of an older form of the file are dropped."""
    file = tmp_path / "results" / "steps.csv"
    file.parent.mkdir()
    file.write_text("batch,tokens,cache,ms\n8,8192,stock,55.9\n")
    saved = Saved(file)
    row = {"model": "m", "point": "2x64", "batch": 2, "tokens": 64, "cache": "stock", "ms": 1 / 3}
    saved.add(row)
    saved.add(row | {"cache": "dense, captured"})
    assert [one["ms"] for one in read(file)] == ["0.333333"] * 2
    Saved(file).add(row | {"ms": 2.0})
    assert [(one["cache"], one["ms"]) for one in read(file)] == [("dense, captured", "0.333333"), ("stock", "2")]


def test_points():
    assert point_of("32x4096") == "32x4096" and point_of("fullx16384") == "fullx16384"
    for text in ("32", "x64", "maxx64", "2x", "2x3x4"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no point"):
            point_of(text)


def test_geometries(monkeypatch, capsys, tmp_path):
    """The second model as published; the command measures both."""
    config = qwen3_vl_4b(small=False)
    geometry = geometry_of(config)
    assert {(layer.query_heads, layer.kv_heads, layer.head_dim) for layer in geometry.layers} == {(32, 8, 128)} and len(
        geometry.layers
    ) == 36
    assert config.text_config.hidden_size == 2560 and config.tie_word_embeddings
    command = [
        "bench_steps.py",
        "--small",
        "--models",
        "qwen3-vl-4b",
        "--caches",
        "dense",
        "ours",
        "--steps",
        "2",
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(bench_steps, "free_bytes", lambda device: int(bench_steps.SPARE * 1e9) + 10_000_000)
    bench_steps.main()
    out = capsys.readouterr().out
    rows = read(tmp_path / "steps.csv")
    assert [(row["point"], row["batch"]) for row in rows] == [("2x192", "2"), ("2x192", "2"), ("fullx3072", "2"), ("fullx3072", "4")]
    assert out.endswith("\n".join(steps_table(rows)) + "\n") and "no time left" not in out


def test_other_norms(monkeypatch, capsys):
    """--liger replaces three names of a model's file, which models made afterwards look up; without the package a sentence says so."""
    parts = {name: type(name, (), {}) for name in ("LigerRMSNorm", "LigerSwiGLUMLP", "liger_rotary_pos_emb")}
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.SimpleNamespace(**parts))
    for title, (modeling, names) in {
        "llava-next-mistral-7b": (modeling_mistral, ("MistralRMSNorm", "MistralMLP", "apply_rotary_pos_emb")),
        "qwen3-vl-4b": (modeling_qwen3_vl, ("Qwen3VLTextRMSNorm", "Qwen3VLTextMLP", "apply_rotary_pos_emb")),
    }.items():
        for name in names:
            monkeypatch.setattr(modeling, name, getattr(modeling, name))
        assert bench_steps.fused(title) == f"{title}, liger-kernel"
        assert [getattr(modeling, name) for name in names] == list(parts.values())
    monkeypatch.setattr(bench_steps, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench_steps.py", "--small", "--liger"])
    with pytest.raises(SystemExit):
        bench_steps.main()
    assert "--liger needs the package liger-kernel" in capsys.readouterr().err


def test_rows_with_other_norms_have_another_name(monkeypatch, tmp_path):
    """The parts are replaced before the model is made; a row of the same model without them stays."""
    order = []
    made = bench_steps.random_model
    monkeypatch.setattr(bench_steps, "find_spec", lambda name: name == "liger_kernel")
    monkeypatch.setattr(bench_steps, "fused", lambda title: order.append(title) or f"{title}, with other parts")
    monkeypatch.setattr(bench_steps, "random_model", lambda *about: order.append("made") or made(*about))
    monkeypatch.setattr(bench_steps, "free_bytes", lambda device: int(bench_steps.SPARE * 1e9) + 10_000_000)
    for more in ([], ["--liger"]):
        rest = ["--caches", "dense", "--steps", "2", "--output", str(tmp_path), *more]
        monkeypatch.setattr(sys, "argv", ["bench_steps.py", "--small", "--models", "qwen3-vl-4b", *rest])
        bench_steps.main()
    assert order == ["made", "qwen3-vl-4b", "made"]
    names = [row["model"] for row in read(tmp_path / "steps.csv")]
    assert len(names) == 4 and names == ["qwen3-vl-4b"] * 2 + ["qwen3-vl-4b, with other parts"] * 2


ROW = {"device": "a GPU", "torch": "2", "transformers": "5", "model": "m", "weights_gb": "1", "copy_TBps": "2", "tokens": 64}
DENSE_ROW = ROW | {"point": "2x64", "batch": 2, "cache": "dense, captured", "ms": "4", "tokens_per_second": "500", "cache_gb": "3"}
OURS_ROW = DENSE_ROW | {"cache": "ours, captured", "ms": 2, "tokens_per_second": 1000, "cache_gb": "0.6"}
FULL_ROWS = [
    one | {"point": "fullx64"} for one in (DENSE_ROW, OURS_ROW | {"batch": 10, "tokens_per_second": 5000, "cache_gb": "3", "ms": "2.5"})
]


def test_table():
    """Bytes at 2 TB/s: 4 GB are 2 ms, 1.6 GB are 0.8; a row stands with its point, wherever it was measured."""
    slow = DENSE_ROW | {"cache": "stock", "ms": 8, "tokens_per_second": 250, "cache_gb": "3.5"}
    lines = steps_table([DENSE_ROW, OURS_ROW, *FULL_ROWS, slow])
    assert lines[0] == "a GPU, torch 2, transformers 5, copy 2.00 TB/s" and lines[2] == "m, weights 1.0 GB"
    assert lines[4].endswith("| roofline | ms beyond the bytes | over the best dense | bytes allow | reached |")
    assert lines[6:] == [
        "| 2 | 64 | dense, captured | 4.0 | 500 | 3.00 | 0.50 | 2.00 |  |  |  |",
        "| 2 | 64 | ours, captured | 2.0 | 1000 | 0.60 | 0.40 | 1.20 | 2.00 | 2.50 | 0.80 |",
        "| 2 | 64 | stock | 8.0 | 250 | 3.50 | 0.28 | 5.75 |  |  |  |",
        "| 2 | 64 | dense, captured | 4.0 | 500 | 3.00 | 0.50 | 2.00 |  |  |  |",
        "| 10 | 64 | ours, captured | 2.5 | 5000 | 3.00 | 0.80 | 0.50 | 10.00 | 5.00 | 2.00 |",
        "",
        "Largest batch at T 64: dense, captured: 2; ours, captured: 10 (5.0 times).",
        "",
        "At least 0.85 of what the bytes allow: B 10, T 64, ours, captured (2.00). Less: B 2, T 64, ours, captured (0.80).",
    ]
    assert steps_table([DENSE_ROW])[-1].startswith("| 2 | 64 | dense")


def test_what_steps_come_to():
    """Ranges over the captured rows of ours, equal batches and the largest apart; eager rows and models without dense rows do not count."""
    slower = OURS_ROW | {"cache": "ours b, captured", "tokens_per_second": 800}
    rows = [DENSE_ROW, OURS_ROW, slower, OURS_ROW | {"cache": "ours", "tokens_per_second": 100}, *FULL_ROWS]
    other = [one | {"model": "n"} for one in (DENSE_ROW, OURS_ROW)]
    assert reached([*rows, *other])[2:] == [
        "| m | 1.60 to 2.00 (0.64 to 0.80) | 10.00 (2.00), T 64 |",
        "| n | 2.00 (0.80) |  |",
    ]
