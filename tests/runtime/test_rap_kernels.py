"""When pruned attention uses its kernels: proven first on the call's own numbers, left out with one warning where they are wrong."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from rap_cases import drawn_attention
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rotatek_compile.kernels.narrow_torch import narrow_attention_torch
from rotatek_compile.kernels.pairs_torch import turned
from rotatek_compile.rap_plan import Widths
from rotatek_compile.runtime import rap_kernels, rap_prefill

HERE = Path(__file__).resolve().parent
D, HQ, HKV, PAIRS, VALUE = 32, 4, 2, 8, 24


class Fakes:
    """Kernels in the place of Triton's: right ones, unless told otherwise, that count their calls."""

    def __init__(self):
        self.turns, self.attends, self.wrong, self.capturing, self.raises = 0, 0, 1.0, False, None

    def turn(self, q, k, cos, sin, pairs):
        self.turns += 1
        if self.raises:
            raise self.raises
        for x in (q, k):
            x.copy_(turned(x, cos, sin, pairs) * self.wrong)

    def attend(self, q, keys, values, scaling):
        self.attends += 1
        return narrow_attention_torch(q, keys, values, scaling) * self.wrong


@pytest.fixture
def fakes(monkeypatch):
    made = Fakes()
    monkeypatch.setattr(rap_kernels, "runs_on", lambda device: True)
    monkeypatch.setattr(rap_kernels, "_proven", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(rap_kernels.pairs, "turn", made.turn)
    monkeypatch.setattr(rap_kernels.narrow, "narrow_attention", made.attend)
    return made


@pytest.fixture(scope="module")
def module():
    """A pruned attention module with random weights."""
    return drawn_attention(HQ, HKV, D, Widths(PAIRS, VALUE))


def run(module, tokens=(6, 1, 1), more=None, cache=True):
    """Outputs of a prefill and of steps over a dynamic cache."""
    rope, past, at, outputs = LlamaRotaryEmbedding(module.config), DynamicCache() if cache else None, 0, []
    for n, count in enumerate(tokens):
        x = torch.randn(2, count, 32, generator=torch.Generator().manual_seed(n))
        places = rope(x, torch.arange(at, at + count)[None])
        outputs.append(module(x, position_embeddings=places, attention_mask=None, past_key_values=past, **(more or {}))[0])
        at += count
    return outputs


def test_on_a_cpu_nothing_is_different(module, monkeypatch):
    """Bit for bit what the torch functions give; kernels are not even asked for."""
    for name in ("turn", "narrow_attention"):
        monkeypatch.setattr(rap_kernels.pairs if name == "turn" else rap_kernels.narrow, name, None)
    plain = run(module)
    with rap_kernels.left_out():
        assert all(torch.equal(a, b) for a, b in zip(plain, run(module), strict=True))


def test_kernels_are_proven_once_and_used(module, fakes):
    with rap_kernels.left_out():
        expected = run(module)
    assert (fakes.turns, fakes.attends) == (0, 0)
    found = run(module)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert (fakes.turns, fakes.attends) == (2 + 2 + 1, 2 + 1)  # a prefill's and a step's first call run twice
    assert list(rap_kernels._proven.values()) == [True, True, True]
    run(module)
    assert (fakes.turns, fakes.attends) == (8, 5)


@pytest.mark.parametrize("broken", ["wrong", "nan", "does not compile"])
def test_a_kernel_that_is_not_right_is_left_out_with_one_warning(module, fakes, broken):
    expected = run_with_torch(module)
    fakes.wrong = {"wrong": 1.001, "nan": float("nan")}.get(broken, 1.0)
    fakes.raises = RuntimeError("ptxas is not\nhere") if broken == "does not compile" else None
    with pytest.warns(UserWarning) as seen:
        found = run(module)
    words = [str(one.message) for one in seen]
    assert sum("kept pairs is not used on cpu in torch.float32, torch is" in one for one in words) == 2  # a prefill's, and a step's
    assert sum("narrow attention" in one for one in words) == (broken != "does not compile")
    assert all(({"wrong": "off by 0.001", "nan": "off by inf"}.get(broken, "RuntimeError: ptxas is not")) in one for one in words)
    assert all(torch.allclose(a, b, atol=1e-4 if broken == "does not compile" else 0) for a, b in zip(found, expected, strict=True))
    calls = fakes.turns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(module)
    assert fakes.turns == calls


def run_with_torch(module):
    with rap_kernels.left_out():
        return run(module)


def test_an_error_in_one_small_head_is_seen(fakes):
    """Over the largest number of all heads it would be 1e-6."""
    right = torch.randn(1, 1, 4, 8)
    right[:, :, 2] *= 1e-6
    wrong = right.clone()
    wrong[:, :, 2] *= 1.01
    with pytest.warns(UserWarning, match="off by 0.01"):
        assert not rap_kernels.proven(("x", "y", "z"), lambda: [wrong], lambda: [right])


def test_what_is_not_finite_proves_nothing(fakes):
    right = torch.tensor([[1.0, float("inf")]])
    assert not rap_kernels.proven(("x",), lambda: [right], lambda: [right]) and not rap_kernels._proven


def test_capturing_uses_only_what_is_proven(module, fakes):
    """No comparison waits for the device while a CUDA graph is captured."""
    fakes.capturing = True
    expected = run_with_torch(module)
    assert all(torch.equal(a, b) for a, b in zip(run(module), expected, strict=True))
    assert (fakes.turns, fakes.attends) == (0, 0) and not rap_kernels._proven
    fakes.capturing = False
    run(module)
    before = fakes.turns, fakes.attends
    fakes.capturing = True
    run(module)
    assert (fakes.turns, fakes.attends) == (before[0] + 3, before[1] + 2)


def test_where_torch_does_it(module, fakes):
    """Gradients, hooks that keep a projection's output, whole heads, several tokens, arguments that mean another attention."""
    run(module)
    fakes.turns = fakes.attends = 0

    def used(**options):
        before = fakes.turns, fakes.attends
        run(module, **options)
        return fakes.turns - before[0], fakes.attends - before[1]

    assert used() == (3, 2)
    kept = []
    handle = module.k_proj.register_forward_hook(lambda _, args, out: kept.append((out, out.clone())))
    assert used() == (0, 2) and len(kept) == 3 and all(torch.equal(*pair) for pair in kept)
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *seen: None)
    assert used() == (0, 2)
    handle.remove()
    inner = module.q_proj
    module.q_proj = torch.nn.Sequential(inner)  # as an adapter wraps it, with a hook inside
    handle = inner.register_forward_hook(lambda _, args, out: kept.append((out, out.clone())))
    assert used() == (0, 2) and len(kept) == 6 and all(torch.equal(*pair) for pair in kept)
    handle.remove()
    module.q_proj = inner
    with torch.autograd.forward_ad.dual_level():
        assert used() == (0, 0)
    assert used() == (3, 2)
    assert used(more={"output_attentions": True}) == (3, 0)
    assert used(more={"output_attentions": False, "position_bias": None}) == (3, 2)
    assert used(tokens=(3, 1)) == (2, 1) and used(tokens=(6, 3), cache=False) == (2, 0)
    for name, value in (("whole", True), ("sliding_window", 7)):
        before = getattr(module, name)
        setattr(module, name, value)
        try:  # a window of 7: the first step has 7 Keys, the second 8
            assert used() == ((3, 0) if name == "whole" else (3, 1))
        finally:
            setattr(module, name, before)
    module.requires_grad_(True)
    try:
        assert used() == (0, 0)
        with torch.no_grad():
            assert used() == (3, 2)
    finally:
        module.requires_grad_(False)
    module.config._attn_implementation = "eager"
    try:
        assert used(tokens=(1, 1)) == (2, 0)
    finally:
        module.config._attn_implementation = "sdpa"


def test_a_compiler_sees_torch_alone(module, fakes):
    """One graph, without a kernel in it; what was proven before changes nothing."""
    run(module)
    fakes.turns = fakes.attends = 0
    places, x = LlamaRotaryEmbedding(module.config)(torch.zeros(1), torch.tensor([[4]])), torch.randn(2, 1, 32)
    step = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.allclose(step(x, position_embeddings=places)[0], run_once(module, x, places), atol=1e-6)
    assert (fakes.turns, fakes.attends) == (0, 0)


def run_once(module, x, places):
    with rap_kernels.left_out():
        return module(x, position_embeddings=places)[0]


def test_a_mask_is_for_torch(module, fakes):
    run(module)
    rope, x = LlamaRotaryEmbedding(module.config), torch.randn(1, 1, 32)
    mask = torch.zeros(1, 1, 1, 1)
    before = fakes.attends
    module(x, position_embeddings=rope(x, torch.zeros(1, 1)), attention_mask=mask)
    assert fakes.attends == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(module, monkeypatch, dtype):
    """Without a warning: every kernel is proven there, and used. The prefill is padded: test_rap_prefill.py has the other way."""
    monkeypatch.setattr(rap_kernels, "_proven", {})
    monkeypatch.setattr(rap_prefill, "cudnn_is_next", lambda *args: False)
    moved = copy.deepcopy(module).to("cuda", dtype)
    moved.pairs = module.pairs.cuda()
    rope, outputs = LlamaRotaryEmbedding(module.config).to("cuda"), []
    for kernels in (nullcontext(), rap_kernels.left_out()):
        past, at = DynamicCache(), 0
        with kernels, warnings.catch_warnings():
            warnings.simplefilter("error")
            for n, count in enumerate((300, 1, 1)):
                x = torch.randn(2, count, 32, generator=torch.Generator().manual_seed(n)).to("cuda", dtype)
                places = rope(x, torch.arange(at, at + count, device="cuda")[None])
                outputs.append(moved(x, position_embeddings=places, attention_mask=None, past_key_values=past)[0])
                at += count
    assert list(rap_kernels._proven.values()) == [True] * 3
    for found, expected in zip(outputs[:3], outputs[3:], strict=True):
        assert float((found - expected).float().norm() / expected.float().norm()) < rap_kernels.LIMITS[dtype]
    assert torch.equal(outputs[0], outputs[3])  # RoPE is the same to the bit, and nothing else differs at prefill


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_model_answers_alike_with_the_kernels_interpreted():
    command = [sys.executable, str(HERE.parents[1] / "tools" / "run_in_checkout.py"), str(HERE / "rap_interpreted.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same"] and result["error"] < 1e-4
    # three layers, a prefill and five steps; once more for what is tried: two numbers of pairs at prefill and at a step, three widths
    assert result["calls"] == {"turn": 3 * 6 + 4, "narrow_attention": 3 * 5 + 3} and result["proven"] == [True] * 7
