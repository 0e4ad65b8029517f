"""`--method rap+rotatek` through the commands: both parts in one directory, the five commands on it, and what is refused."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from artifact_edits import edit_config, edit_tensors, refused
from PIL import Image

import rotatek_compile
from rotatek_compile import CompileOptions, RotateKError, UsageError, compile_artifact
from rotatek_compile.artifact import read_artifact
from rotatek_compile.rap_artifact import pruned_part
from rotatek_compile.rap_card import stacked_card
from rotatek_compile.rap_plan import RapPlan
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.rap_load import bytes_of

sys.path.append(str(Path(__file__).parents[1] / "runtime"))
from rap_cases import SMALLER, builders, drawn_plan, prompts, said, whole_plan  # noqa: E402

_spec = importlib.util.spec_from_file_location("rotatek_hub_fixtures", Path(__file__).parents[1] / "hub_fixtures.py")
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
server = _shared.server
CPU = ("--device", "cpu", "--quiet")
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


@pytest.fixture
def copy(stacked, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(stacked[1], tmp_path / "copy")


@pytest.fixture(scope="module")
def page(data_file):
    return data_file.parent / "page0.png"


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


def test_run_and_eval(stacked, data_file, page, cli, tmp_path):
    summary, folder = stacked
    ask = ("--image", page, "--prompt", "What?", "--max-new-tokens", 4, "--device", "cpu", "--json")
    said = json.loads(cli("run", folder, *ask, "--compare-dense").out)
    assert said["kv_bytes_dense"] == said["dense"]["kv_bytes"] > said["kv_bytes"]
    assert 0 < said["bytes"]["span"] <= BUDGET * said["bytes"]["span_dense"]
    less = json.loads(cli("run", folder, *ask, "--kv-budget", 0.125).out)
    assert less["dense"] is None and less["bytes"]["span"] <= 0.125 * less["bytes"]["span_dense"]
    assert less["kv_bytes_dense"] == said["kv_bytes_dense"]
    own = ("eval", folder, "--data", data_file, *CPU, "--max-new-tokens", 3, "--method", "rotatek", "--kv-budget", 0.05)
    found = json.loads(cli(*own, "--json", "-o", tmp_path / "results", "--write-card").out)
    dense, pruned, coded, fewer = found["rows"]
    assert [row["method"] for row in found["rows"]] == ["dense", "rap", "artifact", "rotatek"]
    assert dense["kl"] == 0 < pruned["kl"] and coded["kl"] > 0 and len({row["kv_bytes_dense"] for row in found["rows"]}) == 1
    share = summary["rap"]["kv_bytes_per_token"]["compressed"] / 1024
    assert pruned["kv_bytes"] == pytest.approx(share * pruned["kv_bytes_dense"]) and pruned["span_bytes"] == 0
    assert coded["span_bytes"] <= BUDGET * coded["span_bytes_dense"] and fewer["span_bytes"] <= 0.05 * fewer["span_bytes_dense"]
    assert fewer["kv_bytes"] < coded["kv_bytes"] < pruned["kv_bytes"] and fewer["kl"] > coded["kl"]
    assert all(row["against"] is None for row in found["rows"])  # nothing of it is a rival
    assert "| artifact |" in (folder / "README.md").read_text()
    assert json.loads(cli(*own, "--json", "-o", tmp_path / "results", "--resume").out)["rows"] == found["rows"]


def test_the_pruned_model_alone_is_as_it_was(stacked, data_file, tmp_path, cli):
    """Rows of the pruned model with the stock cache are those of an artifact of `--method rap` with the same weights."""
    folder = shutil.copytree(stacked[1], tmp_path / "rap")
    (folder / "rotatek.safetensors").unlink()
    edit_config(folder, lambda config: (config.pop("rotatek"), config["files"].pop("rotatek.safetensors"), config)[-1])
    ask = ("--data", data_file, "--device", "cpu", "--max-new-tokens", 3, "--quiet", "--json")
    alone, both = (json.loads(cli("eval", where, *ask).out)["rows"][1] for where in (folder, stacked[1]))
    assert alone["kl"] == pytest.approx(both["kl"], rel=1e-3) and alone["kv_bytes"] == both["kv_bytes"]


def test_inspect_and_card(stacked, cli, compiled, tmp_path):
    folder, widths = stacked[1], stacked[0]["rap"]["plan"]["widths"]
    text = cli("inspect", folder).out
    assert f"    0  {widths['0']['pairs']} of 64" in text and "coded for this smaller model:" in text and "KV budget 0.25" in text
    assert "KL when the Keys of one head alone are cut" in text
    found = json.loads(cli("inspect", folder, "--json").out)
    assert found["rap"]["method"]["layers"][0]["pairs"] == widths["0"]["pairs"] and found["method"]["kv_budget"] == BUDGET
    assert "plan: the same in all 2 heads" in (said := cli("inspect", folder, folder).out) and "| 56 pairs" in said
    assert "the other a sidecar" in cli("inspect", folder, compiled).sentence()
    assert cli("inspect", folder, "--html", tmp_path / "page.html").code == 0
    card = (folder / "README.md").read_text()
    assert "with fewer RoPE pairs" in card and "coded for these smaller heads: basis two-sided" in card
    assert "model.generate(**inputs) with the compressed cache" in card and "heads.png" not in card
    assert "](heads.png)\n\n## Limits" in stacked_card(read_artifact(folder), True)


def test_push_and_load_from_the_hub(stacked, server, cli):
    folder = stacked[1]
    said = json.loads(cli("push", folder, "lab/stacked", "--json").out)
    assert {"model.safetensors", "config.json", "rap.safetensors", "rotatek.safetensors", "rotatek_config.json"} <= said["files"].keys()
    (model, _), (own, _) = rotatek_compile.load("lab/stacked", device="cpu"), rotatek_compile.load(folder, device="cpu")
    ids = torch.arange(60, 80)[None]
    assert rotatek_compile.enabled(model) is not None and torch.equal(model(input_ids=ids).logits, own(input_ids=ids).logits)


def test_resume_and_overwrite(wide, data_file, tmp_path, monkeypatch, cli, untouched, drawn):
    """A run that ends in its second half leaves saved parts alone, and --resume takes the plan up; other weights have other moments."""
    from rotatek_compile import compile_stacked

    monkeypatch.setenv("ROTATEK_CACHE", str(tmp_path / "cache"))
    before = len(drawn)
    ask = ("compile", "--model", wide, "--calib", data_file, "-o", tmp_path / "out", "--method", "rap+rotatek", "--kv-budget", 0.25)
    ask += ("--num-samples", 2, "--device", "cpu", "--quiet")

    def killed(*args):
        raise RotateKError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(compile_stacked, "stacked", killed)
        assert cli(*ask).sentence() == "error: killed"
    untouched(tmp_path, "cache")
    saved = len(list((tmp_path / "cache").iterdir()))
    assert saved == 2  # the plan and the moments
    first = cli(*ask, "--resume")
    assert first.code == 0 and len(drawn) - before == 1 and "starting anew" not in first.err
    assert "is not empty; pass --overwrite" in cli(*ask).sentence()
    assert cli(*ask, "--overwrite", "--no-repair").code == 0 and len(drawn) - before == 2
    assert len(list((tmp_path / "cache").iterdir())) == saved + 2
    untouched(tmp_path, "out", "cache")


def test_dry_run(wide, data_file, tmp_path, cli):
    ask = ("compile", "--model", wide, "--calib", data_file, "-o", tmp_path / "out", "--method", "rap+rotatek", *CPU, "--dry-run")
    said = cli(*ask, "--kv-budget", 0.125).out
    assert "RAP, keep ratio 0.7 of Keys" in said and "KV budget 0.125" in said and "1024 dense, about 128 coded" in said
    found = json.loads(cli(*ask, "--max-kl", 0.01, "--json").out)
    assert found["method"] == "rap+rotatek" and found["kv_bytes_per_token"] == {"dense": 1024, "compressed": None}
    assert found["rap"] == {"dense": 1024, "compressed": 0.7 * 1024} and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_budget": None}, "needs --kv-budget or --max-kl for the coded cache: its --keep-ratio says what the weights keep"),
        ({"max_kl": 0.1}, "--kv-budget and --max-kl are budgets of different kinds"),
        ({"with_weights": True}, "--method rap\\+rotatek writes weights of its own"),
        ({"rap_score": "best"}, "unknown --rap-score 'best'"),
        ({"keep_ratio": 2.0}, "--keep-ratio 2.0 is out of range"),
        ({"key_bits": "3"}, "unknown --key-bits '3'"),
        ({"kv_budget": 0.001}, "--kv-budget 0.001 is too small"),
        ({"keep_ratio": 0.01}, "--keep-ratio 0.01 is below the least that this model can keep"),
    ],
)
def test_refused_before_any_work(options, words, wide, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr("rotatek_compile.compile_inputs.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=words):
        compiled_to(tmp_path / "out", wide, data_file, **options)


def test_what_goes_with_it_and_what_does_not(stacked, whole, wide, data_file, cli):
    folder, where = stacked[1], (stacked[1], "--data", data_file)
    run = ("run", folder, "--prompt", "What?")
    assert "--keep-ratio 0.5 cannot be chosen" in cli(*run, "--keep-ratio", 0.5).sentence(2)
    assert "--model tiny-llava-next cannot be chosen" in cli(*run, "--model", "tiny-llava-next").sentence(2)
    assert "--method int4 is not made for it" in cli("eval", *where, "--method", "int4").sentence(2)
    assert "--suite compares with methods" in cli("eval", *where, "--suite", "rivals", "-o", "results").sentence(2)
    assert "--keep-ratio 0.5 cannot be chosen" in cli("eval", *where, "--method", "rotatek", "--keep-ratio", 0.5).sentence(2)
    with pytest.raises(UsageError, match="tensor_parallel True cannot be chosen"):
        rotatek_compile.load(folder, tensor_parallel=True)
    artifact = read_artifact(folder)
    plain, _ = rotatek_compile.load(whole[0], device="cpu")
    rotatek_compile.disable(plain)
    with pytest.raises(RotateKError, match="compiled for the smaller checkpoint beside it, not for this model"):
        enable(plain, artifact)
    kept, _ = rotatek_compile.load(whole[1], device="cpu")  # pruned as well, but another checkpoint
    rotatek_compile.disable(kept)
    with pytest.raises(RotateKError, match="compiled for the smaller checkpoint beside it"):
        enable(kept, artifact)
    with pytest.raises(RotateKError, match="the model is a pruned one .* was compiled for a whole one; load the base model"):
        enable(kept, read_artifact(whole[0]))
    with enable(kept, read_artifact(whole[1]), kv_budget=0.125) as again:
        assert again.artifact.method.kv_budget == 0.125


@pytest.mark.filterwarnings("ignore:.*ignoring unknown tensors")
def test_contradictions_are_refused(copy, whole):
    def said(change):
        text = (copy / "rotatek_config.json").read_text()
        edit_config(copy, change)
        words = refused(copy)
        (copy / "rotatek_config.json").write_text(text)
        return words

    def without(section):
        return lambda config: {name: part for name, part in config.items() if name != section}

    assert "rival is 'int4' beside section rap, and only our own goes with it" in said(
        lambda config: config["rotatek"].update(rival="int4")
    )
    assert "rival is 'rap', which has a section of its own" in said(lambda config: config["rotatek"].update(rival="rap"))
    assert "no section rotatek, but files names rotatek.safetensors" in said(without("rotatek"))
    assert "no section rap, but files names rap.safetensors" in said(without("rap"))
    assert "was changed after it was written" in said(lambda config: config["files"].pop("rap.safetensors") and None)
    wider = said(lambda config: config["rap"]["layers"][0].update(value_width=24))
    assert "value_mean is not zero in 8 channels beyond the 24 that section rap keeps" in wider
    assert "layer 0 has pairs 72, expected 1 to 64" in said(lambda config: config["rap"]["layers"][0].update(pairs=72))
    assert "has shape [1, 40], section rap says [1, 48]" in said(lambda config: config["rap"]["layers"][1].update(pairs=48))
    shutil.copy(copy / "rap.safetensors", copy / "kept")
    (copy / "rap.safetensors").unlink()
    assert "is incomplete: it has no rap.safetensors" in refused(copy)
    (copy / "kept").rename(copy / "rap.safetensors")
    edit_tensors(copy, lambda tensors: tensors["layers.1.visual.key_spectrum"][:, -1].fill_(1.0))
    assert "key_spectrum is not zero in 1 channels beyond the" in refused(copy)
