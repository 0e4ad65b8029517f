"""`--method rap+rotatek`: what is in the artifact, and that the model computes with it what each part by itself says."""

import sys
from pathlib import Path

import stacked_cases
import torch
from artifact_edits import edit_tensors, refused
from PIL import Image
from stacked_cases import BUDGET, SMALL, WIDTHS, compiled_to

import rotatek_compile
from rotatek_compile import CompileOptions, compile_artifact
from rotatek_compile.artifact import read_artifact
from rotatek_compile.rap_artifact import pruned_part
from rotatek_compile.runtime.rap_load import bytes_of

sys.path.append(str(Path(__file__).parents[1] / "runtime"))
from rap_cases import builders, prompts, said  # noqa: E402

wide, drawn, stacked, whole, page = (getattr(stacked_cases, name) for name in ("wide", "drawn", "stacked", "whole", "page"))


def asked(processor, page, question="What is it?"):
    return processor(text=[f"<image>{question}"], images=[Image.open(page)], return_tensors="pt")


def read_with(model, inputs, cache=None):
    """Logits of a question read in two parts, so that its second half sees what the cache made of the page."""
    cut = inputs["input_ids"].shape[1] - 4
    first = {name: x[:, :cut] if name in ("input_ids", "attention_mask") else x for name, x in inputs.items()}
    with torch.no_grad():
        cache = model(**first, past_key_values=cache, use_cache=True).past_key_values
        return model(input_ids=inputs["input_ids"][:, cut:], past_key_values=cache, use_cache=True).logits, cache


def test_what_is_written(stacked, wide):
    summary, folder = stacked
    artifact = read_artifact(folder)
    assert artifact.rap is not None and artifact.coded and artifact.rap.keep_ratio == 0.6
    assert artifact.method.kv_budget == BUDGET and artifact.method.rival is None
    assert set(artifact.base_model) == {"id", "revision", "fingerprint"} and artifact.base_model["id"] == str(wide)
    names = {"config.json", "model.safetensors", "rap.safetensors", "rotatek.safetensors", "report.json", "README.md", "tokenizer.json"}
    assert names <= {file.name for file in folder.iterdir()}
    report, pruning = artifact.report, summary["rap"]
    assert report["rap"]["counts"] == pruning["counts"] and report["plan_kl"] == summary["plan"]["predicted_kl"]
    assert pruning["kv_bytes_per_token"]["dense"] == summary["kv_bytes_per_token"]["dense"] == 1024
    assert pruning["kv_bytes_per_token"]["compressed"] == 2 * (2 * 56 + 32 + 2 * 40 + 88)
    assert summary["plan"]["share"] <= BUDGET and artifact.bytes_per_token() <= BUDGET * 1024
    part = pruned_part(artifact)
    assert part.bytes_per_token() == pruning["kv_bytes_per_token"]["compressed"]
    assert part.report["plan_kl"] == pruning["plan"]["predicted_kl"]
    assert {"statistics", "plan", "moments_and_bases", "sensitivities", "total"} <= summary["seconds"].keys()
    assert list(summary["seconds"])[-1] == "total" and summary["seconds"]["total"] >= report["rap"]["seconds"]["total"]


def test_channels_that_are_gone_get_no_bytes(stacked):
    """Bases stay invertible where Values keep a quarter of the channels; nothing is kept of directions without energy."""
    artifact = read_artifact(stacked[1])
    narrow = 0
    for i, heads in artifact.plan().items():
        kept = {"key": 2 * artifact.rap.layers[i].pairs, "value": artifact.rap.layers[i].value}
        for side, width in kept.items():
            encode, spectrum, mean = (artifact.tensors[f"layers.{i}.visual.{side}_{name}"] for name in ("encode", "spectrum", "mean"))
            assert torch.isfinite(encode).all() and float(torch.linalg.cond(encode.double()).max()) < 1e4
            assert float(spectrum[:, width:].sum()) <= 1e-9 * float(spectrum.sum())
            assert not mean[:, width:].any() and mean[:, :width].any()
            steps = -(-width // 16) * 16
            assert all(getattr(head, side).rank <= steps for head in heads)
            narrow += width < 64
    assert narrow


def test_the_value_basis_knows_the_narrow_output_projection(stacked):
    """Its weight is W_oᵀ W_o of the kept channels: encode encodeᵀ, shrunk towards its diagonal."""
    from rotatek_compile.calibrate import output_gram
    from rotatek_compile.runtime.rap_attention import attention_modules

    artifact = read_artifact(stacked[1])
    model, _ = rotatek_compile.load(stacked[1], device="cpu")
    for i, (_, module) in attention_modules(model).items():
        width, shape = artifact.rap.layers[i].value, artifact.geometry.layers[i]
        found = output_gram(module, shape)
        weight = module.o_proj.weight.detach().view(64, 2, width)  # two query heads of one KV head
        exact = torch.einsum("ohd,ohe->de", weight, weight)
        assert found.shape == (1, 128, 128) and torch.allclose(found[0, :width, :width], exact, atol=1e-6)
        assert not found[:, width:].any() and not found[:, :, width:].any()
        encode = artifact.tensors[f"layers.{i}.visual.value_encode"][0]
        moment = (encode @ encode.T)[:width, :width]
        assert torch.corrcoef(torch.stack([moment.flatten(), exact.flatten()]))[0, 1] > 0.98


def test_codes_of_the_pruned_model_are_close_to_it(stacked, page):
    model, processor = rotatek_compile.load(stacked[1], device="cpu", kv_budget=0.9)
    inputs = asked(processor, page)
    coded, cache = read_with(model, inputs, rotatek_compile.enabled(model).new_cache())
    assert type(cache).__name__ == "RotateKCache"
    rotatek_compile.disable(model)
    stock, narrow = read_with(model, inputs)
    widths = [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in narrow.layers]
    assert widths == [(2 * wide.pairs, wide.value) for wide in read_artifact(stacked[1]).rap.layers] and max(widths)[1] < 128
    spread = float(stock.std())
    assert (coded - stock).abs().max() < 0.02 * spread
    coarse, _ = rotatek_compile.load(stacked[1], device="cpu", kv_budget=0.03)
    worse, _ = read_with(coarse, inputs, rotatek_compile.enabled(coarse).new_cache())
    assert (worse - stock).abs().max() > 2 * (coded - stock).abs().max()


def test_keep_ratio_one_is_plain_rotatek(whole, page):
    """The same tokens and, up to float32 rounding, the same logits at the same budget."""
    first, second = (read_artifact(folder) for folder in whole)
    assert first.plan() == second.plan() and first.method == second.method
    both = [rotatek_compile.load(folder, device="cpu") for folder in whole]
    inputs = asked(both[0][1], page)
    logits = [read_with(model, inputs, rotatek_compile.enabled(model).new_cache())[0] for model, _ in both]
    assert torch.allclose(*logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(*(model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False) for model, _ in both))


def test_other_attention_implementations_and_batches(stacked, page):
    model, processor = rotatek_compile.load(stacked[1], device="cpu")
    inputs = asked(processor, page)
    expected = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    eager, _ = rotatek_compile.load(stacked[1], device="cpu", attn_implementation="eager", backend="reconstruct")
    assert torch.equal(eager.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False), expected)
    twice = {name: torch.cat([x, x]) for name, x in inputs.items()}
    beams = model.generate(**twice, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(beams, expected.expand(2, -1))


def test_prefill_attends_as_narrow_as_without_codes(stacked, page, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen, stock = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, *args, **kwargs):
        if hasattr(module, "used_width"):
            seen.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return stock(module, query, key, value, *args, **kwargs)

    model, processor = rotatek_compile.load(stacked[1], device="cpu")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    model.generate(**asked(processor, page), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert seen == [(max(2 * pairs, width),) * 3 for pairs, width in WIDTHS]  # once: what comes later reads codes


def test_a_text_model_with_sliding_layers(tmp_path, write_data, drawn):
    """Layers that are not coded keep their stock cache, as narrow as their heads; text is coded like images."""
    folder = builders.build("ministral", tmp_path / "ministral")
    words = "the quick brown fox jumps over the lazy dog "
    data = write_data(*({"question": f"{words * 24}What is {n}?", "answers": [f"word {n}"]} for n in range(2)))
    options = SMALL | {"num_samples": 2, "span": "all", "kv_budget": 0.3, "method": "rap+rotatek"}
    compile_artifact(CompileOptions(model=str(folder), calib=str(data), output=tmp_path / "out", **options))
    artifact, (model, _) = read_artifact(tmp_path / "out"), rotatek_compile.load(tmp_path / "out", device="cpu")
    assert artifact.geometry.hybrid and artifact.geometry.compressible == (0, 2)
    inputs = prompts(rows=1, length=300, padding=0)
    tokens, logits, cache = said(model, **inputs)
    sliding, wide = cache.layers[1], artifact.rap.layers[1]
    assert sliding.keys.shape[-1] == 2 * wide.pairs < 32 and sliding.values.shape[-1] == wide.value
    found = bytes_of(model, cache, 305)
    assert 0 < found.span <= 0.3 * found.span_dense
    shapes = artifact.geometry.layers
    held = [2 * layer.kv_heads * layer.head_dim * (305 if i in (0, 2) else sliding.keys.shape[2]) for i, layer in enumerate(shapes)]
    assert found.dense == 2 * sum(held)
    rotatek_compile.disable(model)
    stock, exact, _ = said(model, **inputs)
    assert torch.equal(tokens[:, 0], stock[:, 0]) and torch.allclose(logits[:, 0], exact[:, 0], atol=1e-4)  # prefill is exact
    assert not torch.equal(logits[:, 1:], exact[:, 1:])


def test_the_published_basis(wide, data_file, tmp_path, drawn):
    """It adds a ridge to every direction, those of channels that are gone too."""
    compiled_to(tmp_path / "paper", wide, data_file, keep_ratio=0.6, basis="paper")
    spectrum = read_artifact(tmp_path / "paper").tensors["layers.1.visual.key_spectrum"]
    assert 0 < float(spectrum[:, 80:].max()) <= 1.01e-4 * float(spectrum.mean())
    edit_tensors(tmp_path / "paper", lambda tensors: tensors["layers.1.visual.key_spectrum"][:, 80:].mul_(2))
    assert "key_spectrum is not zero in 48 channels beyond the 80 that" in refused(tmp_path / "paper")
