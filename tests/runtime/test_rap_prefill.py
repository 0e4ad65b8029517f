"""When a prefill's Keys and Values go to cuDNN at their own widths, and that this gives what padding gives; cuDNN itself only on a GPU."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from rap_cases import drawn_attention
from torch.nn import functional
from torch.nn.attention import SDPBackend
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rotatek_compile.rap_plan import Widths
from rotatek_compile.runtime import rap_kernels, rap_prefill

D, HQ, HKV, PAIRS, VALUE, B, S = 32, 4, 2, 8, 24, 2, 6
NARROW, WIDE = (2 * PAIRS, VALUE), (VALUE, VALUE)
sdpa = functional.scaled_dot_product_attention


@pytest.fixture(scope="module")
def module():
    """A pruned attention module with random weights, Values wider than Keys."""
    return drawn_attention(HQ, HKV, D, Widths(PAIRS, VALUE))


@pytest.fixture
def asked(monkeypatch):
    """Every call of torch's attention, (Key width, Value width, KV heads, causal), of which `wrong` scales those at two widths."""
    state = SimpleNamespace(calls=[], stored=[], wrong=1.0, raises=None)

    def recorded(query, keys, values, *args, **kwargs):
        widths = keys.shape[-1], values.shape[-1]
        state.stored.append(keys.shape[2])
        state.calls.append((widths, keys.shape[1], kwargs["is_causal"]))
        if widths == NARROW and state.raises:
            raise state.raises
        return sdpa(query, keys, values, *args, **kwargs) * (state.wrong if widths == NARROW else 1)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(rap_kernels, "_proven", {})
    return state


@pytest.fixture
def cudnn(asked, monkeypatch):
    """As if this were a GPU for which torch would take cuDNN; no Triton."""
    monkeypatch.setattr(rap_kernels, "runs_on", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for kernel in (rap_kernels.pairs, rap_kernels.narrow):
        monkeypatch.setattr(kernel, "supported", lambda *args: "not here")
    monkeypatch.setattr(rap_prefill, "cudnn_is_next", lambda *args: True)
    return asked


def run(module, mask=None, cache=None, new=S, at=0, **more):
    x = torch.randn(B, new, 32, generator=torch.Generator().manual_seed(at)).to(module.q_proj.weight)
    places = LlamaRotaryEmbedding(module.config).to(x.device)(x, torch.arange(at, at + new, device=x.device)[None])
    return module(x, position_embeddings=places, attention_mask=mask, past_key_values=cache, **more)[0]


def padded(module, **options):
    with rap_kernels.left_out():
        return run(module, **options)


def some_mask(keys=S, kind=torch.bool):
    """Causal, the first two tokens of the first row are padding, whose own queries see the first token nevertheless."""
    seen = torch.ones(B, 1, S, keys, dtype=torch.bool).tril(keys - S)
    seen[0, ..., 1:3] = False
    seen[..., 0] = True
    return seen if kind is torch.bool else torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, torch.finfo(kind).min)


@pytest.mark.parametrize("mask", [None, some_mask(), some_mask(kind=torch.float32)], ids=["causal", "mask", "added mask"])
def test_at_both_widths_as_with_padding(module, cudnn, mask):
    expected = padded(module, mask=mask)
    assert {call[0] for call in cudnn.calls} == {WIDE}
    cudnn.calls.clear()
    assert torch.allclose(run(module, mask=mask), expected, atol=1e-5)
    # tried beside the padded form, KV heads not repeated, then used
    assert cudnn.calls == [(widths, HKV, mask is None) for widths in (WIDE, NARROW, NARROW)]
    cudnn.calls.clear()
    run(module, mask=mask)
    assert cudnn.calls == [(NARROW, HKV, mask is None)]


def test_a_chunk_after_another(module, cudnn):
    """New tokens are fewer than Keys, with the mask that transformers gives."""
    outputs = []
    for once in (run, padded):
        cache = DynamicCache()
        outputs.append([once(module, cache=cache), once(module, cache=cache, at=S, mask=some_mask(2 * S))])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*outputs, strict=True))
    assert [call[0] for call in cudnn.calls] == [WIDE, NARROW, NARROW] * 2 + [WIDE] * 2


def test_a_static_cache_s_empty_places_are_not_seen(module, cudnn):
    outputs = []
    for once in (run, padded):
        cache = StaticCache(module.config, max_cache_len=20)
        cache.early_initialization(B, HKV, D, torch.float32, torch.device("cpu"))
        cache.layers[0].keys, cache.layers[0].values = torch.zeros(B, HKV, 20, 2 * PAIRS), torch.zeros(B, HKV, 20, VALUE)
        outputs.append(once(module, cache=cache))
    assert cudnn.calls[1][0] == NARROW and cudnn.stored == [S] * 4 and torch.allclose(*outputs, atol=1e-5)


def test_the_module_may_not_be_causal(module, cudnn):
    expected = padded(module, is_causal=False)
    cudnn.calls.clear()
    assert torch.allclose(run(module, is_causal=False), expected, atol=1e-5) and not any(call[2] for call in cudnn.calls)
    assert not torch.allclose(run(module), expected, atol=1e-2)


@pytest.mark.parametrize("broken", ["wrong", "raises"])
def test_what_is_not_right_is_padded_with_one_warning(module, cudnn, broken):
    expected = padded(module)
    cudnn.wrong, cudnn.raises = (1.001, None) if broken == "wrong" else (1.0, RuntimeError("No valid execution plans\nbuilt."))
    why = "it is off by 0.001" if broken == "wrong" else "RuntimeError: No valid execution plans$"
    words = "^attention by cuDNN at two widths is not used on cpu in torch.float32, padded heads are: "
    with pytest.warns(UserWarning, match=words + why) as seen:
        assert torch.equal(run(module), expected)
    cudnn.calls.clear()
    assert len(seen) == 1 and torch.equal(run(module), expected) and [call[0] for call in cudnn.calls] == [WIDE]


def test_a_sum_in_which_all_cancels_is_no_error(monkeypatch):
    """One row of 64 a thousandth of the others, and as far off as they are: of those 0.003, beside itself three times its length."""
    right = torch.ones(1, 64, 1, 8)
    right[:, 7] *= 1e-3
    assert rap_kernels._difference(right + 3e-3, right) == pytest.approx(3e-3, rel=0.02)
    right[:, 7] = 1
    wrong = right.clone()
    wrong[:, 7] = 0
    assert rap_kernels._difference(wrong, right) == pytest.approx(1)


def test_padding_that_sees_nothing_proves_nothing_wrong(module, cudnn):
    """Its queries may come out as NaN."""
    mask = some_mask(kind=torch.float32)
    mask[0, :, 1] = float("nan")
    run(module, mask=mask)
    assert list(rap_kernels._proven.values()) == [True]


def test_where_it_is_padded(module, cudnn, monkeypatch):
    def widths(**options):
        cudnn.calls.clear()
        run(module, **options)
        return {call[0] for call in cudnn.calls}

    assert NARROW in widths()
    assert widths(output_attentions=True) == {WIDE}
    with torch.autograd.forward_ad.dual_level():
        assert widths() == {WIDE}
    module.requires_grad_(True)
    try:
        assert widths() == {WIDE}
    finally:
        module.requires_grad_(False)
    monkeypatch.setattr(module, "attention_dropout", 0.5)
    assert widths() == {NARROW}
    module.train()
    try:
        assert widths() == {WIDE}
    finally:
        module.eval()
    monkeypatch.setattr(module, "whole", True)
    assert widths() == {(D, D)}
    monkeypatch.undo()


def test_a_compiler_and_a_capture_see_padding(module, cudnn, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run(module)
    assert [call[0] for call in cudnn.calls] == [WIDE]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    expected = run(module)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", sdpa)
    seen = []
    monkeypatch.setattr(rap_prefill, "cudnn_is_next", lambda *args: seen.append(1) or True)
    x = torch.randn(B, S, 32, generator=torch.Generator().manual_seed(0))
    places = LlamaRotaryEmbedding(module.config)(x, torch.arange(S)[None])
    step = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.allclose(step(x, position_embeddings=places)[0], expected, atol=1e-5) and not seen


def test_on_a_cpu_cudnn_is_not_even_asked(module, asked, monkeypatch):
    monkeypatch.setattr(rap_prefill, "can_use_cudnn_attention", lambda *args: pytest.fail("asked"))
    run(module)
    assert [call[0] for call in asked.calls] == [WIDE] and not rap_kernels._proven
    tensors = (torch.zeros(1, 1, 2, 8),) * 3
    assert not rap_prefill.cudnn_is_next(*tensors, None, True)


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("next_one", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_cudnn_must_be_able_and_be_torch_s_choice(monkeypatch, able, next_one):
    """Torch chooses among the kernels that the user has left, and fails where none takes two widths: it is not asked then."""
    told = []
    monkeypatch.setattr(rap_prefill, "SDPAParams", lambda *args: told.append(args[3:]) or args)
    monkeypatch.setattr(rap_prefill, "can_use_cudnn_attention", lambda params: able)
    monkeypatch.setattr(
        torch, "_fused_sdp_choice", lambda *args, **kwargs: told.append((*args[3:], kwargs["enable_gqa"])) or next_one.value
    )
    query, keys = SimpleNamespace(is_cuda=True, shape=(1, 4, 2, 8)), SimpleNamespace(shape=(1, 2, 2, 8))
    assert rap_prefill.cudnn_is_next(query, keys, None, "mask", False) == (able and next_one is SDPBackend.CUDNN_ATTENTION)
    assert told == [("mask", 0.0, False, True)] * (1 + able)


def test_the_choice_of_the_torch_that_is_installed():
    """Both questions exist with these arguments; without a GPU the answers are no, and not cuDNN."""
    q, k, v = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 8)
    if not torch.version.cuda:
        assert not rap_prefill.can_use_cudnn_attention(rap_prefill.SDPAParams(q, k, v, None, 0.0, True, True))
    assert torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=True) != SDPBackend.CUDNN_ATTENTION.value


WIDTHS = [(128, 48), (112, 64), (96, 80), (80, 96), (64, 112), (8, 128), (24, 16), (40, 8)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("key", "value"), WIDTHS)
def test_cudnn_at_two_widths(monkeypatch, key, value, masked, group):
    """In bf16 as near to padded heads in fp32 as kernels must be, also at lengths that fill no tile; skipped without cuDNN."""
    monkeypatch.setattr(rap_kernels, "_proven", {})
    draw = torch.Generator("cuda").manual_seed(key)
    for new, stored in ((300, 300), (129, 129), (17, 400) if masked else (1024, 1024)):
        query = torch.randn(2, 2 * group, new, key, generator=draw, device="cuda").bfloat16()
        keys, values = (torch.randn(2, 2, stored, width, generator=draw, device="cuda").bfloat16() for width in (key, value))
        mask = torch.ones(2, 1, new, stored, dtype=torch.bool, device="cuda").tril(stored - new) if masked else None
        if masked:
            mask[0, ..., 1:9] = False
        found = rap_prefill.attend(query, keys, values, mask, 0.1, not masked)
        assert (found is not None) == rap_prefill.cudnn_is_next(query, keys, values, mask, not masked)
        if found is None:
            pytest.skip("torch would not take cuDNN here")
        wide = [x.float() for x in rap_prefill.equal_widths(query, keys, values)]
        expected = sdpa(*wide, attn_mask=mask, is_causal=not masked, scale=0.1, enable_gqa=True)[..., :value].transpose(1, 2)
        assert found.shape == (2, new, 2 * group, value) and rap_kernels._difference(found, expected) < rap_kernels.LIMITS[torch.bfloat16]
    assert list(rap_kernels._proven.values()) == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_user_s_choice_of_kernels_holds(module):
    """Without cuDNN a prefill is padded: nothing fails, nothing is warned about."""
    moved = copy.deepcopy(module).to("cuda", torch.bfloat16)
    moved.pairs = module.pairs.cuda()
    outputs = []
    for chosen in (nullcontext(), torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION)):
        with chosen:
            outputs.append(run(moved))
    assert float((outputs[0] - outputs[1]).float().norm() / outputs[1].float().norm()) < 1e-2
