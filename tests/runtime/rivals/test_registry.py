"""Budgets are promises, options a method does not take are refused, and every refusal says what to do."""

import copy

import pytest
import torch
from palu_cases import made_factors

from rotatek_compile.errors import UsageError
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.runtime.rivals.leank_learned import LearnedScales
from rotatek_compile.runtime.rivals.registry import RIVALS, make_coder, smallest_budget, worst_share

BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
LENGTHS = (512, 513, 520, 527, 543, 544, 577, 1023, 2880)


def made(kv_heads=2, head_dim=128, layers=3, sliding=()):
    def layer(index):
        kind = "sliding_attention" if index in sliding else "full_attention"
        return LayerGeometry(layer_type=kind, query_heads=2 * kv_heads, kv_heads=kv_heads, head_dim=head_dim)

    return Geometry(model_type="made", layers=tuple(map(layer, range(layers))), visual_token_ids=(5,))


def state_of(geometry):
    generator = torch.Generator().manual_seed(0)
    shapes = {i: (geometry.layers[i].kv_heads, geometry.layers[i].head_dim) for i in geometry.compressible}
    knockout = {i: torch.rand(heads, generator=generator) for i, (heads, _) in shapes.items()}
    energy = {i: torch.rand(shape, generator=generator) for i, shape in shapes.items()}
    return {"knockout": knockout, "energy": energy, "leank-learned": LearnedScales(energy, {}), "palu": made_factors(geometry)}


def share(coder, geometry, tokens):
    dense = geometry.dense_bytes_per_token() * tokens
    return sum(coder.bytes_of(tokens, i) for i in geometry.compressible) / dense


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("geometry", [made(), made(3, 64, 4, sliding=(1,)), made(8, 32, 1)], ids=["128", "64", "32"])
def test_a_budget_is_kept_or_refused(name, geometry):
    least = smallest_budget(name, geometry)
    for budget in (*BUDGETS, least):
        if budget < least:
            with pytest.raises(UsageError, match=f"{name} cannot meet a KV budget of {budget:g}; the smallest"):
                make_coder(name, geometry, kv_budget=budget, state=state_of(geometry))
            continue
        coder = make_coder(name, geometry, kv_budget=budget, state=state_of(geometry))
        assert all(share(coder, geometry, tokens) <= budget * (1 + 1e-9) for tokens in LENGTHS)
    assert worst_share(make_coder(name, geometry, kv_budget=least, state=state_of(geometry)), geometry) == pytest.approx(least)


def test_the_largest_setting_that_fits():
    geometry = made()
    think = make_coder("think", geometry, kv_budget=0.75)
    assert think.setting == "63 of 128 channels"  # 64 would fit but for the mask
    paper = make_coder("paper", geometry, kv_budget=0.75)
    assert paper.setting == "48 of 128 directions"  # R and the mean of 512 tokens take 1/8 and a little
    assert make_coder("spark-sign", geometry, kv_budget=0.75).setting == "49 of 128 channels"  # as think, less mask, signs and sizes
    assert make_coder("spark-mean", geometry, kv_budget=0.75).setting == "55 of 128 channels"
    assert make_coder("kq-svd", geometry, kv_budget=0.75).setting == "48 of 128 directions"
    for name, unit in (("think", 1), ("paper", 8), ("spark-sign", 1), ("spark-mean", 1), ("kq-svd", 8)):
        coder = make_coder(name, geometry, kv_budget=0.75)
        kept = int(coder.setting.split()[0]) + unit
        assert worst_share(make_coder(name, geometry, keep_ratio=kept / 128), geometry) > 0.75
    drop = make_coder("head-drop-native", geometry, kv_budget=0.5, state=state_of(geometry))
    assert drop.setting == "2 of 6 heads"  # 3 of 6 would fit but for means and masks
    drop = make_coder("head-drop", geometry, kv_budget=1 / 8, state=state_of(geometry))
    assert drop.setting == "2 of 6 heads"  # 17/64 of the bytes of a head each
    knockout = torch.stack([state_of(geometry)["knockout"][i] for i in range(3)])
    kept = torch.tensor([drop.kept[i] for i in range(3)])
    assert kept.sum() == 2 and knockout[kept].min() >= knockout[~kept].max()


def test_smallest_budgets_by_hand():
    geometry = made()
    expected = {
        "int8": (128 + 4) / 256,
        "int4": (64 + 4) / 256,
        "fp8": (512 * 128 + 4) / (512 * 256),
        "hadamard2": (32 + 16) / 256,
        "kivi2": (16 * 128 * 12 + 31 * 256 + 543 * 48) / (543 * 512),  # 31 residual Keys are the worst
        "head-drop": (2 * 128 * 8 + 1) / (2 * 512 * 512),
        "think": (2 * 512 * 129 + 16) / (512 * 512),
        "paper": (2 * 512 * 136 + 2 * 128 * 8 + 4 * 128) / (512 * 512),
        "spark-sign": (512 * (2 * 129 + 2 + 16 + 16) + 2 * 128) / (512 * 512),  # mask, signs of 127 channels, sizes of token and channels
        "spark-mean": (2 * 129 + 2 + 16) / 512,
        "svdq": (512 * (16 * 2 // 8 + 256) + 16 * (4 + 256) + 4 * 128) / (512 * 512),
        "kq-svd": 2 * (512 * 136 + 128 * 8) / (512 * 512),
        "leank": 8 * 128 / (512 * 512),  # mean Key and mean Value of every head
        "leank-learned": 8 * 128 / (512 * 512),
        "palu": 2 * 32 / 512,  # one group of 2 heads a side, of rank 32
        "palu4": 2 * (16 + 4) / 1024,
    }
    for name, number in expected.items():
        assert smallest_budget(name, geometry) == pytest.approx(number, rel=1e-12), name
    assert smallest_budget("fp8", geometry, 64) == pytest.approx((64 * 128 + 4) / (64 * 256), rel=1e-12)
    assert smallest_budget("fp8", geometry, 4096) == smallest_budget("fp8", geometry)  # so that make_coder accepts it


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("kivi3", {}, "unknown method 'kivi3'; choose one of int8, int4, fp8, kivi4"),
        ("int4", {"keep_ratio": 0.5}, "int4 has no keep ratio"),
        ("think", {}, "think takes a KV budget or a keep ratio"),
        ("think", {"keep_ratio": 0.5, "kv_budget": 0.9}, "one of the two"),
        ("think", {"keep_ratio": 1.5}, "keep ratio of 1.5 is out of range"),
        ("int8", {"kv_budget": 0.0}, "KV budget of 0 is out of range"),
        ("int8", {"kv_budget": 0.5}, "the smallest it can on this model is 0.51563"),
        ("paper", {"keep_ratio": 0.01}, "paper cannot keep 0.01; the smallest keep ratio on this model is 0.0625"),
        ("leank", {"keep_ratio": 0.5}, "leank needs calibrated energies of the channels and layer 0 has none"),
        ("leank", {"keep_ratio": 0.5, "state": {"energy": {0: torch.ones(2, 3)}}}, r"must be finite numbers \[2, 128\], got \[2, 3\]"),
        ("palu", {"keep_ratio": 0.5}, "palu needs learned factors; make them with benchmarks/learn_palu.py and name the file"),
        ("palu4", {"keep_ratio": 0.1}, "palu4 cannot keep 0.1; the smallest keep ratio on this model is 0.125"),
        ("leank-learned", {"keep_ratio": 0.5}, "needs learned scales and layer 0 has none; train them with benchmarks/learn_leank.py"),
        ("head-drop", {"kv_budget": 0.2}, "needs measured knock-outs and layer 0 has none"),
        ("head-drop", {"kv_budget": 0.2, "state": {"knockout": {0: torch.ones(3)}}}, "layer 0 must be 2 finite numbers"),
        ("head-drop", {"kv_budget": 0.2, "state": {"knockout": {0: torch.tensor([1.0, torch.nan])}}}, "layer 0 must be 2 finite numbers"),
    ],
)
def test_refusals(name, options, words):
    with pytest.raises(UsageError, match=words):
        make_coder(name, made(), **options)


def test_head_dims_a_method_cannot_code():
    with pytest.raises(UsageError, match="hadamard2 needs a head_dim that is a power of two, this model has 96"):
        make_coder("hadamard2", made(2, 96))
    with pytest.raises(UsageError, match="kivi4 needs a head_dim that is a multiple of 32, this model has 80"):
        make_coder("kivi4", made(2, 80))
    with pytest.raises(UsageError, match="svdq needs a head_dim that is a multiple of 8, this model has 36"):
        make_coder("svdq", made(2, 36), keep_ratio=0.5)
    with pytest.raises(UsageError, match="leank needs a head_dim that is a multiple of 32, this model has 80"):
        make_coder("leank", made(2, 80), keep_ratio=0.5, state=state_of(made(2, 80)))
    assert make_coder("kivi4", made(2, 96)).bytes_of(32, 0) == 2 * (96 * 20 + 32 * (48 + 12))


def test_the_registry():
    assert list(RIVALS) == [
        "int8", "int4", "fp8", "kivi4", "kivi2", "hadamard4", "hadamard2", "head-drop", "head-drop-native", "think", "paper",
        "spark-sign", "spark-mean", "svdq", "kq-svd", "leank", "leank-learned", "palu", "palu4", "native",
    ]  # fmt: skip
    learned = {name: rival.learned for name, rival in RIVALS.items() if rival.learned}
    assert learned == {
        "head-drop": "knockout", "head-drop-native": "knockout", "leank": "energy", "leank-learned": "leank-learned",
        "palu": "palu", "palu4": "palu",
    }  # fmt: skip
    alone = ["think", "paper", "spark-sign", "spark-mean", "svdq", "kq-svd", "leank", "leank-learned"]
    assert [name for name, rival in RIVALS.items() if rival.keys_only] == alone
    assert all(rival.settings[0] == "kv_budget" and rival.about for rival in RIVALS.values())
    geometry = made()
    for name, rival in RIVALS.items():
        ratio = 0.5 if "keep_ratio" in rival.settings else None
        coder = make_coder(name, geometry, keep_ratio=ratio, state=state_of(geometry))
        assert coder.name == name
        assert bool(coder.setting) == (ratio is not None)
        assert copy.deepcopy(coder) is coder


def test_equal_settings_say_so():
    geometry = made()
    assert make_coder("think", geometry, keep_ratio=0.25).setting == make_coder("think", geometry, keep_ratio=0.2549).setting
    assert make_coder("paper", geometry, keep_ratio=0.25).setting == make_coder("paper", geometry, keep_ratio=0.30).setting
    assert make_coder("svdq", geometry, keep_ratio=0.13).setting == "2 bits a number"
    assert make_coder("svdq", geometry, keep_ratio=1.0).setting == "8 bits a number"  # it has no more
    assert make_coder("svdq", geometry, keep_ratio=0.02).setting == "0.25 bits a number"
    assert make_coder("kq-svd", geometry, keep_ratio=0.30).setting == "32 of 128 directions"
    assert make_coder("spark-sign", geometry, keep_ratio=0.30).setting == "38 of 128 channels"
