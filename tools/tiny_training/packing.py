"""Documents to token sequences: several question-answer turns behind the pages, in the exact text of the chat template.

<|user|> [page, 520 tokens] \\n ... What is the KEY?<|assistant|>VALUE<eos><|user|>What is the KEY?<|assistant|>VALUE<eos> ...
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bundled import forms_content as content
from .documents import Documents
from .llava_next import ASSISTANT, EOS, FIRST_CHARACTER, PAD, USER

PREFIX, SUFFIX = content.question_about("\0").split("\0")
TURN = 1 + len(PREFIX) + content.MAX_KEY + len(SUFFIX) + 1 + content.MAX_VALUE + 1  # longest turn in tokens


@dataclass(frozen=True, slots=True)
class Turns:
    """The text behind the pages: int64 `tokens` [B, L], padded at the end; bool `answer` [B, L] marks what is learned, values and <eos>."""

    tokens: Tensor
    answer: Tensor


def pack_turns(documents: Documents, turns: int) -> Turns:
    """Ask about up to `turns` different fields of every document, in random order; L = turns * TURN whatever the lengths."""
    used = documents.used
    batch, device = used.shape[0], used.device
    score = torch.where(used, torch.rand(used.shape, device=device), -1.0)
    score, field = score.topk(turns, dim=-1)
    asked = score >= 0  # a document with fewer fields has fewer turns

    def characters(table: Tensor) -> Tensor:
        return table.gather(1, field[..., None].expand(-1, -1, table.shape[-1])) + FIRST_CHARACTER

    def constant(*tokens: int) -> Tensor:
        return torch.tensor(tokens, device=device).expand(batch, turns, len(tokens))

    def text(string: str) -> Tensor:
        return constant(*(ord(c) - 32 + FIRST_CHARACTER for c in string))

    def present(lengths: Tensor, width: int) -> Tensor:
        return torch.arange(width, device=device) < lengths.gather(1, field)[..., None]

    question = (constant(USER), text(PREFIX), characters(documents.keys), text(SUFFIX), constant(ASSISTANT))
    pieces = (*question, characters(documents.values), constant(EOS))
    tokens = torch.cat(pieces, dim=-1)
    exists = [torch.ones_like(piece, dtype=torch.bool) for piece in pieces]
    exists[0][:, 0] = False  # the first turn's <|user|> stands before the pages
    exists[2] = present(documents.key_lengths, content.MAX_KEY)
    exists[5] = present(documents.value_lengths, content.MAX_VALUE)
    learned = [torch.full_like(piece, number >= len(question), dtype=torch.bool) for number, piece in enumerate(pieces)]
    return _squeeze(tokens, torch.cat(exists, dim=-1) & asked[..., None], torch.cat(learned, dim=-1))


def _squeeze(tokens: Tensor, exists: Tensor, learned: Tensor) -> Turns:
    """Close the gaps: [B, turns, TURN] with holes to [B, turns * TURN] with padding at the end."""
    tokens, exists, learned = tokens.flatten(1), exists.flatten(1), learned.flatten(1)
    length = tokens.shape[1]
    # Tokens that do not exist all land in one column more, which is cut off.
    target = torch.where(exists, exists.cumsum(-1) - 1, length)
    packed = torch.full((tokens.shape[0], length + 1), PAD, device=tokens.device).scatter_(1, target, tokens)
    answer = torch.zeros_like(packed, dtype=torch.bool).scatter_(1, target, learned & exists)
    return Turns(packed[:, :length], answer[:, :length])
