"""The trainer's batched forward against the library's own, through the library's own processor."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from tiny_training import llava_next  # noqa: E402
from tiny_training.documents import FormsComposer  # noqa: E402
from tiny_training.forward import BatchedForward, tile_pages  # noqa: E402
from tiny_training.packing import pack_turns  # noqa: E402

SMALL = {
    "hidden": 64, "layers": 2, "head_dim": 16, "feed_forward": 96, "vision_hidden": 64, "vision_layers": 2, "vision_feed_forward": 96,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return llava_next.build_model(llava_next.build_config(**SMALL)).eval()


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_equals_the_library(model, pages):
    torch.manual_seed(pages)
    processor = llava_next.build_processor()
    documents = FormsComposer(torch.device("cpu")).compose(2, pages, (2, 20))
    turns = pack_turns(documents, 3)
    texts = [processor.tokenizer.decode(row[row != llava_next.PAD]) for row in turns.tokens]
    images = [[Image.fromarray(np.repeat(page.numpy()[:, :, None], 3, axis=2)) for page in document] for document in documents.pages]
    prompts = ["<|user|>" + "<image>\n" * pages + text for text in texts]
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True, padding_side="right")

    pixels = tile_pages(documents.pages.flatten(0, 1))
    assert (pixels - inputs["pixel_values"]).abs().max() * 127.5 < 1.5  # grey levels of 255

    with torch.no_grad():
        expected = model(**inputs).logits
        actual, grid = BatchedForward(model).text_logits(inputs["pixel_values"], pages, turns.tokens)
    assert grid.shape[:3] == (2 * pages, 20, 20)
    start = 1 + 521 * pages
    for row in range(2):
        length = int((turns.tokens[row] != llava_next.PAD).sum())
        assert torch.equal(inputs["input_ids"][row, start : start + length], turns.tokens[row, :length])
        assert (actual[row, :length] - expected[row, start - 1 : start - 1 + length]).abs().max() < 1e-4


def test_turns_are_the_chat_template():
    torch.manual_seed(0)
    processor = llava_next.build_processor()
    documents = FormsComposer(torch.device("cpu")).compose(3, 2, (1, 4))
    turns = pack_turns(documents, 12)
    for row, answer, used in zip(turns.tokens, turns.answer, documents.used, strict=True):
        text = processor.tokenizer.decode(row[row != llava_next.PAD])
        messages, pairs = [], text.split("<eos>")[:-1]
        assert len(pairs) == min(12, int(used.sum()))
        for pair in pairs:
            question, value = pair.removeprefix("<|user|>").split("<|assistant|>")
            messages += [{"role": "user", "content": [{"type": "text", "text": question}]}, {"role": "assistant", "content": value}]
        messages[0]["content"] = [{"type": "image"}, {"type": "image"}, *messages[0]["content"]]
        assert processor.apply_chat_template(messages) == "<|user|>" + "<image>\n" * 2 + text
        learned = processor.tokenizer.decode(row[answer])
        assert learned == "".join(message["content"] + "<eos>" for message in messages if message["role"] == "assistant")


def test_composed_cells_are_what_the_turns_ask():
    torch.manual_seed(1)
    documents = FormsComposer(torch.device("cpu")).compose(4, 3, (6, 18))
    for document in range(4):
        lines = ["".join(chr(32 + code) for code in row) for row in documents.cells[document].flatten(0, 1).tolist()]
        keys = []
        for field, line in enumerate(lines):
            if not documents.used[document, field]:
                assert not line.strip()
                continue
            key = "".join(chr(32 + code) for code in documents.keys[document, field].tolist()).rstrip()
            value = "".join(chr(32 + code) for code in documents.values[document, field].tolist()).rstrip()
            assert line.strip() == f"{key}: {value}"
            keys.append(key)
        assert len(keys) == len(set(keys))
