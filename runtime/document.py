"""Compress once, ask many: what a model has read, with all it needs to go on from there.

A cache alone is not enough to go on: `generate` wants the mask of everything that was read, beams want as many rows, and M-RoPE models
(Qwen-VL) keep on themselves how far positions and tokens are apart, where the next prompt overwrites it. A `Document` keeps these
together, and asks every question on a fork of its cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RotateKError, UsageError
from ..placement import input_device
from ..untrusted import shown
from .cache import RotateKCache
from .enable import MEDIA, active, enable, unwrapped
from .rope_deltas import deltas_of, keepers, positions, set_deltas
from .saved import load_cache, save_cache
from .saved_checks import refuse
from .saved_identity import weights_of

MAX_TEXT = 1 << 16  # characters of a prompt's end


@dataclass(frozen=True, slots=True)
class Frame:
    """The text between the last image and a question, and what follows the question."""

    before: str
    after: str


class Document:
    """What a model has read, compressed. Made by `compress`, `Document.read` or `load_document`.

    Attributes:
        cache: never changed by questions; its forks are what they are asked on.
        mask: int64 [B, T], 1 for the real tokens among those that were read.
    """

    def __init__(self, enabled: enable, cache: RotateKCache, mask: Tensor, processor: Any = None, frame: Frame | None = None) -> None:
        self.enabled, self.cache, self.mask, self.processor, self.frame = enabled, cache, mask, processor, frame

    @classmethod
    def read(cls, model: nn.Module, **inputs: Any) -> Document:
        """Let a model read inputs of `generate` (ids, mask, pixels of all images, in one batch or more) and keep them compressed.

        Raises:
            RotateKError: the model is not enabled.
        """
        enabled = enabled_on(model)
        cache = enabled.new_cache()
        if not isinstance(ids := inputs.get("input_ids"), Tensor):
            raise UsageError("a document is read from input_ids; pass the processor's output, as to generate")
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        set_deltas(keepers(enabled.model), None)
        # one token is generated and not read: so positions, masks and chunks are as `generate` makes them
        plain = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
        enabled.model.generate(**inputs | plain | {"attention_mask": mask, "past_key_values": cache, "return_dict_in_generate": False})
        cache.finish()
        cache.rope_deltas = deltas_of(enabled.model)
        cache.weights = weights_of(enabled.model)
        return cls(enabled, cache, mask.to(torch.int64))

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """`model.generate` for text that follows the document: input_ids [B, T], left-padded where rows differ, mask likewise.

        What comes back is what `generate` returns for this call: sequences begin with `input_ids`. The cache of a returned dictionary is a
        fork of the document's, and holds the question and its answer too.

        Raises:
            RotateKError: other rows than the document has, images (they belong into the document), or `enable` is no longer in force.
        """
        if active(self.enabled.model) is not self.enabled:
            raise RotateKError("the artifact is no longer enabled on this model, so its questions cannot be asked; load the document again")
        if given := next(
            (name for name in options if name.startswith(MEDIA) or name.endswith(("grid_thw", "image_sizes", "token_type_ids"))), None
        ):
            raise UsageError(f"a question is text, so {given} cannot be given; read images into the document, all of them at once")
        if self.cache.get_seq_length() != self.mask.shape[1]:
            raise RotateKError(
                f"the document's cache was used outside of it: it holds {self.cache.get_seq_length()} tokens, the document "
                f"{self.mask.shape[1]}; use cache.fork() for that"
            )
        if "past_key_values" in options:
            raise UsageError("a question is asked on a fork of the document's cache; leave past_key_values out")
        own = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = self.mask.shape[0]
        if input_ids.dim() != 2 or input_ids.shape[0] != rows or input_ids.shape[1] == 0 or own.shape != input_ids.shape:
            words = f"input_ids {list(input_ids.shape)} and attention_mask {list(own.shape)}"
            raise UsageError(f"the document has {rows} rows, so a question is of shape [{rows}, T]; got {words}")
        if bool(torch.isin(input_ids.cpu(), torch.tensor(self.enabled.artifact.geometry.visual_token_ids, dtype=torch.int64)).any()):
            raise UsageError("the question holds a token that stands for an image or a video; leave it out")
        cache = self.cache.fork()
        if (sequences := _sequences(self.enabled.model, options)) > 1:
            cache.batch_repeat_interleave(sequences)
        place = input_device(self.enabled.model)
        mask = torch.cat([self.mask.to(place), own.to(place, torch.int64)], 1)
        with positions(self.enabled.model, self.cache.rope_deltas):
            return self.enabled.model.generate(input_ids=input_ids.to(place), attention_mask=mask, past_key_values=cache, **options)

    def ask(self, question: str, max_new_tokens: int = 64, **options: Any) -> str:
        """The answer to a question in words, greedy unless the options of `generate` say otherwise.

        Raises:
            UsageError: the document was not made by `compress`, or was loaded without a processor; a question that is no text.
        """
        if not isinstance(question, str):
            raise UsageError(f"a question is text, this is {type(question).__name__}; ask several questions one after the other")
        if self.frame is None or self.processor is None:
            raise UsageError("ask() needs a document made by compress(), and the processor; use generate() with the question's ids")
        text = self.frame.before + question + self.frame.after
        ids = torch.tensor([text_ids(self.processor, text)])
        options = {"do_sample": False, **options, "return_dict_in_generate": False}
        out = self.generate(ids, max_new_tokens=max_new_tokens, **options)
        answer: str = self.processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return answer.strip()

    def fork(self) -> Document:
        """A copy whose cache may go on independently; what both hold is shared."""
        return Document(self.enabled, self.cache.fork(), self.mask, self.processor, self.frame)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the document to one file; `load_document` reads it.

        Raises:
            RotateKError: see `saved.save_cache`.
        """
        frame = None if self.frame is None else {"before": self.frame.before, "after": self.frame.after}
        # padding is where it is: that positions go on right, only its count matters, but a mask is what is handed on
        padding = [[int(n) for n in torch.nonzero(row == 0).flatten()] for row in self.mask.cpu()]
        return save_cache(self.cache, path, document={"frame": frame, "padding": padding}, overwrite=overwrite)


def load_document(path: str | Path, model: nn.Module, processor: Any = None) -> Document:
    """Read a document that `Document.save` wrote, for a model with the same artifact enabled on it.

    Args:
        processor: what `ask` needs; `generate` does without.

    Raises:
        RotateKError: see `saved.load_cache`.
    """
    enabled = enabled_on(model)
    cache, described = load_cache(path, enabled)
    own, where = described["document"], str(path)
    refuse(
        isinstance(own, dict) and set(own) == {"frame", "padding"},
        where,
        f"document is {shown(own)}; it may be a bare cache, for load_cache",
    )
    if bool(keepers(enabled.model)) != (cache.rope_deltas is not None):
        raise RotateKError(f"{path} does not say how this model's positions go on; compress the document again")
    mask, length = torch.ones(len(described["real"]), described["length"], dtype=torch.int64), described["length"]
    refuse(isinstance(own["padding"], list) and len(own["padding"]) == len(mask), where, f"padding is {shown(own['padding'])}")
    for row, columns in enumerate(own["padding"]):
        good = isinstance(columns, list) and all(type(n) is int and 0 <= n < length for n in columns)
        refuse(good and len(set(columns)) == length - described["real"][row], where, f"padding of row {row} is {shown(columns)}")
        mask[row, columns] = 0
    frame = own["frame"]
    sound = frame is None or (
        isinstance(frame, dict)
        and set(frame) == {"before", "after"}
        and all(isinstance(text, str) and len(text) <= MAX_TEXT for text in frame.values())
    )
    refuse(sound, where, f"frame is {shown(frame)}, expected the text around a question")
    return Document(enabled, cache, mask.to(input_device(enabled.model)), processor, None if frame is None else Frame(**frame))


def enabled_on(model: nn.Module) -> enable:
    """The `enable` in force on a model.

    Raises:
        RotateKError: there is none.
    """
    found = active(unwrapped(model))
    if found is None:
        raise RotateKError("no artifact is enabled on this model; use rotatek_compile.load(), or `with rotatek_compile.enable(...)`")
    return found


def text_ids(processor: Any, text: str) -> list[int]:
    """Ids of a text in the middle of a prompt."""
    found: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _sequences(model: nn.Module, options: dict[str, Any]) -> int:
    """Rows that `generate` makes of each row of its inputs."""
    config: Any = options.get("generation_config") or getattr(model, "generation_config", None)
    counts = [options.get(name, getattr(config, name, 1)) for name in ("num_beams", "num_return_sequences")]
    return max(int(count or 1) for count in counts)
