"""Values at 4 bits beside any Keys: bytes as allocated, Keys untouched, and the calibrated way is what our own store does."""

import pytest
import torch

from rotatek_compile.errors import UsageError
from rotatek_compile.geometry import Geometry, LayerGeometry, geometry_of
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.plan_words import segment_bytes
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.recording import fill, record
from rotatek_compile.runtime.rivals.coded_values import WAYS, CodedValues
from rotatek_compile.runtime.rivals.leank_learned import LearnedScales
from rotatek_compile.runtime.rivals.native import NativeCoder
from rotatek_compile.runtime.rivals.our_keys import Directions, OurKeysCoder
from rotatek_compile.runtime.rivals.registry import RIVALS, make_coder

HEADS, DIM = 2, 64
ALONE = [name for name, rival in RIVALS.items() if rival.keys_only]


@pytest.fixture
def shapes():
    layer = LayerGeometry(layer_type="full_attention", query_heads=2 * HEADS, kv_heads=HEADS, head_dim=DIM)
    return Geometry(model_type="made", layers=(layer,), visual_token_ids=(5,))


@pytest.fixture
def bases():
    generator = torch.Generator().manual_seed(3)
    encode = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator)).Q * torch.logspace(-1, 1, DIM)
    mean = torch.randn(HEADS, DIM, generator=generator)
    return {0: Directions(mean, encode, torch.linalg.inv(encode).mT, torch.ones(HEADS, DIM))}


def tensors(tokens):
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn(HEADS, tokens, DIM, generator=generator) for _ in range(2))
    return keys, values + 2, torch.randn(HEADS, 2, 40, DIM, generator=generator)


def inner(name, geometry):
    energy = torch.ones(HEADS, DIM)
    energy[1] = 1e-9
    return make_coder(name, geometry, keep_ratio=0.5, state={"energy": {0: energy}, "leank-learned": LearnedScales({0: energy}, {})})


VALUE_BYTES = {  # of one head and 101 tokens of 64 channels
    "int4": 101 * (32 + 4),
    "kivi4": 101 * (32 + 8),
    "hadamard4": 101 * (32 + 4),
    "calibrated4": 102 * 32 + 2 * 64 + 2 * 64,  # a token of padding, scales, mean
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [None, *ALONE])
def test_bytes_and_keys(shapes, bases, way, name):
    keys, values, queries = tensors(101)
    alone = inner(name, shapes) if name else None
    coder = CodedValues(name="x", geometry=shapes, way=way, inner=alone, bases=bases)
    segment = coder.code(0, keys, values, queries)
    assert segment.bytes() == coder.bytes_of(101, 0)
    heads = 1 if name in ("leank", "leank-learned") else HEADS
    before = alone.bytes_of(101, 0) if alone else 2 * 2 * HEADS * 101 * DIM
    assert coder.bytes_of(101, 0) == before - heads * 2 * 101 * DIM + heads * VALUE_BYTES[way]
    rebuilt, got = segment.rebuild()
    expected = alone.code(0, keys, values, queries).rebuild() if alone else (keys, values)
    assert torch.equal(rebuilt, expected[0])
    for h in range(heads):
        # Hadamard gathers the means of 2 in one channel, which widens every range
        assert 0 < (got[h] - values[h]).square().mean() < 0.15 * values[h].var()
    if name in ("leank", "leank-learned"):
        assert torch.equal(got[1], expected[1][1])  # the mean, as it was


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_of_which_leank_keeps_nothing(shapes, bases, way):
    keys, values, queries = tensors(7)
    nothing = make_coder("leank", shapes, kv_budget=0.01, state={"energy": {0: torch.rand(HEADS, DIM)}})
    assert nothing.value_heads(0) == ()
    segment = CodedValues(name="x", geometry=shapes, way=way, inner=nothing, bases=bases).code(0, keys, values, queries)
    assert segment.bytes() == nothing.bytes_of(7, 0) == HEADS * 8 * DIM
    assert all(
        torch.allclose(x, y.mean(1, keepdim=True).expand_as(y), atol=1e-6) for x, y in zip(segment.rebuild(), (keys, values), strict=True)
    )


KEYS = [[Slabs(8, 0, 16), Slabs(0, 8, 16)], [Slabs(), Slabs(32)], [Slabs(0, 0, 32), Slabs(16)]]
RAW, FOUR = Slabs(32), Slabs(0, 0, 32)


@pytest.mark.parametrize("values", [False, True], ids=["keys", "values"])
def test_our_keys_and_calibrated_values_are_those_of_our_own_store(model, make_artifact, prompts, values):
    """The same prefill into our cache with a plan, and into one with these coders: bytes and logits."""
    plan = [[HeadPlan(RAW if values else key, FOUR if values else RAW) for key in heads] for heads in KEYS]
    artifact = make_artifact(plan=plan, prior_tokens=0, fallback=0.0)
    inputs = prompts.batch([[3, prompts.square, 4], [9, prompts.tall, 2]])
    with enable(model, artifact, backend="torch") as active, torch.inference_mode():
        kinds = [active.prepared.layer(i, torch.device("cpu"), torch.float32).kinds["visual"] for i in range(3)]
        sides = zip(*(kind.sides for kind in kinds), strict=True)
        key, value = ({i: Directions(s.mean, s.encode, s.decode, s.balance) for i, s in enumerate(some)} for some in sides)
        shape = geometry_of(model.config)
        if values:
            coder = CodedValues(name="x", geometry=shape, way="calibrated4", bases=value)
        else:
            coder = OurKeysCoder(name="x", geometry=shape, plan={i: tuple(heads) for i, heads in enumerate(KEYS)}, bases=key)
        recording = record(model, **inputs, logits_to_keep=1)
        caches = (
            fill(active.new_cache(), recording),
            fill(active.new_cache(coder), recording),
            fill(active.new_cache(NativeCoder(name="native", geometry=shape)), recording),
        )
        step = {"input_ids": torch.full((2, 3), 17), "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(2, 3)], 1).long()}
        own, coded, raw = (model(**step, past_key_values=cache).logits for cache in caches)
    assert torch.allclose(own, coded, atol=2e-5) and (own - raw).abs().max() > 1e-4
    for tokens in (64, 63):
        sides = (getattr(head, "value" if values else "key") for heads in plan for head in heads)
        other = 6 * 2 * 32 * tokens
        padded = sum(segment_bytes(slabs, 32, tokens + (tokens % 2) * (slabs.native < 32)) for slabs in sides)
        native = sum(2 * head.key.native * (tokens % 2) for heads in plan for head in heads if head.key.native < 32)  # never padded here
        assert sum(coder.bytes_of(tokens, i) for i in range(3)) == other + padded - native
        assert all(
            coder.code(i, *[torch.randn(2, tokens, 32)] * 2, torch.randn(2, 1, 4, 32)).bytes() == coder.bytes_of(tokens, i)
            for i in range(3)
        )


def test_refusals(shapes, bases):
    with pytest.raises(UsageError, match="unknown way to code Values 'int3'; choose one of int4"):
        CodedValues(name="x", geometry=shapes, way="int3")
    with pytest.raises(UsageError, match="calibrated Values need an artifact with bases"):
        CodedValues(name="x", geometry=shapes, way="calibrated4")
    layer = LayerGeometry(layer_type="full_attention", query_heads=4, kv_heads=2, head_dim=96)
    odd = Geometry(model_type="made", layers=(layer,), visual_token_ids=(5,))
    with pytest.raises(UsageError, match="Values by hadamard4 need a head_dim .* not 96"):
        CodedValues(name="x", geometry=odd, way="hadamard4")
