"""Training documents: the bundled generator itself, run in worker processes, packed into arrays ready for the device.

A document carries as many question-answer turns as fit behind its pages, in the exact text of the chat template:

    <|user|> [pages] QUESTION<|assistant|>ANSWER<eos><|user|>QUESTION<|assistant|>ANSWER<eos> ...
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .bundled import bundled, draws

MAX_PAGES = bundled.MAX_PAGES
UNROUTED = -1
ALIKE_ONE_IN = 5  # documents of nothing but fields, which `page` needs, beyond those that come by chance


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids of a family's tokenizer: specials, and the token of a space, behind which printable ASCII follows in order."""

    pad: int
    eos: int
    user: int
    assistant: int
    first_character: int

    def encode(self, text: str) -> list[int]:
        """Tokens of printable ASCII."""
        return [ord(character) - 32 + self.first_character for character in text]


@dataclass(frozen=True, slots=True)
class Batch:
    """B documents of P pages with L text tokens behind them.

    `cells` uint8 [B, P, CELLS, CELLS] what is written where; `tokens` int64 [B, L], padded at the end; `answer` bool [B, L] marks what is
    learned, answers and <eos>; `slot` int64 [B, L] names what a token belongs to, `skill * 2`, or one more behind an answer's first
    character, for question tokens `2 * skills + skill`, UNROUTED for padding.
    """

    cells: Tensor
    tokens: Tensor
    answer: Tensor
    slot: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__slots__))


def pack_document(
    stream: draws.Draws, pages: int, fullness: int, length: int, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One document: (cells, tokens, answer, slot) as in `Batch`."""
    alike = stream.below(ALIKE_ONE_IN) == 0
    kinds = tuple(bundled.WRITERS)
    content = bundled.compose(stream, pages, kinds, "fields" if alike else stream.one_of(kinds), alike, fullness)
    tokens = np.full(length, vocabulary.pad, dtype=np.int64)
    answer = np.zeros(length, dtype=bool)
    slot = np.full(length, UNROUTED, dtype=np.int64)
    place, failures, skills = 0, 0, len(bundled.SKILLS)
    while failures < 2:
        skill = stream.below(skills)
        question = bundled.ASKERS[bundled.SKILLS[skill]](stream, content)
        if question is None:
            continue
        # The first turn's <|user|> stands before the pages.
        asked = [vocabulary.user] * (place > 0) + vocabulary.encode(question.text)
        replied = [*vocabulary.encode(question.answer), vocabulary.eos]
        middle, end = place + len(asked), place + len(asked) + 1 + len(replied)
        if end > length:
            failures += 1
            continue
        tokens[place:end] = [*asked, vocabulary.assistant, *replied]
        answer[middle + 1 : end] = True
        slot[place:middle] = 2 * skills + skill
        # The token before an answer token is the one that reads for it.
        slot[middle:end] = 2 * skill + np.minimum(np.arange(end - middle), 1)
        place = end
    return np.stack(content.pages), tokens, answer, slot


class DocumentStream(IterableDataset[Batch]):
    """Endless batches of one page count each; `name` decides which. The trainer moves the shared `progress` on."""

    def __init__(self, seed: int, pages_per_step: int, length: int, vocabulary: Vocabulary) -> None:
        self.name = f"tiny_training/{seed}"
        self.pages_per_step, self.length, self.vocabulary = pages_per_step, length, vocabulary
        self.progress = torch.zeros(1).share_memory_()  # of the curriculum, 0 to 1

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        name = f"{self.name}/{worker.id if worker else 0}"
        choices, number = random.Random(name), 0
        while True:
            progress = float(self.progress)
            pages = choices.choices(range(1, MAX_PAGES + 1), (1.0, progress, progress))[0]
            fullness = 25 + round(75 * progress)
            rows = []
            for _ in range(max(1, self.pages_per_step // pages)):
                rows.append(pack_document(draws.Draws(f"{name}/{number}"), pages, fullness, self.length, self.vocabulary))
                number += 1
            yield Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def stream_batches(stream: DocumentStream, workers: int) -> Iterator[Batch]:
    """Batches of a stream, made in `workers` processes (0: in this one)."""
    extra = {"prefetch_factor": 4, "persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
    return iter(DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available(), **extra))
