"""Models as users have them: half precision, quantised, with an adapter, with another attention implementation."""

import importlib.util
import json
import shutil

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotatek_compile import api
from rotatek_compile.errors import RotateKError
from rotatek_compile.models import load_model, resolve
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import active, enable

PLAN = [[8, 24], [0, 16], [16, 16]]


def next_logits(model, inputs, cache):
    """Logits of one more token on a prefilled cache."""
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(inputs["input_ids"]), 1, dtype=torch.int64)], 1)
    step = {"input_ids": torch.full((len(mask), 1), 17), "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    return model(**step, past_key_values=cache).logits[:, -1].float()


def both(model, inputs, artifact, backend="torch"):
    """Next-token logits on the stock cache and on a compressed one."""
    from transformers.cache_utils import DynamicCache

    with torch.no_grad():
        stock = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=stock)
        dense = next_logits(model, inputs, stock)
        with enable(model, artifact, backend=backend) as enabled:
            cache = enabled.new_cache()
            model(**inputs, past_key_values=cache)
            return dense, next_logits(model, inputs, cache), cache


def divergence(dense, got):
    """Largest KL(dense || got) over rows, nats."""
    p, q = dense.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make_model, ragged, make_artifact, dtype):
    """One rounding more of Keys whose logits reach tens in this model; a trained one keeps the bound of DESIGN.md §3."""
    model = make_model().to(dtype)
    inputs = dict(ragged, pixel_values=ragged["pixel_values"].to(dtype))
    dense, got, cache = both(model, inputs, make_artifact())
    assert cache.layers[0].store.dtype == cache.layers[0].store.window.keys.dtype == dtype
    assert divergence(dense, got) < (1e-4 if dtype == torch.float16 else 1e-2)
    _, below, _ = both(model, inputs, make_artifact(PLAN))
    _, rebuilt, _ = both(model, inputs, make_artifact(PLAN), "reconstruct")
    assert divergence(rebuilt, below) < (1e-4 if dtype == torch.float16 else 1e-2) < divergence(dense, below)


# -- quantised ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(checkpoint, tmp_path, bits):
    """A checkpoint that was saved quantised is compiled and answers; at keep ratio 1 as with the stock cache."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    setting = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    )
    quantised = AutoModelForImageTextToText.from_pretrained(
        checkpoint, quantization_config=setting, dtype=torch.float32, device_map={"": "cpu"}
    )
    folder = shutil.copytree(checkpoint, tmp_path / "quantised", ignore=shutil.ignore_patterns("*.safetensors*"))
    quantised.save_pretrained(folder)
    model = load_model(resolve(str(folder)), torch.float32, torch.device("cpu"))
    kind = torch.uint8 if bits == 4 else torch.int8
    assert model.model.language_model.layers[0].self_attn.k_proj.weight.dtype == kind
    answer_is_the_same(model, folder, tmp_path)


def answer_is_the_same(model, folder, tmp_path):
    from PIL import Image

    from rotatek_compile.answer import model_inputs
    from rotatek_compile.artifact import Artifact, Method
    from rotatek_compile.geometry import geometry_of
    from rotatek_compile.models import load_processor

    shape, tensors = geometry_of(model.config), {}
    for i in shape.compressible:
        heads, dim = shape.layers[i].kv_heads, shape.layers[i].head_dim
        for side in ("key", "value"):
            tensors[f"layers.{i}.visual.{side}_mean"] = torch.zeros(heads, dim)
            tensors[f"layers.{i}.visual.{side}_encode"] = torch.eye(dim).expand(heads, dim, dim).clone()
            tensors[f"layers.{i}.visual.{side}_spectrum"] = torch.ones(heads, dim)
            tensors[f"layers.{i}.{side}_plan"] = torch.tensor([[dim, 0, 0]] * heads, dtype=torch.int32)
    inputs = model_inputs(load_processor(resolve(str(folder))), [Image.linear_gradient("L").convert("RGB")], "What is it?")
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    stock = model.generate(**inputs, **options)
    with enable(model, Artifact(shape, Method(), tensors, {}, {}), backend="torch"):
        got = model.generate(**inputs, **options)
    assert isinstance(got.past_key_values, RotateKCache) and got.past_key_values.layers[0].store.coded_tokens()
    assert torch.equal(got.sequences, stock.sequences)
    assert (torch.stack(got.logits) - torch.stack(stock.logits)).abs().max() < 1e-3


@pytest.mark.parametrize(("method", "package"), [("gptq", "optimum"), ("awq", "gptqmodel"), ("bitsandbytes", "bitsandbytes")])
def test_a_quantised_checkpoint_without_its_library_is_refused(broken_checkpoint, method, package):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    section = {
        "gptq": {"bits": 4, "group_size": 128},
        "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
        "bitsandbytes": {"load_in_4bit": True},
    }[method]
    file = broken_checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": method, **section}}))
    with pytest.raises(RotateKError, match=f"need a package that is missing: .*{package}.*install it"):
        load_model(resolve(str(broken_checkpoint)), torch.float32, torch.device("cpu"))


# -- adapters -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(make_model):
    """A model with a LoRA adapter that changes what it says."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(make_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])).eval()
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return wrapped


def test_lora(adapted, model, ragged, make_artifact, generate, check_equal):
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    stock = generate(adapted, ragged, 8)
    assert not torch.equal(stock.tokens, generate(model, ragged, 8).tokens)
    with pytest.warns(UserWarning, match="carries the adapter default.*accuracy may differ"):
        enabled = enable(adapted, make_artifact(), backend="torch")
    assert active(adapted) is enabled
    got = generate(adapted, ragged, 8)
    assert isinstance(got.cache, RotateKCache)
    check_equal(got, stock)
    enabled.disable()
    assert torch.equal(generate(adapted, ragged, 8).logits, stock.logits)
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.state_dict().items())
    outputs = []
    for backend in ("torch", "reconstruct"):
        with pytest.warns(UserWarning), enable(adapted, make_artifact(PLAN), backend=backend):
            outputs.append(generate(adapted, ragged, 8))
    check_equal(*outputs)


def test_an_adapter_from_disk(adapted, make_model, ragged, generate, tmp_path):
    adapted.save_pretrained(tmp_path)
    loaded = api.dressed(make_model(), adapter=tmp_path)
    assert torch.equal(generate(loaded, ragged, 4).logits, generate(adapted, ragged, 4).logits)
    with pytest.raises(RotateKError, match=r"adapter .*nowhere could not be loaded"):
        api.dressed(make_model(), adapter=tmp_path / "nowhere")


def test_without_peft(model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RotateKError, match="needs the package peft: pip install peft"):
        api.dressed(model, adapter="somewhere")


# -- what attends tokens that arrive together ---------------------------------------------------------------------------------


def test_eager_is_delegated_to(make_model, ragged, make_artifact, generate, check_equal):
    model = make_model()
    model.set_attn_implementation({"text_config": "eager"})
    stock = generate(model, ragged, 8)
    with enable(model, make_artifact(), backend="torch"):
        assert model.config.text_config._attn_implementation == "rotatek_eager"
        got = generate(model, ragged, 8)
    check_equal(got, stock)
    assert torch.equal(got.logits[:, 0], stock.logits[:, 0])  # the same kernel, to the bit
    assert model.config.text_config._attn_implementation == "eager"


def flash_stand_in(calls):
    """Takes what flash attention takes: no mask or a 2-D one, and a config that names the package."""

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        assert module.config._attn_implementation == "flash_attention_2"
        assert module.config.num_attention_heads == 4 and module.num_key_value_groups == 2  # the rest of both is the real one's
        calls.append(query.shape[2])
        new, total = query.shape[2], key.shape[2]
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)[None, None]
        if attention_mask is not None:
            assert attention_mask.dim() == 2
            mask = mask & attention_mask[:, None, None, -total:].bool()
            mask = mask | ~mask.any(-1, keepdim=True)
        key, value = (side.repeat_interleave(2, 1) for side in (key, value))
        return scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(1, 2), None

    return attention


def test_flash_attention_is_delegated_to(make_model, ragged, prompts, make_artifact, generate, check_equal, monkeypatch):
    model, calls = make_model(), []
    stock = generate(model, ragged, 8)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash_stand_in(calls))
    model.config.text_config._attn_implementation_internal = "flash_attention_2"  # setting it wants the package
    with enable(model, make_artifact(), backend="torch"):
        name = model.config.text_config._attn_implementation
        assert name.startswith("rotatek") and "flash" not in name  # a name with "flash" means the package to transformers
        got = generate(model, ragged, 8)
    check_equal(got, stock)
    assert calls == [ragged["input_ids"].shape[1]] * 3  # prefill of three layers, and nothing else
    assert model.config.text_config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("implementation", ["flash_attention_2", "nonsense"])
def test_an_implementation_that_cannot_run(make_model, implementation):
    if implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash_attn is installed")
    with pytest.raises(RotateKError, match=f"attention implementation '{implementation}' cannot be used: "):
        api.dressed(make_model(), attn_implementation=implementation)


def test_two_dimensional_masks_hide_padding_of_a_continuation(make_model, prompts, make_artifact, monkeypatch):
    """A padded second turn: flash attention's mask says which tokens are real, and causality is ours to add."""
    inputs = prompts.batch([[3, prompts.square, 20], [9]])
    more = torch.randint(6, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    mask[1, -40:-30] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    outputs = []
    for implementation in ("sdpa", "flash_attention_2"):
        model = make_model()
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash_stand_in([]))
        model.config.text_config._attn_implementation_internal = implementation
        with torch.no_grad(), enable(model, make_artifact(), backend="torch") as enabled:
            cache = enabled.new_cache()
            model(**inputs, position_ids=positions[:, :-40], past_key_values=cache)
            outputs.append(model(input_ids=more, attention_mask=mask, position_ids=positions[:, -40:], past_key_values=cache).logits)
    real = mask[:, -40:].bool()
    assert (outputs[0] - outputs[1])[real].abs().max() < 1e-4
