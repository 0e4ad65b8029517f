"""Packed documents: exactly the text of the chat template, with every token's purpose."""

import pytest
import torch

from tiny_training import llava_next, qwen3_vl
from tiny_training.bundled import bundled
from tiny_training.documents import UNROUTED, DocumentStream, stream_batches

SKILLS = bundled.SKILLS


def skill_of(question):
    """Skills that may ask in these words."""
    starts = {"Larger of": {"larger"}, "Page of": {"page"}, "How many": {"count"}, "Copy the line": {"line"}, "Copy line": {"ordinal"},
              "How much": {"chart"}, "What is the": {"field", "missing"}, "What is": {"cell"}}  # fmt: skip
    return next(skills for start, skills in starts.items() if question.startswith(start))


@pytest.mark.parametrize("family", [llava_next, qwen3_vl])
@pytest.mark.parametrize("pages", [1, 2, 3])
def test_turns_are_the_chat_template(pack, family, pages):
    processor = family.build_processor()
    batch = pack(family.TOKENS, 6, pages, length=200, name=f"template/{pages}")
    page = family.CHAT_TEMPLATE.split("{{- '")[2].split("'")[0].replace("\\n", "\n")
    for tokens, answer, slot in zip(batch.tokens, batch.answer, batch.slot, strict=True):
        length = int((tokens != family.PAD).sum())
        assert (tokens[length:] == family.PAD).all() and (slot[length:] == UNROUTED).all() and not answer[length:].any()
        text = processor.tokenizer.decode(tokens[:length])
        messages, pairs = [], text.split("<eos>")[:-1]
        assert len(pairs) > 2 and text.endswith("<eos>")
        for pair in pairs:
            question, value = pair.removeprefix("<|user|>").split("<|assistant|>")
            messages += [{"role": "user", "content": [{"type": "text", "text": question}]}, {"role": "assistant", "content": value}]
        messages[0]["content"] = [*[{"type": "image"}] * pages, *messages[0]["content"]]
        assert processor.apply_chat_template(messages) == "<|user|>" + page * pages + text
        learned = processor.tokenizer.decode(tokens[answer])
        assert learned == "".join(message["content"] + "<eos>" for message in messages if message["role"] == "assistant")


def test_slots_name_the_skill_and_who_reads_the_first_character(pack):
    batch = pack(llava_next.TOKENS, 40, 2, length=200, name="slots")
    tokenizer, seen = llava_next.build_tokenizer(), set()
    for tokens, answer, slot in zip(batch.tokens, batch.answer, batch.slot, strict=True):
        starts = [0, *((tokens == llava_next.EOS).nonzero().flatten() + 1).tolist()]
        for start, end in zip(starts, starts[1:], strict=False):
            middle = start + int((tokens[start:end] == llava_next.ASSISTANT).nonzero())
            question = tokenizer.decode(tokens[start:middle]).removeprefix("<|user|>")
            skill = int(slot[middle]) // 2
            assert SKILLS[skill] in skill_of(question)
            assert (slot[start:middle] == 2 * len(SKILLS) + skill).all()
            # <|assistant|> reads for the first character, every character for the one behind it
            assert int(slot[middle]) == 2 * skill and (slot[middle + 1 : end] == 2 * skill + 1).all()
            assert answer[start:end].tolist() == [False] * (middle + 1 - start) + [True] * (end - middle - 1)
            seen.add(SKILLS[skill])
    assert seen == set(SKILLS)


def test_answers_come_from_the_cells(pack):
    batch = pack(llava_next.TOKENS, 6, 3, length=300, name="cells")
    tokenizer, compared = llava_next.build_tokenizer(), 0
    for cells, tokens in zip(batch.cells, batch.tokens, strict=True):
        rows = ["".join(chr(32 + code) for code in row).strip() for row in cells.flatten(0, 1).tolist()]
        for pair in tokenizer.decode(tokens[tokens != llava_next.PAD]).split("<eos>")[:-1]:
            question, value = pair.removeprefix("<|user|>").split("<|assistant|>")
            if question.startswith("What is the ") and value != "none":
                assert f"{question[12:-1]}: {value}" in rows
                compared += 1
            if question.startswith("Copy"):
                assert value in rows
                compared += 1
    assert compared > 10


@pytest.mark.parametrize("workers", [0, 1])
def test_the_stream_follows_the_curriculum(workers):
    stream = DocumentStream(0, 6, 64, llava_next.TOKENS)
    batches = [batch for batch, _ in zip(stream_batches(stream, workers), range(4), strict=False)]
    assert {batch.cells.shape[1] for batch in batches} == {1}  # only single pages at the beginning, nearly empty ones
    assert max(int((batch.cells > 0).any(-1).sum(-1).max()) for batch in batches) <= 5
    again = next(stream_batches(DocumentStream(0, 6, 64, llava_next.TOKENS), workers))
    assert torch.equal(again.cells, batches[0].cells)
    assert not torch.equal(next(stream_batches(DocumentStream(1, 6, 64, llava_next.TOKENS), workers)).cells, again.cells)
    stream = DocumentStream(0, 6, 64, llava_next.TOKENS)
    stream.progress.fill_(1.0)
    batches = [batch for batch, _ in zip(stream_batches(stream, 0), range(16), strict=False)]
    assert {(batch.cells.shape[0], batch.cells.shape[1]) for batch in batches} == {(6, 1), (3, 2), (2, 3)}
    assert max(int((batch.cells > 0).any(-1).sum(-1).max()) for batch in batches) >= 14
    assert all(batch.tokens.shape == batch.answer.shape == batch.slot.shape == (len(batch.cells), 64) for batch in batches)
