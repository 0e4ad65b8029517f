"""Palu's coder: latents of groups of heads before RoPE, ranks, bytes, and models whose Keys cannot be followed."""

import copy

import pytest
import torch
from palu_cases import made_before, made_factors
from torch import nn
from transformers.cache_utils import DynamicCache

from rotatek_compile.errors import RotateKError, UsageError
from rotatek_compile.geometry import Geometry, LayerGeometry, geometry_of
from rotatek_compile.runtime.before_rope import key_projections, turned, watching
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.recording import fill, record
from rotatek_compile.runtime.rivals.palu import Factors, palu_ranks, palu_ratios, shapes_of, spread, state_of, tensor_name, widths_of
from rotatek_compile.runtime.rivals.registry import make_coder


def shaped(kv_heads, head_dim, layers=1):
    layer = LayerGeometry(layer_type="full_attention", query_heads=2 * kv_heads, kv_heads=kv_heads, head_dim=head_dim)
    return Geometry(model_type="made", layers=(layer,) * layers, visual_token_ids=(5,))


def coder_of(name, geometry, ratio):
    return make_coder(name, geometry, keep_ratio=ratio, state={"palu": made_factors(geometry)})


# -- ranks and bytes --------------------------------------------------------------------------------------------------------------


def test_groups_of_four_heads():
    assert widths_of(shaped(10, 64)) == {
        (0, side, number): width for side in ("key", "value") for number, width in enumerate((256, 256, 128))
    }
    assert widths_of(shaped(2, 128)) == {(0, "key", 0): 256, (0, "value", 0): 256}


def test_ranks_by_hand():
    """Two layers of one group of 512 a side; 2048 dimensions, Fisher information 1, 2, 5, 8 of 16."""
    geometry = shaped(4, 128, 2)
    fisher = {(0, "key", 0): 1.0, (0, "value", 0): 2.0, (1, "key", 0): 5.0, (1, "value", 0): 8.0}

    def ranks(ratio):
        return [*palu_ranks(geometry, ratio, fisher).values()]

    assert ranks(0.25) == [32, 64, 160, 256]  # 512 in all: 32, 64, 160, 256 without rounding
    assert ranks(0.3125) == [32, 64, 192, 320]  # 640: 40, 80 (2.5 steps, a half goes to even), 200, 320
    assert ranks(0.75) == [192, 320, 512, 512]  # 1536: 96, 192, 480, 768; 256 too much: 32 each, then 80 each: 208, 304 (halves)
    assert ranks(1.0) == [512] * 4
    assert ranks(0.0625) == [32] * 4
    assert ranks(0.1) == [32, 32, 64, 96]  # 205: 12.8, 25.6, 64, 102.4; at least one step
    with pytest.raises(UsageError, match="palu needs learned factors; make them with benchmarks/learn_palu.py"):
        palu_ranks(geometry, 0.5, None)
    assert [*palu_ranks(geometry, 0.0625, None).values()] == [32] * 4


@pytest.mark.parametrize("shape", [(4, 128, 3), (10, 64, 2), (2, 32, 2)])
def test_ranks_never_fall(shape):
    geometry = shaped(*shape)
    factors, ratios = made_factors(geometry), palu_ratios(geometry)
    assert list(ratios) == sorted(set(ratios)) and ratios[-1] == 1.0
    before = dict.fromkeys(widths_of(geometry), 0)
    for ratio in ratios:
        ranks = palu_ranks(geometry, ratio, factors.fisher)
        assert all(before[place] <= ranks[place] <= width for place, width in widths_of(geometry).items())
        before = ranks
    assert before == widths_of(geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 33, 520])
def test_bytes_by_hand(tokens, dtype):
    """Groups of 4 and 1 heads of 64: 256 and 64 channels a side; half of 640 dimensions, Fisher information 1, 1/2, 1/3, 1/4."""
    geometry = shaped(5, 64)
    ranks = {(0, "key", 0): 160, (0, "key", 1): 64, (0, "value", 0): 64, (0, "value", 1): 40}
    # 320: 153.6, 64 (76.8), 51.2, 38.4; 12.8 too much goes evenly to three: 157.9, 64, 55.5, 42.7
    for name, expected in (("palu", 2 * tokens * 328), ("palu4", tokens * (80 + 32 + 32 + 20 + 4 * 4))):
        coder = coder_of(name, geometry, 0.5)
        assert coder.ranks == ranks and coder.setting == "328 of 640 dimensions"
        segment = coder.code_before(0, made_before(5, tokens, 64, dtype), torch.randn(5, tokens, 64).to(dtype))
        assert segment.bytes() == coder.bytes_of(tokens, 0) == expected
        stored = sum(part.untyped_storage().nbytes() for part in segment.parts.values())
        assert stored == expected * (2 if name == "palu" and dtype == torch.float32 else 1)
        assert all(x.shape == (5, tokens, 64) and x.dtype == torch.float32 and x.isfinite().all() for x in segment.rebuild())


# -- what is rebuilt --------------------------------------------------------------------------------------------------------------


class HeadNorm(nn.Module):
    """A k-norm with a gain that differs by channel."""

    def forward(self, x):
        return x * x.pow(2).mean(-1, keepdim=True).rsqrt() * torch.linspace(0.5, 2, x.shape[-1])


@pytest.mark.parametrize("norm", [None, HeadNorm()])
def test_a_round_trip_is_exact_at_full_rank(norm):
    before, values = made_before(6, 40, 32, norm=norm), torch.randn(6, 40, 32, generator=torch.Generator().manual_seed(3))
    keys, got = coder_of("palu", shaped(6, 32), 1.0).code_before(0, before, values).rebuild()
    raw = norm(before.keys) if norm else before.keys
    pairs = torch.complex(raw[..., :16], raw[..., 16:]) * torch.complex(before.turning.cos[:, :16], before.turning.sin[:, :16])
    assert torch.allclose(keys, torch.cat([pairs.real, pairs.imag], -1), atol=1e-5)
    assert torch.allclose(got, values, atol=1e-5)


def test_heads_of_a_group_share_their_latent():
    """By hand for one direction of each of two heads of one group, and nothing of the other group."""
    geometry = shaped(5, 32)
    factors = made_factors(geometry)
    coder = make_coder("palu", geometry, keep_ratio=0.2, state={"palu": factors})
    before, values = made_before(5, 7, 32), torch.randn(5, 7, 32)
    segment = coder.code_before(0, before, values)
    for side, x in (("key", before.keys), ("value", values)):
        for number, heads in ((0, [0, 1, 2, 3]), (1, [4])):
            basis = factors.directions[0, side, number][:, : coder.ranks[0, side, number]]
            for token in range(7):
                expected = sum(x[h, token] @ basis[32 * n : 32 * n + 32] for n, h in enumerate(heads))
                assert torch.allclose(segment.parts[f"{side}{number}"][token], expected, atol=1e-5)


@pytest.mark.parametrize("rank", [8, 32, 96, 160, 480, 512])
def test_the_rotation_is_orthogonal_and_mixes(rank):
    rotation = spread(torch.eye(rank))
    assert torch.allclose(rotation @ rotation.T, torch.eye(rank), atol=1e-5)
    power = rank & -rank
    assert ((rotation != 0).sum(0) == power).all()
    steep = torch.randn(500, rank, generator=torch.Generator().manual_seed(0)) * torch.logspace(2, -2, rank)
    spans = [x.abs().amax(-1) / x.pow(2).mean(-1).sqrt() for x in (steep, spread(steep))]
    assert spans[1].mean() < spans[0].mean()


def test_four_bits_after_the_rotation():
    """Errors of the rotated latent are at most half a step of its range, and small beside the native latent's."""
    geometry = shaped(4, 64)
    before, values = made_before(4, 50, 64), torch.randn(4, 50, 64)
    native, coded = (coder_of(name, geometry, 0.5) for name in ("palu", "palu4"))
    assert native.ranks == coded.ranks
    exact, got = native.code_before(0, before, values), coded.code_before(0, before, values)
    for side in ("key", "value"):
        rank = native.ranks[0, side, 0]
        latent = spread(exact.parts[f"{side}0"])
        basis = spread(made_factors(geometry).directions[0, side, 0][:, :rank])
        rebuilt = coded.side(0, side, got.parts, torch.device("cpu")).transpose(0, 1).flatten(1) @ basis
        step = (latent.amax(-1, keepdim=True) - latent.amin(-1, keepdim=True)) / 15
        assert ((rebuilt - latent).abs() <= step / 2 * 1.01 + 2e-3).all() and (rebuilt - latent).abs().max() > 1e-3


# -- in a model -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [False, True])
def test_full_rank_is_the_stock_cache(model, ragged, geometry, make_artifact, recorded):
    ids = torch.full((4, 3), 17)
    mask = torch.cat([ragged["attention_mask"], torch.ones_like(ids)], 1)
    more = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, -3:]}
    stock = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**ragged, past_key_values=stock)
        expected = model(**more, past_key_values=stock).logits
        with enable(model, make_artifact(), backend="torch") as enabled:
            found = []
            for ratio in (1.0, 0.25):
                cache = enabled.new_cache(coder_of("palu", geometry, ratio))
                if recorded:
                    fill(cache, record(model, **ragged))
                else:
                    model(**ragged, past_key_values=cache)
                cache = copy.deepcopy(cache)
                found.append((model(**more, past_key_values=cache).logits - expected)[[0, 1, 3]].abs().amax((1, 2)))
    assert found[0].max() < 1e-4 and found[1].min() > 0.05


@pytest.mark.parametrize("size", [7, 40])
def test_an_image_that_arrives_in_pieces(model, prompts, geometry, make_artifact, size):
    """Pieces are held before RoPE too, and coded as the whole image would be; rows are reordered in between."""
    inputs = prompts.batch([[3, prompts.square, 20], [20, prompts.tall, 15]])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    coder = coder_of("palu", geometry, 0.5)
    with torch.no_grad(), enable(model, make_artifact(), backend="torch") as enabled:
        whole, parts = enabled.new_cache(coder), enabled.new_cache(coder)
        model(**inputs, position_ids=positions, past_key_values=whole)
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == 5] = torch.cat(list(model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output))
        rows, held = [0, 1], 0
        for start in range(0, ids.shape[1], size):
            part = slice(start, start + size)
            model(
                inputs_embeds=embeds[rows, part], mm_token_type_ids=(ids[rows, part] == 5).long(), position_ids=positions[rows, part],
                attention_mask=mask[rows, : start + size], past_key_values=parts, use_cache=True,
            )  # fmt: skip
            held += len(parts.layers[0].media.before)
            if parts.layers[0].media.before:
                assert {id(x) for x in parts.layers[0].media.before[0 if 0 in parts.layers[0].media.before else 1].tensors()} <= {
                    id(x) for x in parts.layers[0].tensors()
                }
                parts.reorder_cache(torch.tensor([1, 0]))
                rows = rows[::-1]
    assert held > 1
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert other.media.before == {}
        for row in (0, 1):
            (a,), (b,) = one.spans.rows[row], other.spans.rows[rows.index(row)]
            assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a.rebuild(), b.rebuild(), strict=True))


def test_others_are_not_affected(model, ragged, geometry, make_artifact):
    """Hooks are there during a call of a cache that asks, and never else."""
    modules = key_projections(model, geometry)
    seen = []

    def hooks():
        return sum(len(m._forward_pre_hooks) + len(m.k_proj._forward_hooks) for m in modules.values())

    spy = model.model.language_model.layers[0].mlp.register_forward_hook(lambda *args: seen.append(hooks()))
    try:
        with torch.no_grad(), enable(model, make_artifact(), backend="torch") as enabled:
            for coder in (None, make_coder("int4", geometry), coder_of("palu", geometry, 0.5), None):
                cache = enabled.new_cache(coder)
                model(**ragged, past_key_values=cache)
                assert (cache.state.before_rope is None) == (getattr(coder, "name", "") != "palu") and not cache.state.before_rope
                assert not any(layer.media.before for layer in cache.layers)
    finally:
        spy.remove()
    assert seen == [0, 0, 6, 0] and hooks() == 0


def test_what_was_not_recorded_is_refused(model, ragged, geometry, make_artifact):
    with torch.no_grad(), enable(model, make_artifact(), backend="torch") as enabled:
        recording = record(model, **ragged)
        with pytest.raises(RotateKError, match="method palu needs layer 0 before RoPE, which was not recorded"):
            fill(enabled.new_cache(coder_of("palu", geometry, 0.5)), recording)


def test_tokens_that_differ_by_head_are_refused(model, ragged, geometry, make_artifact):
    for method, allowed in (("fastv", True), ("snapkv", False)):
        artifact = make_artifact(token_method=method, token_keep_ratio=0.5)
        with torch.no_grad(), enable(model, artifact, backend="torch") as enabled:
            cache = enabled.new_cache(coder_of("palu", geometry, 1.0))
            if not allowed:
                with pytest.raises(UsageError, match="heads that are coded jointly keep the same tokens"):
                    model(**ragged, past_key_values=cache)
                continue
            exact = enabled.new_cache(make_coder("native", geometry))
            for one in (cache, exact):
                model(**ragged, past_key_values=one)
            for a, b in zip(cache.layers[0].spans.rows[1], exact.layers[0].spans.rows[1], strict=True):
                assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a.rebuild(), b.rebuild(), strict=True))


# -- refusals ---------------------------------------------------------------------------------------------------------------------


SIZES = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Cohere", {}, "RoPE of CohereForCausalLM pairs neighbouring channels"),
        ("Glm", {"head_dim": 32, "partial_rotary_factor": 0.5}, "turns a share 0.5 of the channels"),
        ("Phi3", {}, "layer 0 of Phi3ForCausalLM has no k_proj"),
        ("Olmo2", {}, "the k-norm of Olmo2ForCausalLM is not one of each head"),
    ],
)
def test_models_whose_keys_cannot_be_followed(name, options, words):
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES | options)
    built = getattr(transformers, f"{name}ForCausalLM")(config)
    layer = LayerGeometry(layer_type="full_attention", query_heads=2, kv_heads=2, head_dim=32)
    with pytest.raises(UsageError, match=words):
        key_projections(built, Geometry(model_type="made", layers=(layer,), visual_token_ids=()))


def test_keys_made_in_another_way_are_refused(model, geometry, make_artifact, ragged):
    before = made_before(2, 9, 32)
    before.check(0, turned(before.keys, before.turning.cos, before.turning.sin))
    with pytest.raises(UsageError, match="the Keys of layer 3 are not its k_proj, k-norm and RoPE"):
        before.check(3, before.keys)  # a layer without RoPE


def test_a_model_that_does_more_to_its_keys_is_refused(model, geometry, make_artifact, ragged, monkeypatch):
    import transformers.models.llama.modeling_llama as modelling

    own = modelling.apply_rotary_pos_emb
    with torch.no_grad(), enable(model, make_artifact(), backend="torch") as enabled:
        cache = enabled.new_cache(coder_of("palu", geometry, 0.5))
        monkeypatch.setattr(modelling, "apply_rotary_pos_emb", lambda *args: tuple(1.1 * x for x in own(*args)))
        with pytest.raises(UsageError, match="the Keys of layer 0 are not its k_proj"):
            model(**ragged, past_key_values=cache)


def test_calls_of_other_threads_are_not_watched(model, geometry):
    modules, seen = key_projections(model, geometry), {}
    with torch.no_grad():
        with watching(modules, seen, lambda: False):
            model(input_ids=torch.full((1, 4), 17))
        assert seen == {}
        with watching(modules, seen):
            model(input_ids=torch.full((1, 4), 17))
    assert sorted(seen) == [0, 1, 2] and seen[2].keys.shape == (1, 2, 4, 32)


def test_cosines_of_fewer_channels_are_refused(model, geometry):
    modules = key_projections(model, geometry)
    assert sorted(modules) == [0, 1, 2] and geometry_of(model.config) == geometry
    angles = torch.zeros(1, 4, 16)
    with watching(modules, {}), pytest.raises(UsageError, match="passes those of 16 of 32 channels"):
        modules[0](torch.zeros(1, 4, 64), position_embeddings=(angles, angles), attention_mask=None)


def test_keys_after_rope_are_refused():
    coder = coder_of("palu", shaped(2, 32), 0.5)
    with pytest.raises(UsageError, match="palu codes Keys before RoPE"):
        coder.code(0, *torch.zeros(2, 2, 3, 32), torch.zeros(2, 1, 3, 32))
    nothing = make_coder("palu", shaped(2, 32), keep_ratio=0.125)
    with pytest.raises(UsageError, match="palu needs learned factors"):
        nothing.code_before(0, made_before(2, 3, 32), torch.zeros(2, 3, 32))


def test_the_learned_file():
    geometry = shaped(5, 32)
    factors = made_factors(geometry)
    tensors = {tensor_name(place, "directions"): basis for place, basis in factors.directions.items()}
    tensors |= {tensor_name(place, "fisher"): torch.tensor([own]) for place, own in factors.fisher.items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes_of(geometry, {})
    read = state_of(tensors, geometry, {})
    assert isinstance(read, Factors) and read.fisher == pytest.approx(factors.fisher)
    assert all(torch.equal(basis, factors.directions[place]) for place, basis in read.directions.items())
    with pytest.raises(UsageError, match="layers.0.value.1_directions is not orthonormal; learn it again"):
        state_of(tensors | {"layers.0.value.1_directions": torch.eye(32) * 1.01}, geometry, {})
    with pytest.raises(UsageError, match="layers.0.key.0_fisher is 0, expected a number above 0"):
        state_of(tensors | {"layers.0.key.0_fisher": torch.zeros(1)}, geometry, {})
