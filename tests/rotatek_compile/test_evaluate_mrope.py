"""The shared prefill with positions along three axes, DeepStack features and q/k-norm (Qwen3-VL), and prompts without images."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from rotatek_compile.batches import Encoded, rope_index
from rotatek_compile.calibration_data.sample import Sample
from rotatek_compile.evaluate import Evaluator, evaluate
from rotatek_compile.geometry import geometry_of
from rotatek_compile.methods import Methods
from rotatek_compile.runtime.enable import enable

_spec = importlib.util.spec_from_file_location("rotatek_mrope_cases", Path(__file__).parent / "test_mrope.py")
_cases = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _cases
_spec.loader.exec_module(_cases)


@pytest.fixture(scope="module")
def qwen3():
    from transformers import GenerationConfig

    model_class, config = _cases.qwen3_vl()
    torch.manual_seed(3)
    model = model_class(config).float().eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "visual" not in name:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 1.5 * weight.shape[1] ** -0.5)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=_cases.EOS)
    return model


@pytest.fixture(scope="module")
def pages(qwen3):
    return _cases.items.__wrapped__(qwen3)


@pytest.mark.parametrize("ask", ["after", "with"])
def test_shared_prefill(qwen3, pages, fake_processor, make_artifact, ask):
    run = Evaluator(qwen3, fake_processor, ask, (_cases.EOS,), 5)
    artifact = make_artifact(8, shape=geometry_of(qwen3.config))
    with enable(qwen3, artifact, backend="torch") as active:
        methods = Methods(active)
        prefilled = run.prefill(pages)
        for entry in (methods.dense(), methods.compiled(), *methods.chosen(["int4", "paper"], (), (0.5,))):
            shared, own = run.finish(prefilled, entry.make()), run.answer(pages, entry.make())
            assert (shared.generated, shared.bytes) == (own.generated, own.bytes)
            assert all(torch.equal(a, b) for a, b in zip(shared.logprobs, own.logprobs, strict=True))
        alone = [run.answer([page], run.dense_cache()).logprobs[0] for page in pages]
    for page, got, reference in zip(pages, alone, run.answer(pages, run.dense_cache()).logprobs, strict=True):
        assert (got - reference).abs().max() < 1e-3
        assert (got - _cases.stock_logprobs(qwen3, page)).abs().max() < 1e-3


def test_questions_without_images(qwen3, fake_processor):
    """As benchmarks/check_skills.py asks them."""
    rope, made = rope_index(qwen3), []
    for n in range(2):
        ids = torch.randint(10, 97, (6 + n,), generator=torch.Generator().manual_seed(n)).tolist()
        sample = Sample(id=str(n), images=(), question="", answers=("",))
        made.append(Encoded(sample, ids, [11, _cases.EOS], 0, {}, rope(torch.tensor([ids]), {})))
    run = Evaluator(qwen3, fake_processor, "with", (_cases.EOS,), 4)
    row = evaluate(run, made, {"dense": run.dense_cache}, 2)[0]
    for item, text in zip(made, row.texts, strict=True):
        ids = torch.tensor([item.prompt])
        qwen3.model.rope_deltas = None
        stock = qwen3.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=_cases.EOS)[0, ids.shape[1] :].tolist()
        assert text == " ".join(str(i) for i in stock if i != _cases.EOS)
