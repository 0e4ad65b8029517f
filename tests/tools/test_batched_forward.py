"""The trainer's batched forward of LLaVA-NeXT against the library's own, through the library's own processor."""

import pytest
import torch

from tiny_training import llava_next
from tiny_training.bundled import page
from tiny_training.forward import BatchedForward, character_loss, tile_pages
from tiny_training.rendering import Renderer

SMALL = {
    "hidden": 64, "layers": 2, "head_dim": 16, "feed_forward": 96, "vision_hidden": 64, "vision_layers": 2, "vision_feed_forward": 96,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    model = llava_next.build_model(llava_next.build_config(**SMALL)).eval()
    with torch.no_grad():  # fresh weights are so small that wrong positions would hardly show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_equals_the_library(model, pack, to_images, pages):
    torch.manual_seed(pages)
    processor = llava_next.build_processor()
    batch = pack(llava_next.TOKENS, 2, pages, name=f"forward/{pages}")
    drawn = Renderer(torch.device("cpu")).draw(batch.cells.flatten(0, 1))
    lengths = (batch.tokens != llava_next.PAD).sum(1).tolist()
    texts = [processor.tokenizer.decode(row[:length]) for row, length in zip(batch.tokens, lengths, strict=True)]
    prompts = ["<|user|>" + "<image>\n" * pages + text for text in texts]
    images = to_images(drawn.unflatten(0, (2, pages)))
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True, padding_side="right")

    pixels = tile_pages(drawn)
    difference = (pixels - inputs["pixel_values"]).abs() * 127.5  # grey levels of 255
    assert difference.max() < 1.5 and difference[:, 1:].max() < 1e-3  # only the reduced page is resampled

    forward = BatchedForward(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        actual, grid, masses = forward.text_logits(inputs["pixel_values"], pages, batch.tokens)
    assert grid.shape[:3] == (2 * pages, 20, 20) and masses == []
    start = 1 + 521 * pages
    assert expected[:, start - 1 :].std() > 0.1
    for columns in forward.page_columns(pages):
        assert (inputs["input_ids"][:, columns] == llava_next.IMAGE).all()
    assert sum((inputs["input_ids"] == llava_next.IMAGE).sum(1).tolist()) == 2 * 520 * pages
    assert columns.stop + forward.after_page == start
    for row, length in enumerate(lengths):
        assert torch.equal(inputs["input_ids"][row, start : start + length], batch.tokens[row, :length])
        assert (actual[row, :length] - expected[row, start - 1 : start - 1 + length]).abs().max() < 1e-4


def test_characters_are_read_off_their_own_cell():
    cells = torch.tensor([[0, 1, page.BAR, 40]], dtype=torch.uint8).reshape(1, 1, 2, 2)
    embeddings = torch.eye(llava_next.VOCABULARY)
    tokens = torch.tensor([llava_next.FIRST_CHARACTER, llava_next.FIRST_CHARACTER + 1, llava_next.UNKNOWN, llava_next.FIRST_CHARACTER + 40])
    right = 9 * embeddings[tokens].reshape(1, 2, 2, -1)
    arguments = embeddings, cells, llava_next.FIRST_CHARACTER, llava_next.UNKNOWN
    assert character_loss(right, *arguments) < 1e-6 < 1 < character_loss(right.flip(1), *arguments)
