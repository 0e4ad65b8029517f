"""The inspection page of a large artifact is small, and a real browser shows pages as they are meant, if one is installed."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from rotatek_compile.artifact import Artifact, Method, read_artifact
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.report_page import page


@pytest.fixture(scope="module")
def large():
    """36 layers of 8 KV heads and 128 channels, images and text."""
    layers = tuple(LayerGeometry(layer_type="full_attention", query_heads=32, kv_heads=8, head_dim=128) for _ in range(36))
    levels = tuple(Slabs(nibble=n) for n in (0, 16, 32, 64))
    method, tensors, generator = Method(span="all", levels=levels, kv_budget=0.25), {}, torch.Generator().manual_seed(0)
    for i in range(36):
        fall = torch.rand(8, 1, generator=generator) * 0.2 + 0.02
        for kind in method.kinds:
            for side in ("key", "value"):
                tensors[f"layers.{i}.{kind}.{side}_encode"] = torch.eye(128).expand(8, 128, 128).clone()
                tensors[f"layers.{i}.{kind}.{side}_spectrum"] = torch.exp(-fall * torch.arange(128))
        for side in ("key", "value"):
            tensors[f"layers.{i}.{side}_plan"] = torch.randint(0, 3, (8, 3), generator=generator).int() * 16
            tensors[f"layers.{i}.{side}_sensitivity"] = torch.rand(8, 4, generator=generator).sort(descending=True).values * 0.1
        tensors[f"layers.{i}.knockout"] = torch.rand(8, generator=generator)
    return Artifact(Geometry(model_type="large", layers=layers, visual_token_ids=(1,)), method, tensors, {"id": "org/large"}, {})


def test_a_large_page_is_small(large):
    text = page([large])
    assert len(text.encode()) < 2_000_000
    # for Keys and Values: directions, bits, four cuts, spectra; knock-outs and overlap
    assert len(re.findall("<title>layer 35, head 7: ", text)) == 16


BROWSER = next((p for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(name))), None)
WRAPPER = """<!DOCTYPE html><meta charset="utf-8"><body>{frames}<script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map((f) => {{
    const d = f.contentDocument, root = d.documentElement;
    d.querySelectorAll("details").forEach((e) => {{ e.open = true; }});
    return {{ scheme: f.dataset.scheme, width: root.clientWidth, content: root.scrollWidth, high: root.scrollHeight,
      page: f.contentWindow.getComputedStyle(d.body).backgroundColor, ink: f.contentWindow.getComputedStyle(d.body).color,
      empty: [...d.querySelectorAll("svg")].filter((s) => s.getBoundingClientRect().height < 20).length,
      outside: [...d.querySelectorAll("svg")].flatMap((s) => {{ const box = s.getBoundingClientRect();
        return [...s.querySelectorAll("text")].filter((t) => {{ const b = t.getBoundingClientRect();
          return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1;
        }}).map((t) => t.textContent); }}),
      requests: f.contentWindow.performance.getEntriesByType("resource").length }};
  }});
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
}});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser(compiled, large, rival, tmp_path):
    """Phone and desktop, light and dark: no console message, no sideways scrolling, every plot drawn and its words within it."""
    artifact = read_artifact(compiled)
    frames = "".join(
        f'<iframe data-scheme="{scheme}" style="width:{width}px;height:800px;border:0;color-scheme:{scheme}" '
        f'srcdoc="{html.escape(text)}"></iframe>'
        for text in (page([artifact]), page([large]), page([artifact, rival]))
        for width in (390, 1280)
        for scheme in ("light", "dark")
    )
    file = tmp_path / "wrapper.html"
    file.write_text(WRAPPER.format(frames=frames), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    ended = subprocess.run([BROWSER, *flags, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in ended.stderr, ended.stderr
    found = json.loads(html.unescape(re.search("FOUND(.*)END", ended.stdout)[1]))
    assert len(found) == 12  # a scroll bar may take some of the width
    assert all(wide - 30 <= frame["width"] <= wide for frame, wide in zip(found, [390, 390, 1280, 1280] * 3, strict=True))
    for frame in found:
        assert frame["content"] == frame["width"] and frame["high"] > 1000 and frame["requests"] == 0
        assert frame["empty"] == 0 and frame["outside"] == []
        light = sum(map(int, re.findall(r"\d+", frame["page"])[:3])) > sum(map(int, re.findall(r"\d+", frame["ink"])[:3]))
        assert light == (frame["scheme"] == "light")
