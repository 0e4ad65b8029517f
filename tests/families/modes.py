"""Ways of generating, each a function of a `Subject`: run it on the stock cache, on a full-rank artifact and below, and compare.

A mode returns what was generated as `Output`; `Unfit` says why a family has no such mode.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

NEW = 8


class Unfit(Exception):
    """This family has no such mode, and why."""


@dataclass
class Output:
    """Token ids [B, N] or text that was generated, logits fp32 [B, N, V] before each where the way of asking gives them, the cache."""

    tokens: Any
    logits: Tensor | None = None
    cache: Any = None


@dataclass
class Subject:
    """A tiny model with its processor, and prompts made by them."""

    name: str
    model: Any
    processor: Any
    sees: bool

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def visual(self) -> list[int]:
        ids = (getattr(self.model.config, key, None) for key in ("image_token_id", "video_token_id"))
        return [i for i in ids if isinstance(i, int)]

    def picture(self, seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
        noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return Image.fromarray(noise.numpy())

    def inputs(self, *rows: tuple[str, list[Image.Image]]) -> dict[str, Any]:
        """Left-padded inputs of prompts and their pictures (which a text-only model is not shown)."""
        rows = tuple((text, pictures if self.sees else []) for text, pictures in rows)
        texts = []
        for text, pictures in rows:
            content: Any = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}] if self.sees else text
            message = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        self.tokenizer.padding_side = "left"
        if not self.sees:
            return dict(self.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))
        pictures = [own for _, own in rows]
        return dict(self.processor(text=texts, images=pictures if any(pictures) else None, padding=True, return_tensors="pt"))

    def one(self, text: str = "What is it?", seed: int = 0) -> dict[str, Any]:
        return self.inputs((text, [self.picture(seed)]))

    def generate(self, inputs: dict[str, Any], new: int = NEW, **options: Any) -> Output:
        """`model.generate`, never ending early and never writing a placeholder."""
        inner = getattr(self.model, "model", None)
        if hasattr(inner, "rope_deltas") and "past_key_values" not in options:
            inner.rope_deltas = None  # state of the model, left over from another prompt
        options = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **options}
        if self.visual:
            options.setdefault("suppress_tokens", self.visual)
        out = self.model.generate(**inputs, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **options)
        start = inputs["input_ids"].shape[1]
        return Output(out.sequences[:, start:], torch.stack(out.logits, 1).float(), out.past_key_values)


def greedy(s: Subject) -> Output:
    return s.generate(s.one())


def sampling(s: Subject) -> Output:
    torch.manual_seed(5)
    return s.generate(s.one(), do_sample=True, temperature=0.7)


def beams(s: Subject) -> Output:
    return s.generate(s.one(), num_beams=3)


def return_sequences(s: Subject) -> Output:
    torch.manual_seed(5)
    return s.generate(s.one(), do_sample=True, num_return_sequences=3)


def ragged(s: Subject) -> Output:
    rows = [("What is it?", [s.picture(0)]), ("And how many of them are there?", [s.picture(1, (96, 64)), s.picture(2)])]
    if s.name != "gemma3":  # its processor wants as many pictures in every row
        rows.append(("No picture.", []))
    return s.generate(s.inputs(*rows))


def several_images(s: Subject) -> Output:
    return s.generate(s.inputs(("Compare them.", [s.picture(0), s.picture(1, (96, 64)), s.picture(2)])))


def prompt_lookup(s: Subject) -> Output:
    inputs = s.one("abcabcabcabcabcabc")
    return s.generate(inputs, 24, prompt_lookup_num_tokens=4, max_matching_ngram_size=1)


def chunked_prefill(s: Subject) -> Output:
    if s.sees and not hasattr(s.model, "_supports_mm_encoder_outputs"):
        raise Unfit("this version of transformers reads no pictures in chunks")
    inputs = s.inputs(("What is it?", [s.picture(0), s.picture(1)]))
    return s.generate(inputs, prefill_chunk_size=max(3, inputs["input_ids"].shape[1] // 5))


def second_question(s: Subject) -> Output:
    return _again(s, s.generate(s.one(), 4), s.one(), dict(s.tokenizer("And where?", add_special_tokens=False, return_tensors="pt")))


def second_image(s: Subject) -> Output:
    if not s.sees:
        raise Unfit("text only")
    return _again(s, s.generate(s.one(), 4), s.one(), s.one("And this?", seed=3))


def _again(s: Subject, first: Output, inputs: dict[str, Any], more: dict[str, Any]) -> Output:
    """A second turn on the cache of the first: the new tokens alone, with the mask of the whole."""
    last = first.tokens[:, -1:]  # generated but not read yet
    ids = torch.cat([last, more["input_ids"]], 1)
    read = inputs["input_ids"].shape[1] + first.tokens.shape[1] - 1
    rest = {k: v for k, v in more.items() if k not in ("input_ids", "attention_mask")}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in rest:
            rest[key] = torch.cat([torch.zeros_like(last), rest[key]], 1)
    whole = {"input_ids": ids, "attention_mask": torch.ones(1, read + ids.shape[1], dtype=torch.int64), **rest}
    return s.generate(whole, past_key_values=first.cache)


def video(s: Subject) -> Output:
    """A clip of four frames between text. The tensors are made here: video processors need torchvision."""
    maker = VIDEOS.get(s.name)
    if maker is None:
        raise Unfit("text only" if not s.sees else "no video" if s.name not in FRAMES else "frames are images")
    return s.generate(maker(s))


def _ids(s: Subject, text: str) -> dict[str, Any]:
    ids = s.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    types = sum((kind * (ids == token)).long() for kind, token in ((1, s.model.config.image_token_id), (2, s.model.config.video_token_id)))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def _qwen_video(s: Subject) -> dict[str, Any]:
    frames, height, width = 2, 4, 4  # of patches, two pictures each
    part = "<|vision_start|>" + "<video>" * (height * width // 4) + "<|vision_end|>"
    stamped = "".join(f"at {n} seconds{part}" for n in range(frames))  # Qwen3-VL writes the time of every frame
    joined = "<|vision_start|>" + "<video>" * (frames * height * width // 4) + "<|vision_end|>"
    media = {
        "pixel_values_videos": _noise(frames * height * width, 3 * 2 * 8 * 8),
        "video_grid_thw": torch.tensor([[frames, height, width]]),
    }
    return _ids(s, f"watch {stamped if s.name == 'qwen3-vl' else joined} and tell") | media


def _onevision_video(s: Subject) -> dict[str, Any]:
    frames = 4  # of 4 x 4 patches, pooled to 2 x 2, and one newline behind them all
    inputs = _ids(s, "watch " + "<video>" * (frames * 4 + 1) + " and tell")
    del inputs["mm_token_type_ids"]
    return inputs | {"pixel_values_videos": _noise(1, frames, 3, 64, 64)}


VIDEOS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "qwen2.5-vl": _qwen_video, "qwen3-vl": _qwen_video, "llava-onevision": _onevision_video
}  # fmt: skip
FRAMES = ("internvl3", "smolvlm")  # their processors hand the model a clip as one image per frame


def streaming(s: Subject) -> Output:
    """Text arrives while another thread generates."""
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(s.tokenizer, skip_prompt=True)
    done: list[Output] = []
    thread = threading.Thread(target=lambda: done.append(s.generate(s.one(), streamer=streamer)))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == s.tokenizer.decode(done[0].tokens[0])
    return done[0]


def pipeline(s: Subject) -> Output:
    from transformers import pipeline as make

    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": s.visual or None}
    if not s.sees:
        pipe = make("text-generation", model=s.model, tokenizer=s.tokenizer)
        return Output(pipe("What is it?", return_full_text=False, **options)[0]["generated_text"])
    pipe = make("image-text-to-text", model=s.model, processor=s.processor)
    messages = [{"role": "user", "content": [{"type": "image", "image": s.picture(0)}, {"type": "text", "text": "What is it?"}]}]
    return Output(pipe(text=messages, return_full_text=False, generate_kwargs=options)[0]["generated_text"])


MODES: dict[str, Callable[[Subject], Output]] = {
    "greedy": greedy, "sampling": sampling, "beams": beams, "return sequences": return_sequences, "ragged batch": ragged,
    "several images": several_images, "video": video, "prompt lookup": prompt_lookup, "chunked prefill": chunked_prefill,
    "second question": second_question, "second image": second_image, "streaming": streaming, "pipeline": pipeline,
}  # fmt: skip
