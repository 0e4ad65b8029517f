"""Captured decoding with real CUDA graphs, and of models with another package's kernels."""

import warnings

import pytest
import torch
from transformers.models.llama import modeling_llama

from rotatek_compile.geometry import geometry_of
from rotatek_compile.runtime import graphs
from rotatek_compile.runtime.enable import enable


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch):
    monkeypatch.setattr(graphs, "STRETCH", 24)
    monkeypatch.setattr(graphs, "STEADY", 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("span", "ranks"), [("visual", [[8, 24], [0, 64], [16, 64]]), ("all", 64)])
def test_on_a_gpu(make_model, make_artifact, ragged, generate, check_equal, span, ranks):
    """Real graphs, captured anew as text leaves the windows, and the allocator used in between."""
    model = make_model(head_dim=64).cuda()
    artifact = make_artifact(ranks, geometry_of(model.config), span=span)
    inputs = {name: x.cuda() for name, x in ragged.items()}
    got = []
    for captured in (False, True, True):
        with enable(model, artifact, backend="triton", graphs=captured) as one, warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*CUDA graph.*")
            got.append(generate(model, inputs, 150))
            assert not captured or (one.graphs.compared and any(history.captured for history in one.graphs.histories.values()))
        torch.empty(2**24, device="cuda").fill_(float("nan"))
    check_equal(got[1], got[0], 2e-3 if span == "all" else 1e-4)
    assert torch.equal(got[2].logits, got[1].logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_with_liger_kernel(make_model, make_artifact, ragged, generate, check_equal, monkeypatch):
    """A model whose norms, RoPE and MLP are another package's kernels is captured, and writes what it wrote before."""
    liger = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    inputs = {name: x.cuda() for name, x in ragged.items()}
    got = []
    for patched in (False, True):
        if patched:
            for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
                monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))  # the package replaces them for good
            liger.apply_liger_kernel_to_llama(fused_linear_cross_entropy=False)
        model = make_model(head_dim=64).cuda()
        assert type(model.model.language_model.norm).__name__ == ("LigerRMSNorm" if patched else "LlamaRMSNorm")
        with enable(model, make_artifact(64, geometry_of(model.config)), backend="triton") as one, warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*CUDA graph.*")
            got.append(generate(model, inputs, 60))
            assert one.graphs.compared and any(history.captured for history in one.graphs.histories.values())
    check_equal(got[1], got[0], 1e-4)
