"""A cache filled from a recording is the cache that prefill would have made: every tensor, every later logit."""

import copy

import pytest
import torch
from palu_cases import made_factors
from transformers.cache_utils import DynamicCache

from rotatek_compile.errors import RotateKError
from rotatek_compile.geometry import geometry_of
from rotatek_compile.runtime.accounting import cache_bytes, cache_tensors
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.recording import LayerRecord, fill, record, stock_cache
from rotatek_compile.runtime.rivals.leank_learned import LearnedScales
from rotatek_compile.runtime.rivals.registry import RIVALS, make_coder

MIXED = [[8, 24], [0, 16], [0, 0]]
STATE = {
    "knockout": {i: torch.tensor([0.5, 1.0]) for i in range(3)},
    "energy": {i: torch.rand(2, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)},
}
STATE["leank-learned"] = LearnedScales(STATE["energy"], {})


@pytest.fixture(scope="module")
def long(prompts):
    """Left-padded, images of several sizes, text that is older than the window."""
    p = prompts
    return p.batch([[3, p.square, 150], [50, p.square, 1, p.tall, 2, p.wide, 7], [25]])


def coder_of(name, geometry):
    if name is None:
        return None
    ratio = 0.5 if "keep_ratio" in RIVALS[name].settings else None
    return make_coder(name, geometry, keep_ratio=ratio, state=STATE | {"palu": made_factors(geometry)})


def decode(model, inputs, cache, steps=3):
    """Logits of a few tokens that are the same for every cache."""
    mask, out = inputs["attention_mask"], []
    for step in range(steps):
        ids = torch.full((len(mask), 1 if step else 40), 17 + step)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out.append(model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1])
    return torch.stack(out)


@pytest.mark.parametrize(
    ("name", "options"),
    [(None, {"basis": "two-sided", "fallback": 1.0}), (None, {"basis": "paper", "span": "all"}), *((name, {}) for name in RIVALS)],
)
def test_filled_is_prefilled(model, geometry, long, make_artifact, name, options):
    with torch.inference_mode(), enable(model, make_artifact(MIXED, **options), backend="torch") as enabled:
        real = enabled.new_cache(coder_of(name, geometry))
        logits = model(**long, past_key_values=real).logits
        recording = record(model, **long)
        filled = fill(enabled.new_cache(coder_of(name, geometry)), recording)
        assert torch.equal(recording.logits, logits)
        assert filled.get_seq_length() == real.get_seq_length() == long["input_ids"].shape[1]
        for one, two in zip(filled.layers, real.layers, strict=True):
            ours, theirs = one.store.tensors(), two.store.tensors()
            assert list(ours) == list(theirs)
            for key in ours:
                if key == "windows":  # slack may hold anything
                    for row, length in enumerate(one.store.window.host):
                        assert torch.equal(ours[key][:, row, :, :length], theirs[key][:, row, :, :length])
                else:
                    assert torch.equal(ours[key], theirs[key]), key
            assert (one.store.table == two.store.table).all()
            assert (one.tail, one.logical_length) == (two.tail, two.logical_length)
            if name is not None:
                for mine, other in zip(one.spans.rows, two.spans.rows, strict=True):
                    for a, b in zip(mine, other, strict=True):
                        assert list(a.parts) == list(b.parts)
                        assert all(torch.equal(a.parts[part].float(), b.parts[part].float()) for part in a.parts)
        assert cache_bytes(filled) == cache_bytes(real)
        assert cache_bytes(filled).span > 0
        assert torch.equal(decode(model, long, filled), decode(model, long, real))


def test_a_recording_fills_many_caches_and_keeps_nothing_of_them(model, geometry, long, make_artifact):
    with torch.inference_mode(), enable(model, make_artifact(MIXED), backend="torch") as enabled:
        recording = record(model, **long)
        before = copy.deepcopy(recording)
        first = fill(enabled.new_cache(), recording)
        expected = decode(model, long, first)
        fill(enabled.new_cache(make_coder("think", geometry, keep_ratio=0.5)), recording)
        assert torch.equal(decode(model, long, fill(enabled.new_cache(), recording)), expected)
        kept = {t.untyped_storage().data_ptr() for layer in recording.layers for t in (layer.query, layer.keys, layer.values)}
        assert not kept & {t.untyped_storage().data_ptr() for t in cache_tensors(first)}
        for now, then in zip(recording.layers, before.layers, strict=True):
            assert torch.equal(now.keys, then.keys) and torch.equal(now.values, then.values)
        with pytest.raises(RotateKError, match="only an empty cache can be filled"):
            fill(first, recording)


def test_stock_cache_is_a_real_one(model, long, make_artifact):
    with torch.inference_mode():
        with enable(model, make_artifact(), backend="torch"):
            recording = record(model, **long, logits_to_keep=1)
        assert recording.logits.shape[1] == 1
        real, ours = DynamicCache(config=model.config.text_config), stock_cache(model.config, recording)
        model(**long, past_key_values=real)
        assert type(ours) is DynamicCache
        for one, two in zip(ours.layers, real.layers, strict=True):
            assert type(one) is type(two)
            assert torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values)
        assert torch.equal(decode(model, long, ours), decode(model, long, real))
        again = stock_cache(model.config, recording)
        assert torch.equal(again.layers[0].keys, recording.layers[0].keys)  # decoding on one leaves the recording alone


@pytest.fixture(scope="module")
def sliding():
    """A text model whose second layer sees 16 tokens back only."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        use_sliding_window=True, sliding_window=16, layer_types=["full_attention", "sliding_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).float().eval()


def test_layers_that_are_not_full_attention(sliding, make_artifact):
    ids = torch.randint(6, 97, (2, 50), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    geometry = geometry_of(sliding.config)
    artifact = make_artifact(shape=geometry)
    with torch.inference_mode(), enable(sliding, artifact, backend="torch") as enabled:
        real, stock = enabled.new_cache(), DynamicCache(config=sliding.config)
        sliding(**inputs, past_key_values=real)
        sliding(**inputs, past_key_values=stock)
        recording = record(sliding, **inputs)
        assert [isinstance(layer, LayerRecord) for layer in recording.layers] == [True, False, True]
        expected, dense = decode(sliding, inputs, real), decode(sliding, inputs, stock)
        for _ in range(2):  # decoding on one filled cache must not touch the recorded sliding layer
            assert torch.equal(decode(sliding, inputs, fill(enabled.new_cache(), recording)), expected)
            ours = stock_cache(sliding.config, recording)
            assert [type(layer) for layer in ours.layers] == [type(layer) for layer in stock.layers]
            assert torch.equal(decode(sliding, inputs, ours), dense)


def test_wrong_uses(model, long, make_artifact, sliding):
    with torch.inference_mode():
        with pytest.raises(RotateKError, match="inside `with enable"):
            record(model, **long)
        with enable(model, make_artifact(), backend="torch") as enabled:
            with pytest.raises(RotateKError, match="leave past_key_values out"):
                record(model, **long, past_key_values=enabled.new_cache())
            recording = record(model, **long)
        with pytest.raises(RotateKError, match="the recording has 3 layers, the cache 2"):
            config = copy.deepcopy(model.config)
            config.text_config.num_hidden_layers = 2
            stock_cache(config, recording)
