"""Every family through the real path: checkpoint, calibration on pages, artifact, and generation from the compressed cache."""

from __future__ import annotations

import json

import builders
import pytest
import torch
from PIL import Image

from rotatek_compile import CompileOptions, RotateKError, UsageError, compile_artifact, enable, families, models
from rotatek_compile.aliases import ALIASES, BUNDLED_ID
from rotatek_compile.artifact import read_artifact
from rotatek_compile.bases import Basis
from rotatek_compile.batches import Encoded, encode, end_ids, pad, rope_index
from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.cutter import Cutter
from rotatek_compile.evaluate import Evaluator
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime.cache import RotateKCache, RotateKLayer

NAMES = [*builders.VISION, *builders.TEXT_ONLY]
LONG = "What comes after one, two, three, and four, and why should it be so? Say it again, but in other words. " * 2
COMPRESSED = {"gemma3": (1, 3), "gemma3-text": (1, 3), "ministral": (0, 2)}  # where the others slide


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def check_equal(got, expected, tolerance=1e-4):
    assert torch.equal(got.tokens, expected.tokens)
    assert expected.logits.std() > 0.5  # a model whose logits say something
    assert (got.logits - expected.logits).abs().max() <= tolerance


def batch(compiled):
    """Three rows of different length: one page, two, and one with a longer question; for a text-only model all are questions."""
    return compiled.inputs(LONG, "What is field two?" if not compiled.text_only else LONG[:150], LONG[:170], images=[1, 2, 1])


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_equals_the_stock_cache(family, name):
    compiled = family(name)
    for inputs in (batch(compiled), compiled.inputs(LONG)):
        expected = compiled.generate(inputs)
        with enable(compiled.model, compiled.artifact, keep_ratio=1.0):
            got = compiled.generate(inputs)
        assert isinstance(got.cache, RotateKCache)
        check_equal(got, expected)
    check_equal(compiled.generate(inputs), expected, 0)  # nothing of it stays behind


@pytest.mark.parametrize("name", NAMES)
def test_half_rank_equals_reconstruction_and_codes_what_it_should(family, name):
    compiled = family(name)
    inputs = batch(compiled)
    stock = compiled.generate(inputs)
    with enable(compiled.model, compiled.artifact, backend="reconstruct", fallback=False):
        expected = compiled.generate(inputs)
    with enable(compiled.model, compiled.artifact, fallback=False) as active:
        got = compiled.generate(inputs)
    check_equal(got, expected)
    assert (got.logits - stock.logits).abs().max() > 1e-3  # something is left out
    geometry = active.artifact.geometry
    layers = [i for i, layer in enumerate(got.cache.layers) if isinstance(layer, RotateKLayer)]
    assert tuple(layers) == geometry.compressible == COMPRESSED.get(name, tuple(range(len(geometry.layers))))
    if not compiled.text_only:
        from rotatek_compile.runtime.accounting import cache_bytes

        visual = sum(int((inputs["input_ids"] == token).sum()) for token in geometry.visual_token_ids)
        real = int(inputs["attention_mask"].sum()) + 3 * (got.tokens.shape[1] - 1)  # the last token of each row is never fed back
        per_token = geometry.dense_bytes_per_token()
        assert cache_bytes(got.cache, real).span_dense == visual * per_token


@pytest.mark.parametrize("name", NAMES)
def test_calibration_sees_what_the_stock_model_sees(family, family_data, name):
    """Ragged batches as calibration and evaluation make them, against one stock call per document on the processor's own tensors."""
    compiled = family(name)
    read = read_artifact(compiled.artifact)
    source = open_data(str(family_data[compiled.text_only]), "calibration", images=not compiled.text_only)
    eos, rope = end_ids(compiled.model), rope_index(compiled.model)
    samples = [source.sample(n) for n in range(3)]
    items = [encode(compiled.processor, sample, read.geometry, eos[0], rope) for sample in samples]
    evaluator = Evaluator(compiled.model, compiled.processor, "after", eos, 2)
    rows = read.geometry.rows_at_once(3)
    batches = [items[start : start + rows] for start in range(0, 3, rows)]
    logprobs = [got for part in batches for got in evaluator.answer(part, evaluator.dense_cache()).logprobs]
    for item, got in zip(items, logprobs, strict=True):
        expected = stock_logprobs(compiled, item)
        assert expected.std() > 0.5
        assert (got - expected).abs().max() < 1e-4
    counted = read.report["calibration_tokens"]
    kept = [encode(compiled.processor, source.sample(n), read.geometry, eos[0], rope) for n in range(4)]
    if compiled.text_only:
        assert counted == {"text": sum(len(item.prompt) + len(item.answer) for item in kept)}
    else:
        assert counted == {"visual": sum(token in read.geometry.visual_token_ids for item in kept for token in item.prompt)}


@pytest.mark.parametrize("name", ["gemma3", "ministral", "qwen3-vl", "smolvlm"])
def test_sensitivities_are_what_cutting_the_stock_cache_gives(family, family_data, name):
    """Many cuts at once with a shared prefix, against one cut after the other in a stock cache read by the stock kernel."""
    compiled = family(name)
    artifact = read_artifact(compiled.artifact)
    geometry, kind = artifact.geometry, artifact.method.kinds[0]
    bases = {}
    for i in geometry.compressible:
        encode_, spectrum = (artifact.tensors[f"layers.{i}.{kind}.key_{part}"] for part in ("encode", "spectrum"))
        bases[i] = Basis(encode_.double(), torch.linalg.inv(encode_.double()).mT, spectrum)
    source = open_data(str(family_data[compiled.text_only]), "calibration", images=not compiled.text_only)
    rope, rows = rope_index(compiled.model), geometry.rows_at_once(2)
    items = [encode(compiled.processor, source.sample(n), geometry, builders.EOS, rope) for n in range(rows)]
    cutter = Cutter(compiled.model, geometry, bases, span_all=compiled.text_only)
    doc = cutter.prefill(*items)
    raw = {i: Slabs(geometry.layers[i].head_dim) for i in geometry.compressible}
    cuts = (lambda r: (Slabs(), r), lambda r: (Slabs(8), r), lambda r: (r, Slabs()))
    plans = [{i: {head: HeadPlan(*cut(raw[i]))}} for i in geometry.compressible for head in range(2) for cut in cuts]
    got = cutter.kl_each(doc, [(plan, ()) for plan in plans])
    rest = pad([item.prompt[item.visual_end :] + item.answer[:-1] for item in items], 0)
    for plan, values in zip(plans, got, strict=True):
        with torch.inference_mode(), cutter.cut(doc, plan):
            cut = cutter._forward(doc, rest, doc.prefix, doc.scored.shape[1]).double().log_softmax(-1)
        expected = ((doc.reference.exp() * (doc.reference - cut)).sum(-1).clamp_min(0) * doc.scored).sum(1)
        assert torch.allclose(values, expected, rtol=1e-3, atol=1e-6)
    assert float(got.max()) > 1e-4


def test_gaps_between_the_tokens_of_a_sliding_model_are_refused(family, family_data):
    compiled = family("ministral")
    geometry, source = read_artifact(compiled.artifact).geometry, open_data(str(family_data[True]), "calibration", images=False)
    assert geometry.hybrid and geometry.rows_at_once(4) == 1
    items = [encode(compiled.processor, source.sample(n), geometry, builders.EOS) for n in range(2)]
    items[1].prompt.pop()
    evaluator = Evaluator(compiled.model, compiled.processor, "after", (builders.EOS,), 2)
    with pytest.raises(RotateKError, match="ministral has sliding layers, and documents of different length leave gaps; use a batch"):
        evaluator.answer(items, evaluator.dense_cache())
    full = read_artifact(family("llama").artifact).geometry
    assert not full.hybrid and full.rows_at_once(4) == 4


def stock_logprobs(compiled, item: Encoded, told: bool = True):
    """Answer log-probabilities of one plain call; `told` says whether the model is told which tokens are images, where it asks."""
    ids = torch.tensor([item.prompt + item.answer[:-1]])
    asked = {"gemma3": "token_type_ids", "qwen2.5-vl": "mm_token_type_ids", "qwen3-vl": "mm_token_type_ids"}.get(compiled.name)
    types = {asked: (ids == builders.IMAGE).long()} if told and asked else {}
    if hasattr(compiled.model.model, "rope_deltas"):
        compiled.model.model.rope_deltas = None
    with torch.no_grad():
        logits = compiled.model(input_ids=ids, **types, **item.media).logits[0]
    return logits[-len(item.answer) :].double().log_softmax(-1)


def test_images_of_gemma3_see_each_other(family, family_data):
    compiled = family("gemma3")
    geometry = read_artifact(compiled.artifact).geometry
    item = encode(compiled.processor, open_data(str(family_data[False]), "calibration").sample(0), geometry, builders.EOS)
    assert item.token_types["token_type_ids"] == [int(token == builders.IMAGE) for token in item.prompt]
    assert (stock_logprobs(compiled, item, told=False) - stock_logprobs(compiled, item)).abs().max() > 1e-3


def test_templates_that_write_the_first_token_get_no_second_one(family, family_data, monkeypatch):
    for name in ("gemma3", "llama"):
        compiled = family(name)
        monkeypatch.setattr(compiled.processor.tokenizer, "add_bos_token", True)
        sample = open_data(str(family_data[name == "llama"]), "calibration", images=name != "llama").sample(0)
        item = encode(compiled.processor, sample, read_artifact(compiled.artifact).geometry, builders.EOS)
        assert item.prompt.count(builders.BOS) == 1


def test_what_the_table_says_is_what_the_configs_say(family):
    seen = {}
    for name in NAMES:
        if builders.missing(name):
            continue
        config = models.load_config(models.resolve(str(family(name).folder)))
        assert families.not_validated(config) is None, name
        seen[name] = families.family_of(config.model_type).name
        assert models.text_only(config) == (name in builders.TEXT_ONLY)
        assert families.visual_token_ids(config) == models.checked_geometry(config).visual_token_ids
    assert seen["llava-next-vicuna"] == "LLaVA-NeXT" and seen["gemma3"] == "Gemma 3" and seen["gemma3-text"] == "text only"
    assert {alias.family for alias in ALIASES.values()} == {row.name for row in families.FAMILIES}


def small(model, calib, output, **options):
    return CompileOptions(model=str(model), calib=str(calib), output=output, num_samples=4, device="cpu", quiet=True, **options)


def test_nothing_to_compress_is_refused(tmp_path, family_data):
    folder = builders.build("mistral-sliding", tmp_path / "sliding")
    with pytest.raises(RotateKError, match="nothing to compress: 'mistral' has no full_attention layer, only sliding_attention"):
        compile_artifact(small(folder, family_data[True], tmp_path / "out", span="all"))


def test_text_only_models_code_text(family, family_data, tmp_path):
    folder = family("llama").folder
    with pytest.raises(UsageError, match=f"--span visual codes images, and {folder} reads text alone; use --span all"):
        compile_artifact(small(folder, family_data[True], tmp_path / "out"))
    with pytest.raises(UsageError, match="--method int4 codes images, .* reads text alone; use --method rotatek --span all"):
        compile_artifact(small(folder, family_data[True], tmp_path / "out", method="int4"))
    with pytest.raises(RotateKError, match="no usable sample: a text-only model reads questions with an answer and without images"):
        compile_artifact(small(folder, family_data[False], tmp_path / "out", span="all"))
    assert not (tmp_path / "out").exists()
    read = read_artifact(family("llama").artifact)
    assert read.method.kinds == ("text",) and read.geometry.text_only
    assert not any("visual" in name for name in read.tensors)
    config = family("llama").artifact / "rotatek_config.json"
    assert json.loads(config.read_text())["rotatek"]["text_only"] is True


def test_a_text_only_model_answers_without_image_and_refuses_one(family, cli, tmp_path):
    artifact = family("qwen3").artifact
    ended = cli("run", artifact, "--prompt", LONG, "--max-new-tokens", 4, "--compare-dense", "--json", "--device", "cpu")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result["new_tokens"] == result["dense"]["new_tokens"] == 4
    assert result["kv_bytes"] < result["kv_bytes_dense"]
    Image.new("RGB", (40, 40), "white").save(tmp_path / "page.png")
    said = cli("run", artifact, "--image", tmp_path / "page.png", "--prompt", "What?", "--device", "cpu").sentence()
    assert "this is a text-only model: it reads no image" in said
    assert "span all" in cli("inspect", artifact).out


def test_evaluation_of_a_text_only_artifact(family, family_data, cli):
    ended = cli("eval", family("mistral").artifact, "--data", family_data[True], "--num-samples", 2, "--device", "cpu", "--json", "--quiet")
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)["rows"]
    assert [row["method"] for row in rows[:2]] == ["dense", "artifact"] and rows[1]["kl"] >= 0


def test_unknown_architectures_are_warned_of(family, recwarn):
    config = models.load_config(models.resolve(str(family("llava-next-llama").folder)))
    assert not [w for w in recwarn if w.category is UserWarning]
    config.text_config.model_type = "qwen2"
    with pytest.warns(UserWarning, match="LLaVA-NeXT was validated with text models mistral, llama, not with 'qwen2'; compare with"):
        models.checked_geometry(config)
    from transformers import SmolLM3Config

    with pytest.warns(UserWarning, match="model type 'smollm3' was never validated; compare with the stock cache"):
        models.checked_geometry(SmolLM3Config(num_hidden_layers=2))


def test_what_the_cache_cannot_compute_is_refused_before_work():
    from transformers import BertConfig, DiffLlamaConfig, Gemma2Config, GptOssConfig, MllamaConfig, Qwen3NextConfig

    with pytest.raises(RotateKError, match="'gemma2' caps its attention logits"):
        models.checked_geometry(Gemma2Config())
    with pytest.raises(RotateKError, match="'gpt_oss' is not supported: its softmax has attention sinks"):
        models.checked_geometry(GptOssConfig())
    with pytest.raises(RotateKError, match="'mllama' is not supported: its images enter by cross-attention"):
        models.checked_geometry(MllamaConfig())
    with pytest.raises(RotateKError, match="'bert' is not supported: as configured it attends in both directions"):
        models.checked_geometry(BertConfig())
    with pytest.raises(RotateKError, match="'qwen3_next' is not supported: it has layers of type linear_attention"):
        models.checked_geometry(Qwen3NextConfig())
    with pytest.raises(RotateKError, match="'diffllama' is not supported: it changes Keys or Values between the cache"):
        models.checked_geometry(DiffLlamaConfig())
    shared = models.load_config(models.resolve("tiny-llava-next"))
    shared.text_config.num_kv_shared_layers = 2
    with pytest.raises(RotateKError, match="'llava_next' shares Keys between layers"):
        models.checked_geometry(shared)


def test_layers_that_differ_are_refused():
    """Gemma 4 and others, from transformers 5.23 on: reading `head_dim` of such a config raises, with a traceback for the user."""
    import transformers

    if not hasattr(transformers, "Gemma4Config"):
        pytest.skip("this version of transformers has no such model")
    with pytest.raises(RotateKError, match="'gemma4' is not supported: its layers differ"):
        models.checked_geometry(transformers.Gemma4Config())


def test_a_causal_model_whose_config_does_not_say_so():
    """GPT-NeoX (Pythia): `is_decoder` is False and means nothing there, unlike for BERT."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512
    )
    with pytest.warns(UserWarning, match="'gpt_neox' was never validated"):
        geometry = models.checked_geometry(config)
    assert [layer.kv_heads for layer in geometry.layers] == [4, 4]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 200, (1, 20))
    with torch.no_grad():
        whole, start = model(ids).logits, model(ids[:, :10]).logits
    assert torch.allclose(whole[:, :10], start, atol=1e-5)  # causal


def test_list_models(cli):
    lines = cli("compile", "--list-models").out.splitlines()
    assert lines[0].split() == ["name", "model", "family", "licence"]
    assert [line.split()[0] for line in lines[1:]] == list(ALIASES)
    listed = json.loads(cli("compile", "--list-models", "--json").out)
    assert listed["gemma3"] == {"id": "google/gemma-3-4b-it", "family": "Gemma 3", "licence": "gemma"}
    assert {name for name, alias in ALIASES.items() if alias.id == BUNDLED_ID} == set(models.BUNDLED)
