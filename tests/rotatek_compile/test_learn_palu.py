"""What Palu learns, and what its cache rebuilds, against a factorisation of the weights themselves; one and three position axes."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rotatek_compile.errors import UsageError
from rotatek_compile.evaluate import Evaluator
from rotatek_compile.geometry import geometry_of
from rotatek_compile.learn_palu import fisher_information, image_tokens, learn_palu, projections
from rotatek_compile.learned import load_learned
from rotatek_compile.methods import Methods
from rotatek_compile.rap_reading import read
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.rivals.palu import state_of
from rotatek_compile.runtime.rivals.registry import make_coder
from rotatek_compile.token_entries import token_entries

_spec = importlib.util.spec_from_file_location("rotatek_mrope_cases", Path(__file__).parent / "test_mrope.py")
_cases = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _cases
_spec.loader.exec_module(_cases)

OPTIONS = {"batch_size": 2, "pad_id": 0, "quiet": True}


def drawn(made):
    """A Qwen-VL with random weights, k-norm gains that differ by channel among them, and its documents."""
    model_class, config = made()
    torch.manual_seed(3)
    model = model_class(config).float().eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "visual" not in name:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 1.5 * weight.shape[1] ** -0.5)
        elif "k_norm" in name or ("k_proj.bias" in name and "visual" not in name):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model, _cases.items.__wrapped__(model)


@pytest.fixture(scope="module", params=["llava_next", "qwen3_vl", "qwen2_5_vl"])
def case(request, tiny, documents):
    """Model, documents and geometry: plain RoPE; M-RoPE and k-norm; M-RoPE and biases."""
    model, items = (tiny, documents) if request.param == "llava_next" else drawn(getattr(_cases, request.param))
    return model, items, geometry_of(model.config)


@pytest.fixture(scope="module")
def learned(case):
    model, items, geometry = case
    return state_of(learn_palu(model, items, geometry, **OPTIONS), geometry, {})


def caught(model, items, geometry):
    """By document and layer: what enters k_proj and v_proj [T, hidden], cosines and sines, and which tokens are of images."""
    found = []
    layers = [module for module in model.modules() if hasattr(module, "k_proj") and hasattr(module, "layer_idx")]

    def into(seen):
        def note(module, args, kwargs):
            seen[module.layer_idx] = kwargs["hidden_states"][0], kwargs["position_embeddings"]

        return note

    with torch.no_grad():
        for item in items:
            batch, seen = read(model, [item], geometry, 0), {}
            hooks = [module.register_forward_pre_hook(into(seen), with_kwargs=True) for module in layers]
            model(**batch.inputs)
            for hook in hooks:
                hook.remove()
            found.append((seen, image_tokens(batch, geometry)[0]))
    return layers, found


def factored(projection, inputs, rank):
    """A [hidden + 1, r] and B [r, g·D] of least E|x W - x A B|²: truncated SVD of the whitened weight, the bias as a constant input."""
    weight = projection.weight.detach().double().T
    bias = torch.zeros(1, weight.shape[1]) if projection.bias is None else projection.bias.detach()[None]
    weight, inputs = torch.cat([weight, bias.double()]), with_one(inputs)
    energies, axes = torch.linalg.eigh(inputs.T @ inputs)
    roots = energies.clamp_min(0).sqrt()
    inverse = torch.where(roots > 1e-6 * roots.max(), 1 / roots, 0.0)
    left, values, right = torch.linalg.svd(axes @ torch.diag(roots) @ axes.T @ weight, full_matrices=False)
    return axes @ torch.diag(inverse) @ axes.T @ left[:, :rank] @ torch.diag(values[:rank]), right[:rank]


def with_one(inputs):
    return torch.cat([inputs.double(), torch.ones(len(inputs), 1, dtype=torch.float64)], 1)


def test_rebuilt_are_those_of_factored_weights(case, learned, make_artifact):
    model, items, geometry = case
    coder = make_coder("palu", geometry, keep_ratio=0.25, state={"palu": learned})
    layers, found = caught(model, items, geometry)
    batch = read(model, items, geometry, 0)
    with torch.no_grad(), enable(model, make_artifact(shape=geometry), backend="torch") as enabled:
        cache = enabled.new_cache(coder)
        model(**batch.inputs | {"use_cache": True}, past_key_values=cache)
    rotary = sys.modules[type(layers[0]).__module__].apply_rotary_pos_emb
    far = {"key": 0.0, "value": 0.0}
    for module in layers:
        layer, shape = module.layer_idx, geometry.layers[module.layer_idx]
        every = torch.cat([seen[layer][0][visual] for seen, visual in found])
        for row, (seen, visual) in enumerate(found):
            inputs, angles = seen[layer]
            made = []
            for side, projection in (("key", module.k_proj), ("value", module.v_proj)):
                a, b = factored(projection, every, coder.ranks[layer, side, 0])
                made.append((with_one(inputs[visual]) @ a @ b).float().unflatten(-1, (shape.kv_heads, -1)))
            keys = made[0] if getattr(module, "k_norm", None) is None else module.k_norm(made[0]).detach()
            turned = rotary(keys.transpose(0, 1)[None], keys.transpose(0, 1)[None], *(x[:, visual] for x in angles))[1][0]
            segments = [segment.rebuild() for segment in cache.layers[layer].spans.rows[row]]
            got_keys, got_values = (torch.cat(parts, 1) for parts in zip(*segments, strict=True))
            assert (got_keys - turned).abs().max() < 1e-4 and (got_values - made[1].transpose(0, 1)).abs().max() < 1e-4
            exact = {"key": module.k_proj(inputs[visual]).detach(), "value": module.v_proj(inputs[visual]).detach()}
            for side, kept in zip(exact, made, strict=True):
                far[side] = max(far[side], float((kept.flatten(1) - exact[side]).abs().max()))
    assert min(far.values()) > 0.1  # a quarter of the dimensions are not all


def test_fisher_information(case):
    """Against gradients taken one by one."""
    model, items, geometry = case
    before = [p.requires_grad for p in model.parameters()]
    found = fisher_information(model, projections(model, geometry), items, geometry, 0, True)
    assert [p.requires_grad for p in model.parameters()] == before and all(p.grad is None for p in model.parameters())
    modules = projections(model, geometry)
    weights = [module.weight for module in modules.values()]
    totals = [torch.zeros_like(weight) for weight in weights]
    for item in items:
        batch = read(model, [item], geometry, 0)
        logits = model(**batch.inputs).logits[0]
        start = len(item.prompt) - 1
        logprobs = logits[start : start + len(item.answer)].log_softmax(-1)
        loss = -sum(logprobs[n, token] for n, token in enumerate(item.answer)) / len(item.answer)
        for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
            total += gradient**2
    for (layer, side), total in zip(modules, totals, strict=True):
        assert found[layer, side, 0] == pytest.approx(float((total / len(items)).sqrt().mean()), rel=1e-3)
    assert len(set(found.values())) == 2 * len(geometry.layers)


def test_batches_change_nothing(case, learned):
    """Padding and text are left out: the same directions, up to sign, from documents one by one."""
    model, items, geometry = case
    again = state_of(learn_palu(model, items, geometry, **OPTIONS | {"batch_size": 1}), geometry, {})
    for place, basis in learned.directions.items():
        same = (basis[:, :8] * again.directions[place][:, :8]).sum(0).abs()
        assert (same > 0.999).all()
        assert learned.fisher[place] == pytest.approx(again.fisher[place])


def test_an_evaluation(case, learned, make_artifact, fake_processor):
    """Recorded and prefilled caches answer alike; nearly all dimensions are nearly dense, few are not."""
    model, items, geometry = case
    run = Evaluator(model, fake_processor, "after", (_cases.EOS,), 4)
    artifact = make_artifact(8, shape=geometry)
    with enable(model, artifact, backend="torch") as active:
        bare = Methods(active)
        with pytest.raises(UsageError, match="palu4 needs what it learned by training; name the file with --learned"):
            bare.chosen(["palu4"], (0.5,), ())
        assert bare.rival_in_suite("palu") == [] and not active.projections
        methods = Methods(active, learned={"palu": learned})
        assert {entry.kv_budget for entry in methods.rival_in_suite("palu")} == {0.5, 0.25, 0.125}  # 8 of 64 dimensions are the least
        entries = [methods.dense(), *methods.chosen(["palu", "palu4"], (), (1.0, 0.25))]
        assert all(entry.axis == "kv" and not entry.calibrated for entry in entries)
        with pytest.raises(UsageError, match="palu codes heads jointly, snapkv keeps other tokens in each; use fastv"):
            token_entries(methods, ["palu"], (), (0.5,), ["snapkv"], (0.5,))
        prefilled = run.prefill(items)
        dense, whole, few, whole4, few4 = (run.finish(prefilled, entry.make()) for entry in entries)
        own = run.answer(items, entries[2].make())
    assert few.bytes == own.bytes and all(torch.equal(a, b) for a, b in zip(few.logprobs, own.logprobs, strict=True))
    kl = [
        max(float((a.exp() * (a - b)).sum(-1).abs().max()) for a, b in zip(dense.logprobs, other.logprobs, strict=True))
        for other in (whole, few, whole4, few4)
    ]
    assert kl[0] < 1e-6 < kl[2] < kl[1] and kl[2] < kl[3]
    assert few.bytes.span == whole.bytes.span / 4


def test_documents_without_images(case):
    model, items, geometry = case
    bare = [replace(item, prompt=[t for t in item.prompt if t not in geometry.visual_token_ids], media={}) for item in items]
    bare = [replace(item, positions=None) for item in bare]
    with pytest.raises(UsageError, match="palu learns from image tokens, and these documents have none"):
        learn_palu(model, bare, geometry, **OPTIONS)


def test_the_script(checkpoint, data_file, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import learn_palu as script

    file = tmp_path / "palu.safetensors"
    arguments = ["learn_palu.py", "--model", str(checkpoint), "--calib", str(data_file), "--num-samples", "3", "--device", "cpu", "--quiet"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(file)])
    assert script.main() == 0
    read_back = load_learned(file)
    assert (read_back.name, read_back.calibration["num_samples"], read_back.training["documents"]) == ("palu", 3, 3)
    assert len(read_back.state().directions) == 6 and json.dumps(read_back.training)
    assert script.main() == 2 and "is there already; name another --output" in capsys.readouterr().err
