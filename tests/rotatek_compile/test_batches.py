"""Padding, joining and stacking of encoded samples, and the positions they get."""

from types import SimpleNamespace

import pytest
import torch

from rotatek_compile.batches import encode, end_ids, join, merge_media, pad, position_ids, prompt_text, template_hash, tokenized
from rotatek_compile.calibration_data.sample import Sample
from rotatek_compile.errors import RotateKError


def test_pad_and_join():
    chunk = pad([[1, 2, 3], [4]], 0)
    assert chunk.ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert chunk.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert pad([[1, 2], [4]], 9, left=False).ids.tolist() == [[1, 2], [4, 9]]
    both = join(chunk, pad([[5], [0]], 0))
    assert both.ids.tolist() == [[1, 2, 3, 5], [0, 0, 4, 0]]
    assert both.mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert pad([[], [1]], 0).mask.tolist() == [[0], [1]]


def test_positions_skip_padding_also_in_the_middle():
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 4, 5]]


def test_media_are_stacked_over_images_and_padded_over_tiles():
    a = SimpleNamespace(media={"pixel_values": torch.ones(1, 3, 2, 2, 2), "image_sizes": torch.tensor([[4, 4]])})
    b = SimpleNamespace(media={"pixel_values": 2 * torch.ones(2, 5, 2, 2, 2), "image_sizes": torch.tensor([[8, 4], [4, 8]])})
    merged = merge_media([a, SimpleNamespace(media={}), b], torch.device("cpu"), torch.bfloat16)
    assert merged["pixel_values"].shape == (3, 5, 2, 2, 2)
    assert merged["pixel_values"].dtype == torch.bfloat16
    assert merged["pixel_values"][:, :, 0, 0, 0].tolist() == [[1, 1, 1, 0, 0], [2] * 5, [2] * 5]
    assert merged["image_sizes"].tolist() == [[4, 4], [8, 4], [4, 8]]
    assert merged["image_sizes"].dtype == torch.int64


class FakeProcessor:
    """Three image tokens (5) per image after the text's characters; records what it was asked."""

    chat_template = "template"

    def __init__(self, per_image: int = 3) -> None:
        self.per_image = per_image
        self.tokenizer = lambda text, add_special_tokens: {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        kinds = [item["type"] for item in messages[0]["content"]]
        return "".join("I" if kind == "image" else "T" for kind in kinds) + messages[0]["content"][-1]["text"]

    def __call__(self, text, images, return_tensors):
        ids = [t for c in text[0] for t in ([5] * self.per_image if c == "I" else [ord(c)])]
        pixels = torch.ones(len(images or ()), 1)
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)), "pixel_values": pixels}


def test_encode():
    processor, geometry = FakeProcessor(), SimpleNamespace(model_type="llava_next", visual_token_ids=(5,), position_axes=1)
    sample = Sample(id="s", images=("a", "b"), question="q?", answers=("ok", "no"))
    assert prompt_text(processor, 2, "q?") == "IITq?"
    item = encode(processor, sample, geometry, 2)
    assert item.prompt == [5] * 6 + [ord("T"), ord("q"), ord("?")]
    assert item.answer == [ord("o"), ord("k"), 2]
    assert item.visual_end == 6
    assert set(item.media) == {"pixel_values"}
    with pytest.raises(RotateKError, match="sample s: the processor turned 2 images into no image tokens"):
        encode(FakeProcessor(0), sample, geometry, 2)


class TypedProcessor(FakeProcessor):
    """Says of each token whether it is one of an image."""

    def __call__(self, text, images, return_tensors):
        inputs = super().__call__(text, images, return_tensors)
        return inputs | {"token_type_ids": (inputs["input_ids"] == 5).long()}


def test_only_families_that_ask_for_token_types_get_them():
    sample = Sample(id="s", images=("a",), question="q", answers=("ok",))
    for kind, expected in (("gemma3", {"token_type_ids": [1, 1, 0, 0]}), ("llava_next", {})):
        item = encode(TypedProcessor(2), sample, SimpleNamespace(model_type=kind, visual_token_ids=(5,), position_axes=1), 2)
        assert item.token_types == expected and set(item.media) == {"pixel_values"}


def test_token_types_are_padded_and_cut_like_the_prompts():
    long = SimpleNamespace(media={}, token_types={"token_type_ids": [0, 1, 1, 0]})
    short = SimpleNamespace(media={}, token_types={"token_type_ids": [1, 0]})
    cpu = torch.device("cpu")
    # both prompts cut to what is read first, or with an answer token behind
    cut = merge_media([long, short], cpu, torch.float32, pad([[7, 5, 5], [5]], 0))
    assert cut["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 1]]
    whole = merge_media([long, short], cpu, torch.float32, pad([[7, 5, 5, 7, 9], [5, 7, 9]], 0))
    assert whole["token_type_ids"].tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]
    assert merge_media([long, short], cpu, torch.float32) == {}


def test_images_of_different_sizes_are_padded_behind():
    a = SimpleNamespace(media={"pixel_values": torch.ones(1, 1, 1, 2, 3)}, token_types={})
    b = SimpleNamespace(media={"pixel_values": 2 * torch.ones(1, 2, 1, 3, 2)}, token_types={})
    merged = merge_media([a, b], torch.device("cpu"), torch.float32)["pixel_values"]
    assert merged[:, :, 0].tolist() == [
        [[[1, 1, 1], [1, 1, 1], [0, 0, 0]], [[0, 0, 0]] * 3],
        [[[2, 2, 0]] * 3, [[2, 2, 0]] * 3],
    ]


def test_a_text_only_prompt_ends_in_its_question():
    geometry = SimpleNamespace(model_type="llama", visual_token_ids=(), position_axes=1)
    ends = {}
    for length in (1, 10, 500):
        sample = Sample(id="s", images=(), question="q" * (length - 1), answers=("ok",))
        item = encode(FakeProcessor(), sample, geometry, 2)
        ends[len(item.prompt)] = item.visual_end
    assert ends == {1: 1, 10: 5, 500: 500 - 64}


def test_a_prompt_that_begins_with_the_first_token_gets_no_other():
    asked = []

    def processor(**arguments):
        asked.append(arguments)

    processor.tokenizer = SimpleNamespace(bos_token="<bos>")
    tokenized(processor, "<bos>Hi", ())
    tokenized(processor, "Hi", ("page",))
    assert asked == [
        {"text": ["<bos>Hi"], "images": None, "return_tensors": "pt", "add_special_tokens": False},
        {"text": ["Hi"], "images": ["page"], "return_tensors": "pt"},
    ]


def test_end_ids():
    def model(own, text):
        config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(eos_token_id=text))
        return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own), config=config)

    assert end_ids(model(7, 1)) == (7,)
    assert end_ids(model([7, 8], 1)) == (7, 8)
    assert end_ids(model(None, 1)) == (1,)
    assert end_ids(model(0, 1)) == (0,)
    with pytest.raises(RotateKError, match="names no end-of-sequence token"):
        end_ids(model(None, None))


def test_template_hash():
    assert template_hash(SimpleNamespace(chat_template="a")) != template_hash(SimpleNamespace(chat_template="b"))


@pytest.mark.parametrize(("medium", "article"), [("image", "an"), ("video", "a")])
def test_questions_may_not_hold_placeholders(medium, article):
    processor = SimpleNamespace(image_token="<image>", video_token="<video>")
    with pytest.raises(RotateKError, match=f"holds <{medium}>, which stands for {article} {medium}; leave it out"):
        prompt_text(processor, 1, f"What <{medium}> is it?")
    # the token that the model sees may be another than the one in the prompt
    processor = SimpleNamespace(image_token="<start>", tokenizer=SimpleNamespace(image_token="<image>", video_token="<video>"))
    with pytest.raises(RotateKError, match=f"holds <{medium}>, which stands for {article} {medium}; leave it out"):
        prompt_text(processor, 1, f"What <{medium}> is it?")
