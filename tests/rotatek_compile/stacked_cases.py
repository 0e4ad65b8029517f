"""Checkpoints that `--method rap+rotatek` made, for the tests of what is in them and of the commands on them."""

import sys
from pathlib import Path

import pytest

from rotatek_compile import CompileOptions, compile_artifact
from rotatek_compile.rap_plan import RapPlan

sys.path.append(str(Path(__file__).parents[1] / "runtime"))
from rap_cases import SMALLER, drawn_plan, whole_plan  # noqa: E402

SMALL = {"num_samples": 4, "batch_size": 2, "device": "cpu", "quiet": True}
BUDGET = 0.25
WIDTHS = ((56, 32), (40, 88))  # pairs and Value widths of the two layers, of 64 and 128


@pytest.fixture(scope="module")
def wide(make_checkpoint):
    """A tiny LLaVA-NeXT with heads of 128 channels, so that steps of 8 come near any keep ratio."""
    return make_checkpoint(name="wide", layers=2, heads=2, kv_heads=1, head_dim=128)


@pytest.fixture(scope="module")
def drawn():
    """Plans are drawn, not measured: how good they are is tested elsewhere (test_rap_maps.py). Counts how often statistics are made."""
    from rotatek_compile import compile_stacked, compiler, rap_maps, rap_statistics

    def fixed(model, statistics, geometry, *, keep_ratio, **options):
        widths, hidden = WIDTHS if geometry.layers[0].head_dim == 128 else SMALLER, model.config.get_text_config(decoder=True).hidden_size
        if keep_ratio == 1:
            return whole_plan(geometry)
        return RapPlan(drawn_plan(geometry, widths, hidden=hidden if options["repair"] else None).layers, {})

    counts = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rap_maps, "make_plan", fixed)
        patched.setattr(rap_statistics, "collect", lambda *args, **options: counts.append(1))
        for module in (compiler, compile_stacked):
            patched.setattr(module, "draw_heads", lambda *_: False)  # the card's picture: test_card.py
        yield counts


def compiled_to(folder, wide, data_file, **options):
    """Two layers of one KV head of 128 channels: 1,024 dense bytes of Keys and Values per token."""
    chosen = {"method": "rap+rotatek", "kv_budget": BUDGET} | options
    return compile_artifact(CompileOptions(model=str(wide), calib=str(data_file), output=folder, **SMALL | chosen))


@pytest.fixture(scope="module")
def stacked(wide, data_file, tmp_path_factory, drawn):
    """Summary and folder of the checkpoint pruned to about 0.6 and coded at a quarter."""
    folder = tmp_path_factory.mktemp("stacked") / "stacked"
    return compiled_to(folder, wide, data_file, keep_ratio=0.6), folder


@pytest.fixture(scope="module")
def whole(wide, data_file, tmp_path_factory, drawn):
    """Folders of plain RotateK, and of keep ratio 1.0 with the same budget."""
    folder = tmp_path_factory.mktemp("whole")
    compiled_to(folder / "plain", wide, data_file, method="rotatek")
    compiled_to(folder / "kept", wide, data_file, keep_ratio=1.0)
    return folder / "plain", folder / "kept"


@pytest.fixture(scope="module")
def page(data_file):
    return data_file.parent / "page0.png"
