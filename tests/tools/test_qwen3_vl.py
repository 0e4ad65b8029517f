"""The tiny Qwen3-VL: its checkpoint without torchvision, and the trainer's batched forward against the library's own."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.utils.import_utils import is_torchvision_available

from rotatek_compile.errors import RotateKError
from rotatek_compile.models import load_processor, resolve

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from tiny_training import forward_qwen3_vl, qwen3_vl  # noqa: E402
from tiny_training.forward_qwen3_vl import BatchedForward, patch_pages  # noqa: E402

SMALL = {
    "hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 32, "feed_forward": 96, "vision_hidden": 32, "vision_layers": 3,
    "vision_heads": 2, "vision_feed_forward": 64, "deepstack": (0, 1),
}  # fmt: skip
TEXTS = ["Total?<|assistant|>12<eos><|user|>Name of the payer?<|assistant|>Q. Zed<eos>", "x<|assistant|>y<eos>"]


@pytest.fixture(scope="module")
def model():
    model = qwen3_vl.build_model(qwen3_vl.build_config(**SMALL)).eval()
    with torch.no_grad():  # fresh weights are so small that wrong positions would hardly show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("tiny-qwen3-vl")
    qwen3_vl.save_checkpoint(qwen3_vl.build_model(model.config), path)
    return path


def random_pages(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 320, 320), dtype=np.uint8))


def to_images(pages):
    return [Image.fromarray(page.numpy()).convert("RGB") for page in pages]


def processed(pages_each, seed=0, side="right"):
    """Random pages [2 * pages_each, 320, 320] and what the processor makes of them with the two TEXTS."""
    pages = random_pages(2 * pages_each, seed)
    images = to_images(pages)
    page = "<|vision_start|><|image_pad|><|vision_end|>\n"
    inputs = qwen3_vl.build_processor()(
        text=["<|user|>" + page * pages_each + text for text in TEXTS], images=[images[:pages_each], images[pages_each:]],
        return_tensors="pt", padding=True, padding_side=side,
    )  # fmt: skip
    return pages, inputs


def test_default_checkpoint_can_be_shipped():
    with torch.device("meta"):
        model = qwen3_vl.Qwen3VLForConditionalGeneration(qwen3_vl.build_config())
    assert 17_000_000 < 2 * sum(p.numel() for p in model.parameters()) < 19_900_000  # bf16; 100 kB are left for headers and the processor
    text = model.config.text_config
    assert text.rope_parameters["mrope_section"] == [24, 20, 20] and not model.config.tie_word_embeddings
    assert len(model.model.visual.deepstack_merger_list) == 2
    assert text.vocab_size == qwen3_vl.VOCABULARY == 105


def test_tokens_are_characters():
    tokenizer = qwen3_vl.build_tokenizer()
    text = "".join(map(chr, range(32, 127)))
    assert tokenizer(text + "\n")["input_ids"] == [*range(qwen3_vl.FIRST_CHARACTER, qwen3_vl.VOCABULARY), qwen3_vl.NEWLINE]
    assert tokenizer("".join(qwen3_vl.SPECIAL))["input_ids"] == list(range(9))
    assert tokenizer("é")["input_ids"] == [qwen3_vl.UNKNOWN]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (qwen3_vl.PAD, qwen3_vl.EOS)
    assert tokenizer.decode(tokenizer("a b~<eos>")["input_ids"], skip_special_tokens=True) == "a b~"


def test_saved_processor_loads_and_equals_the_built_one(folder):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Due date?"}]}]
    loaded, built = load_processor(resolve(str(folder))), qwen3_vl.build_processor()
    assert isinstance(loaded, Qwen3VLProcessor) and loaded.tokenizer.padding_side == "left"
    prompt = loaded.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "<|user|><|vision_start|><|image_pad|><|vision_end|>\nDue date?<|assistant|>"
    image = to_images(random_pages(1))[0]
    arguments = {"text": [prompt, "<|user|>?" + prompt], "images": [[image], [image]], "padding": True, "return_tensors": "pt"}
    first, second = loaded(**arguments), built(**arguments)
    assert set(first) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    # where torchvision exists, the loaded processor normalises with it, in another order
    assert (first.pop("pixel_values") - second.pop("pixel_values")).abs().max() <= (1e-6 if is_torchvision_available() else 0)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["mm_token_type_ids"].sum(1).tolist() == [400, 400]
    assert torch.equal(first["mm_token_type_ids"] == 1, first["input_ids"] == qwen3_vl.IMAGE)
    assert first["image_grid_thw"].tolist() == [[1, 40, 40]] * 2


def test_chat_template_loads_the_images_of_a_conversation():
    image = to_images(random_pages(1))[0]
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Sum?"}]}]
    inputs = qwen3_vl.build_processor().apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1600, 384) and inputs["input_ids"].shape == (1, 1 + 403 + 4 + 1)


@pytest.mark.parametrize("side", [160, 333, 640, 1001])
def test_squares_become_pages(side):
    image = Image.new("RGB", (side, side))
    inputs = qwen3_vl.build_processor()(text=["<|image_pad|>"], images=[image], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 40, 40]]


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_videos_are_refused_and_the_video_section_survives(folder, tmp_path):
    loaded = load_processor(resolve(str(folder)))
    with pytest.raises(RotateKError, match="videos need torchvision"):
        loaded(text=["<|video_pad|>"], videos=[np.zeros((4, 3, 32, 32), np.uint8)])
    loaded.save_pretrained(tmp_path)
    for path in (folder, tmp_path):
        saved = json.loads((path / "processor_config.json").read_text())
        assert saved["processor_class"] == "Qwen3VLProcessor"
        assert saved["image_processor"]["image_processor_type"] == "Qwen2VLImageProcessor"
        assert saved["video_processor"]["video_processor_type"] == "Qwen3VLVideoProcessor"
        assert json.loads((path / "tokenizer_config.json").read_text())["processor_class"] == "Qwen3VLProcessor"


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
@pytest.mark.parametrize("stock", [Qwen3VLProcessor, Qwen2_5_VLProcessor])
def test_checkpoints_with_a_preprocessor_config_load(folder, tmp_path, stock):
    # as the large models on the Hub have it: no processor_config.json, and the image processor's file names the class
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    saved = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    saved |= {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": stock.__name__}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    loaded = load_processor(resolve(str(tmp_path)))
    assert isinstance(loaded, stock) and loaded.image_processor.patch_size == 8
    inputs = loaded(text=["<|image_pad|>"], images=to_images(random_pages(1)), return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 400)


def test_other_failures_are_reported_as_they_are(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RotateKError, match="could not load the processor of") as caught:
        load_processor(resolve(str(tmp_path)))
    assert "orchvision" not in str(caught.value)


def test_checkpoint_generates(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder).float().eval()
    _, inputs = processed(1, side="left")
    tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


def test_patches_are_the_image_processors():
    pages, inputs = processed(1)
    rows = patch_pages(pages)
    assert rows.shape == inputs["pixel_values"].shape == (3200, 384)
    assert torch.equal(rows, inputs["pixel_values"])


@pytest.mark.parametrize("pages_each", [1, 2])
def test_equals_the_library(model, pages_each):
    pages, inputs = processed(pages_each, seed=pages_each)
    start = 1 + forward_qwen3_vl.PAGE_TOKENS * pages_each
    tokens = inputs["input_ids"][:, start:]
    forward = BatchedForward(model)
    model.model.rope_deltas = None
    with torch.no_grad():
        expected = model(**inputs).logits
        actual, grid, masses = forward.text_logits(patch_pages(pages), pages_each, tokens)
    positions = model.model.get_rope_index(**{name: inputs[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")})[0]
    assert torch.equal(forward.positions(pages_each, tokens.shape[1], tokens.device).expand(-1, 2, -1), positions)
    assert grid.shape == (2 * pages_each, 20, 20, 64) and masses == []
    for columns in forward.page_columns(pages_each):
        assert (inputs["input_ids"][:, columns] == qwen3_vl.IMAGE).all()
    assert columns.stop + forward.after_page == start
    assert expected[:, start - 1 :].std() > 0.1
    for row in range(2):
        length = int(inputs["attention_mask"][row].sum()) - start
        difference = actual[row, :length] - expected[row, start - 1 : start - 1 + length]
        assert difference.abs().max() < 1e-4


def test_losses_train_every_parameter_and_pass_the_reading_on(model, monkeypatch):
    pages, inputs = processed(1)
    tokens = inputs["input_ids"][:, 1 + forward_qwen3_vl.PAGE_TOKENS :]
    forward, seen = BatchedForward(model), []
    cells = torch.randint(0, 95, (2, 1, 20, 20))
    reading = [{"marker": torch.tensor(number)} for number in range(3)]

    def text_layer(layer, hidden, cosine, sine, extra):
        seen.append(extra)
        return hidden * 1.0, [extra["marker"]]

    monkeypatch.setattr(forward, "text_layer", text_layer)
    losses = forward.losses(patch_pages(pages), 1, tokens, tokens > qwen3_vl.ASSISTANT, cells, reading)
    assert [int(mass) for mass in losses.masses] == [0, 1, 2]
    assert [int(extra["marker"]) for extra in seen] == [0, 1, 2]
    monkeypatch.undo()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = forward.losses(patch_pages(pages), 1, tokens, tokens > qwen3_vl.ASSISTANT, cells)
    assert losses.hit.shape == tokens.shape
    (losses.answer + losses.auxiliary).backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum() > 0]
    model.zero_grad()
    assert silent == []
