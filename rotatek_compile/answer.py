"""Answer one prompt with `model.generate`, timed and with the cache's bytes."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from .batches import prompt_text, tokenized
from .errors import RotateKError
from .placement import input_device
from .runtime.accounting import CacheBytes
from .runtime.rap_load import bytes_of
from .video import Clip


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer; prefill ends with the first token."""

    text: str
    new_tokens: int
    bytes: CacheBytes
    seconds_prefill: float
    seconds_decode: float

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "new_tokens": self.new_tokens,
            "kv_bytes": self.bytes.total,
            "kv_bytes_dense": self.bytes.dense,
            "seconds_prefill": self.seconds_prefill,
            "seconds_decode": self.seconds_decode,
            "bytes": asdict(self.bytes),
        }


class _Clock(TextStreamer):
    """Notes when the first token arrives, and prints text as it comes if asked to."""

    def __init__(self, tokenizer: Any, show: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.first, self.puts = show, 0.0, 0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:  # the first call is the prompt
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.show:
            super().on_finalized_text(text, stream_end)


def answer_once(
    model: Any,
    processor: Any,
    images: list[Image.Image],
    prompt: str,
    max_new_tokens: int,
    stream: bool,
    clip: Clip | None = None,
) -> Answer:
    """Greedy answer through plain `generate`, with whatever cache the model is set to use.

    Raises:
        RotateKError: a clip for a model that takes none, or whose processor needs a package for it that is not installed.
    """
    inputs = model_inputs(processor, images, prompt, clip).to(input_device(model))
    for name, tensor in inputs.items():
        if tensor.is_floating_point():
            inputs[name] = tensor.to(model.dtype)
    clock = _Clock(processor.tokenizer, stream)
    start = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock, return_dict_in_generate=True)
    end = time.perf_counter()
    ids = out.sequences[0, inputs["input_ids"].shape[1] :]
    cached = inputs["input_ids"].shape[1] + len(ids) - 1  # the last token is never fed back
    return Answer(
        text=processor.tokenizer.decode(ids, skip_special_tokens=True).strip(),
        new_tokens=len(ids),
        bytes=bytes_of(model, out.past_key_values, cached),
        seconds_prefill=clock.first - start,
        seconds_decode=end - clock.first,
    )


def model_inputs(processor: Any, images: list[Image.Image], prompt: str, clip: Clip | None = None) -> Any:
    """The processor's tensors for one question about images, and a clip after them.

    Raises:
        RotateKError: as `answer_once`.
    """
    if clip is None:
        return tokenized(processor, prompt_text(processor, len(images), prompt), images)
    if not takes_videos(processor):
        name = type(processor).__name__
        raise RotateKError(f"{name} takes no videos; pass frames as images instead (--image, once for each)")
    try:
        return tokenized(processor, prompt_text(processor, len(images), prompt, videos=1), images, **clip.arguments())
    except ImportError as error:
        raise RotateKError(f"this model's videos need a package that is not installed: {str(error).strip().splitlines()[0]}") from error


def takes_videos(processor: Any) -> bool:
    """Whether a processor has a part for videos, also where that part could not be loaded for want of torchvision."""
    return getattr(processor, "video_processor", None) is not None


def comparison(result: Answer, dense: Answer | None) -> str:
    """Bytes and times in words; both answers side by side when there are two.

    A budget is a promise for what is coded; the newest text and text between pages lie raw beside it.
    """
    sizes = result.bytes
    share = f"{sizes.span / sizes.span_dense:.3f}" if sizes.span_dense else ""
    if dense is None:
        coded = f", of which {sizes.span:,} code {sizes.span_dense:,} ({share})" if share else ""
        return (
            f"[{sizes.total:,} bytes of KV cache, dense {sizes.dense:,}{coded}; "
            f"prefill {result.seconds_prefill:.2f} s, decode {result.seconds_decode:.2f} s]"
        )
    rows = [("", "compressed", "dense"), ("answer", result.text, dense.text)]
    rows.append(("KV bytes", f"{sizes.total:,}", f"{dense.bytes.total:,}"))
    if share:
        rows.append(("of these coded", f"{sizes.span:,} ({share})", f"{sizes.span_dense:,}"))
    rows.append(("allocated", f"{sizes.stored:,}", f"{dense.bytes.stored:,}"))
    rows.append(("prefill s", f"{result.seconds_prefill:.2f}", f"{dense.seconds_prefill:.2f}"))
    rows.append(("decode s", f"{result.seconds_decode:.2f}", f"{dense.seconds_decode:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
