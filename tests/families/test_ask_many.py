"""One page compressed once, many questions: each is what the stock model answers to page and question at once, in every family.

M-RoPE models (Qwen-VL) keep on themselves how far positions and tokens are apart; here other prompts overwrite that between questions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from builders import BUILDERS, ID, VISION, missing  # noqa: E402

from rotatek_compile.artifact import Artifact, Method  # noqa: E402
from rotatek_compile.ask_many import compress  # noqa: E402
from rotatek_compile.bases import calibrated_basis  # noqa: E402
from rotatek_compile.batches import prompt_text, tokenized  # noqa: E402
from rotatek_compile.errors import RotateKError, UsageError  # noqa: E402
from rotatek_compile.geometry import geometry_of  # noqa: E402
from rotatek_compile.kernels.slabs import Slabs  # noqa: E402
from rotatek_compile.plan import HeadPlan, plan_tensors  # noqa: E402
from rotatek_compile.runtime.document import Document, load_document  # noqa: E402
from rotatek_compile.runtime.enable import enable  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
QUESTIONS = ("What is it?", "And how many of them are there, all in all?", "Why?")
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def pages(*seeds: int) -> list[Any]:
    from PIL import Image

    shapes = ((64, 64, 3), (64, 96, 3))
    made = [torch.randint(0, 256, shapes[seed % 2], generator=torch.Generator().manual_seed(seed), dtype=torch.uint8) for seed in seeds]
    return [Image.fromarray(pixels.numpy()) for pixels in made]


def artifact(model: Any, slabs: Slabs, window: int = 8) -> Artifact:
    shape, method = geometry_of(model.config), Method(window=window, fallback_factor=0.0)
    generator, tensors, plan = torch.Generator().manual_seed(7), {}, {}
    for i in shape.compressible:
        heads, dim = shape.layers[i].kv_heads, shape.layers[i].head_dim
        a, b = torch.randn(2, heads, dim, dim, generator=generator)
        made = calibrated_basis("two-sided", a @ a.mT / dim, b @ b.mT / dim)
        for side in ("key", "value"):
            tensors[f"layers.{i}.visual.{side}_mean"] = torch.randn(heads, dim, generator=generator)
            tensors[f"layers.{i}.visual.{side}_encode"] = made.encode.float()
            tensors[f"layers.{i}.visual.{side}_spectrum"] = made.spectrum.float()
        plan[i] = [HeadPlan(slabs, slabs)] * heads
    return Artifact(shape, method, tensors | plan_tensors(plan), {}, {})


def stock(model: Any, processor: Any, images: list[Any], question: str, **options: Any) -> str:
    inputs = tokenized(processor, prompt_text(processor, len(images), question), images)
    out = model.generate(**inputs, **OPTIONS | options)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def text_only() -> dict[str, Any]:
    """No placeholder is generated (it would be an image to the stock model), and nothing else that is left out of answers."""
    return {"suppress_tokens": list(ID.values())}


@pytest.mark.parametrize("family", VISION)
def test_questions_are_the_stock_models(family: str, tmp_path: Path) -> None:
    if package := missing(family):
        pytest.skip(f"its processor needs {package}")
    model, processor = BUILDERS[family]()
    model, images, other = model.float().eval(), pages(0, 1), pages(3)
    options = OPTIONS | text_only()
    torch.set_num_threads(1)
    with torch.no_grad():
        expected = [stock(model, processor, images, question, **options) for question in QUESTIONS]
        short = stock(model, processor, other, QUESTIONS[0], **options)
        assert len({*expected, short}) > 2, "the model reads questions and pages"
        with enable(model, artifact(model, Slabs(32)), backend="torch"):
            document, second = compress(model, processor, images), compress(model, processor, other)
            for number in (1, 0, 2, 1):
                assert document.ask(QUESTIONS[number], **options) == expected[number]
                assert second.ask(QUESTIONS[0], **options) == short
                stock(model, processor, other, "Something else?", **options)  # through enable(), a prompt of its own
            if geometry_of(model.config).hybrid:
                with pytest.raises(RotateKError, match="keep their stock cache, which cannot be saved"):
                    document.save(tmp_path / "document")
                return
            document.save(tmp_path / "document")
        coded = artifact(model, Slabs(8, 8, 16))
        with enable(model, coded, backend="torch"):
            with pytest.raises(RotateKError, match="another artifact or budget"):
                load_document(tmp_path / "document", model, processor)
            before = compress(model, processor, images)
            answers = [before.ask(question, **options) for question in QUESTIONS]
            file = before.save(tmp_path / "coded")
        fresh, processor = BUILDERS[family]()  # as a new process has it
        fresh = fresh.float().eval()
        with enable(fresh, coded, backend="torch"):
            stock(fresh, processor, other, "Something else?", **options)
            loaded = load_document(file, fresh, processor)
            assert [loaded.ask(question, **options) for question in QUESTIONS] == answers


def test_batches_of_documents_with_mrope(tmp_path: Path) -> None:
    """Rows of different length, each with positions of its own."""
    model, processor = BUILDERS["qwen3-vl"]()
    model = model.float().eval()
    options = OPTIONS | text_only()
    rows = [pages(0, 1), pages(3)]
    texts = [prompt_text(processor, len(images), "What?") for images in rows]
    processor.tokenizer.padding_side = "left"
    inputs = processor(text=texts, images=rows, padding=True, return_tensors="pt")
    more = processor.tokenizer(["And where?", "Who is it, really?"], padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        whole = {key: torch.cat([inputs[key], more[key]], 1) for key in ("input_ids", "attention_mask")}
        types = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more["input_ids"])], 1)
        start = whole["input_ids"].shape[1]
        expected = model.generate(**{**inputs, **whole, "mm_token_type_ids": types}, **options)[:, start:]
        with enable(model, artifact(model, Slabs(32)), backend="torch"):
            document = Document.read(model, **inputs)
            assert document.cache.rope_deltas.shape == (2, 1) and len(set(document.cache.rope_deltas.flatten().tolist())) == 2
            document.save(tmp_path / "document")
            model.model.rope_deltas = torch.full((1, 1), 99)
            for one in (document, load_document(tmp_path / "document", model)):
                out = one.generate(more["input_ids"], more["attention_mask"], **options)
                assert torch.equal(out[:, more["input_ids"].shape[1] :], expected)
                several = one.generate(more["input_ids"], more["attention_mask"], num_beams=2, **options)
                assert several.shape == out.shape
            assert model.model.rope_deltas.tolist() == [[99]], "what another conversation has there is put back"


def test_uses_that_would_be_silently_wrong_are_refused(tmp_path: Path) -> None:
    model, processor = BUILDERS["qwen3-vl"]()
    model, images = model.float().eval(), pages(0)
    inputs = dict(tokenized(processor, prompt_text(processor, 1, "What?"), images))
    ids = processor.tokenizer("And?", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        with pytest.raises(RotateKError, match="no artifact is enabled"):
            compress(model, processor, images)
        with enable(model, artifact(model, Slabs(32)), backend="torch") as enabled:
            bare = enabled.new_cache()
            model(**inputs, past_key_values=bare)
            with pytest.raises(RotateKError, match=r"position of the next token beside the cache \(rope_deltas\)"):
                bare.save(tmp_path / "bare")
            document = Document.read(model, **inputs)
            with pytest.raises(UsageError, match="a question is text, so pixel_values cannot be given"):
                document.generate(ids, pixel_values=inputs["pixel_values"])
            with pytest.raises(UsageError, match="leave past_key_values out"):
                document.generate(ids, past_key_values=bare)
            with pytest.raises(UsageError, match=r"a question is of shape \[1, T\]; got input_ids \[2, 4\]"):
                document.generate(ids.expand(2, -1))
            with pytest.raises(UsageError, match=r"ask\(\) needs a document made by compress"):
                document.ask("And?")
            with pytest.raises(UsageError, match="a question is text, this is list"):
                document.ask(["And?", "What?"])
            single = compress(model, processor, images[0])  # one picture need not be a list
            assert single.ask("And?", max_new_tokens=4) == compress(model, processor, images[:1]).ask("And?", max_new_tokens=4)
            with pytest.raises(RotateKError, match="there is no folder .*nowhere; make it first"):
                single.save(tmp_path / "nowhere" / "document")
            with pytest.raises(UsageError, match="at least one image"):
                compress(model, processor, [])
            with pytest.raises(UsageError, match="read from input_ids"):
                Document.read(model, inputs_embeds=torch.zeros(1, 3, 128))
            model(input_ids=ids, past_key_values=document.cache)
            with pytest.raises(RotateKError, match="was used outside of it"):
                document.generate(ids)
            made = compress(model, processor, images)
            with pytest.raises(UsageError, match="a token that stands for an image"):
                made.ask("What is <image>?")
            made.save(tmp_path / "made")
            with pytest.raises(UsageError, match=r"ask\(\) needs"):
                load_document(tmp_path / "made", model).ask("And?")
            with pytest.MonkeyPatch.context() as patch:  # a tokenizer whose text does not give its ids again
                patch.setattr(type(processor.tokenizer), "decode", lambda *_, **__: "? What does it say? ")
                assert compress(model, processor, images).frame is None
        with pytest.raises(RotateKError, match="no longer enabled on this model"):
            document.generate(ids)
