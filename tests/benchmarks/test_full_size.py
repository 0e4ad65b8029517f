"""The full-size benchmark with small models: every figure is measured, none is made up."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_full_size.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bench_full_size", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small(tmp_path):
    words = [sys.executable, str(SCRIPT), "--small", "--pages", "8", "--device", "cpu", "--output", str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "full-size-small.json").read_text())
    assert [result["geometry"] for result in results] == ["llava-next-mistral-7b", "qwen3-vl-8b"]
    for result in results:
        assert result["heads"] == 6
        # per head: a basis in two bytes a number, mean, spectrum and two rows of ratios; moments in halves of 8 fp64 matrices
        assert result["sidecar_keys_mb"] == pytest.approx(6 * (32 * 32 * 2 + 4 * 32 * 4) / 1e6, rel=0.05)
        assert result["sidecar_mb"] > 1.8 * result["sidecar_keys_mb"]
        assert result["moments_cache_mb"] == pytest.approx(6 * 8 * (32 * 33 // 2) * 8 / 1e6, rel=0.15)
        assert result["memory_over_forward"] is None
        assert result["moments_over_forward"] == pytest.approx(result["moments_seconds"] / result["forward_seconds"])
        assert (result["tokens"], result["pages"]) == (32, 8)
        assert result["kv_mb"] < result["kv_mb_dense"]
        assert f"{result['geometry']}: " in ended.stdout


def test_configs_are_those_of_the_published_models(script):
    """Key and Value heads, and weights: counted on the meta device."""
    from transformers import AutoModelForImageTextToText

    from rotatek_compile.geometry import geometry_of

    expected = {"llava-next-mistral-7b": (256, 7.57e9), "qwen3-vl-8b": (288, 8.77e9)}
    for name, (configure, _) in script.GEOMETRIES.items():
        config = configure(False)
        geometry = geometry_of(config)
        heads = sum(geometry.layers[i].kv_heads for i in geometry.compressible)
        with torch.device("meta"):
            weights = sum(weight.numel() for weight in AutoModelForImageTextToText.from_config(config).parameters())
        assert (heads, {layer.head_dim for layer in geometry.layers}) == (expected[name][0], {128})
        assert weights == pytest.approx(expected[name][1], rel=0.01)


def test_full_size_needs_a_gpu(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_full_size.py", "--device", "cpu"])
    with pytest.raises(SystemExit):
        script.main()
    assert "full size needs a GPU; pass --small" in capsys.readouterr().err
