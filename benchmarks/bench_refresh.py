"""What keeps a cache correct while it goes on: long texts after pages, and conversations with a second page in them.

    python benchmarks/bench_refresh.py ARTIFACT --output DIR                         # ARTIFACT is compiled with --span all
    python benchmarks/bench_refresh.py ARTIFACT --output DIR --part conversation --shard 2/8          # one process of eight
    python benchmarks/bench_refresh.py --merge DIR/*.jsonl --output refresh.csv      # all parts and processes together
    python benchmarks/bench_refresh.py --print refresh.csv

Long text: a page is read, then thousands of tokens follow a few at a time, as in decoding, so that what leaves the window is coded in
blocks; the same text goes through a stock cache. KL to it in nats per token, by quarter of the text: without the refresh (fallback factor
0), with it, and with it but never an own basis. The texts are questions of other documents, what the dense model itself goes on to write
after a question (sampled at temperature 1, never ending), and tokens drawn at random, which no calibration has seen; each page has a
text of its own.

Conversation: page A, a question and its answer, questions of other documents as text, page B; then the question about A again, and the one
about B. KL per answer token, and the share of answers whose every token the model would still choose.

Several pages, or conversations, are read as one batch, and processes share the batches; what was found of each is in .jsonl files.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from long_texts import Reader, generated, joined, question, random_tokens, words_of
from measuring import add_data_options, ended, opened, read_csv, record_of, write_csv
from refresh_tables import FIELDS, QUARTERS, TALK, TEXTS, markdown, rows_of
from shards import Shard, Values, by_run, read_values
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from rotatek_compile.api import base_source, load_base
from rotatek_compile.artifact import read_artifact
from rotatek_compile.batches import Encoded, end_ids, rope_index
from rotatek_compile.documents import Documents, usable
from rotatek_compile.errors import UsageError
from rotatek_compile.placement import input_device
from rotatek_compile.replan import replanned
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.prepared import PreparedArtifact

STEP = 16  # tokens that come at a time: few enough for the backend to append them to the window, as it does single ones
PARTS = (*TEXTS, "conversation")
WAYS: dict[str, dict[str, Any]] = {
    "off": {"fallback_factor": 0.0},
    "on, calibrated bases only": {"prior_tokens": 0},
    "on, own bases too": {"prior_tokens": 256},
}
"""Rows of both tables, as fields of `Method`; where it is on, the bound is the artifact's."""

Found = dict[str, dict[str, Any]]
"""What was found of a batch, by way of refreshing and subject; see `refresh_tables.rows_of`."""


def divergence(dense: Tensor, got: Tensor) -> Tensor:
    """KL(dense || got) per position, fp64 [T], of log-probabilities [T, V]."""
    return (dense.exp() * (dense - got)).sum(-1).clamp_min(0)


def long_texts(model: Any, pages: Sequence[Encoded], texts: Sequence[list[int]], caches: dict[str, Cache]) -> Found:
    """Texts of one length that follow pages, read through all caches side by side, the stock one first."""
    wholes = [joined([page, text]) for page, text in zip(pages, texts, strict=True)]
    readers = {way: Reader(model, wholes, cache) for way, cache in caches.items()}
    for reader in readers.values():
        reader.read([page.visual_end for page in pages], pages, last=1)
    stock, *ours = readers
    length = len(texts[0])
    kl = {way: torch.zeros(len(pages), length, dtype=torch.float64) for way in ours}
    agree = {way: [0] * len(pages) for way in ours}
    for at in range(0, length, STEP):
        exact = readers[stock].read(min(STEP, length - at))
        for way in ours:
            for row, (dense, got) in enumerate(zip(exact, readers[way].read(min(STEP, length - at)), strict=True)):
                kl[way][row, at : at + STEP] = divergence(dense, got)
                agree[way][row] += int((dense.argmax(-1) == got.argmax(-1)).sum())
    found = {}
    for way in ours:
        quarters = kl[way].chunk(QUARTERS, dim=1)
        numbers = {"kl": torch.stack([part.sum(1) for part in quarters], 1).tolist(), "agree": agree[way]}
        found[way] = {"": numbers | {"tokens": [part.shape[1] for part in quarters]} | _of_cache(caches[way])}
    return found


def conversations(model: Any, pairs: Sequence[tuple[Encoded, Encoded]], between: list[int], caches: dict[str, Cache]) -> Found:
    """Answers about A, about A again once B was read, and about B, through all caches, the stock one first."""
    answers = {way: _asked(model, pairs, between, cache) for way, cache in caches.items()}
    stock, *ours = answers
    found: Found = {}
    for way in ours:
        found[way] = {}
        for turn, words in enumerate(TALK):
            both = list(zip(answers[stock][turn], answers[way][turn], strict=True))
            items = [(a, a, b)[turn] for a, b in pairs]
            found[way][words] = {
                "kl": [[float(divergence(dense, got).sum())] for dense, got in both],
                "tokens": [len(item.answer) for item in items],
                "agree": [int((dense.argmax(-1) == got.argmax(-1)).all()) for dense, got in both],
                "right": [int(dense.argmax(-1).tolist() == item.answer) for (dense, _), item in zip(both, items, strict=True)],
            } | _of_cache(caches[way])
    return found


def _asked(model: Any, pairs: Sequence[tuple[Encoded, Encoded]], between: list[int], cache: Cache) -> list[list[Tensor]]:
    """Log-probabilities over the answers, by turn and pair."""
    first, second = ([pair[n] for pair in pairs] for n in (0, 1))
    asked = [[*question(a), *a.answer] for a in first]
    middle = [[a, own, between, b] for (a, b), own in zip(pairs, asked, strict=True)]
    reader = Reader(model, [joined([*parts, own]) for parts, own in zip(middle, asked, strict=True)], cache)
    reader.read([a.visual_end for a in first], first, last=1)

    def answered(at: Reader, items: Sequence[Encoded]) -> list[Tensor]:
        seen = at.read([len(question(item)) + len(item.answer) for item in items])
        return [own[-len(item.answer) - 1 : -1].cpu() for own, item in zip(seen, items, strict=True)]

    found = [answered(reader, first)]
    for at in range(0, len(between), STEP):
        reader.read(min(STEP, len(between) - at), last=1)
    reader.read([b.visual_end for b in second], second, last=1)
    about_b = reader.copy()
    about_b.wholes = [joined([*parts, [*question(b), *b.answer]]) for parts, b in zip(middle, second, strict=True)]
    return [*found, answered(reader, first), answered(about_b, second)]


def _of_cache(cache: Any) -> dict[str, Any]:
    """Bytes of the coded span, how often rows left the coordinates that their blocks were written in, and heads that fell back."""
    sizes = cache_bytes(cache, cache.get_seq_length())
    said = cache.stats()
    return {"span": sizes.span, "span_dense": sizes.span_dense, "opened": said["refreshes"], "fallback_heads": said["fallback_heads"]}


def measure(args: argparse.Namespace) -> list[Values]:
    """This process's batches of every part that is asked for."""
    artifact = read_artifact(args.artifact)
    if artifact.method.span != "all" or artifact.method.rival:
        raise UsageError(f"{args.artifact} does not code text; pass an artifact compiled with --span all")
    if not artifact.method.fallback_factor:
        raise UsageError(f"{args.artifact} never refreshes (fallback factor 0); pass one as the compiler makes it")
    if args.kv_budget:
        artifact = replanned(artifact, kv_budget=args.kv_budget)
    data = opened(args.data, args.seed)
    places = [place for place in usable(data, args.samples + 1) if len(data.sample(place).images) == 1]
    if len(places) < 2:
        raise UsageError("the conversation takes two documents of one page each; pass a larger --samples")
    model, processor = load_base(artifact, model=args.model, dtype=args.dtype, device=args.device)
    eos, config = end_ids(model), model.config.get_text_config(decoder=True)
    single = Documents(data, places, processor, artifact.geometry, eos[0], rope_index(model))  # encoded when they are read
    record = record_of(base_source(artifact, args.model), args.data, input_device(model), model.dtype)
    record |= {"tokens": args.tokens, "kv_budget": artifact.method.kv_budget or ""}
    avoid = (*artifact.geometry.visual_token_ids, *eos)

    @functools.cache
    def asked() -> list[list[int]]:
        """Question and answer of every document."""
        return [[*question(item), *item.answer[:-1]] for item in single]

    def texts_of(part: str, numbers: range) -> list[list[int]]:
        """A text for each of these pages."""
        if part == "questions":
            return [words_of(asked(), args.tokens, n + 1) for n in numbers]
        if part == "random":
            return [random_tokens(args.tokens, config.vocab_size, avoid, (args.seed, n)) for n in numbers]
        pages = [single[n] for n in numbers]
        return generated(model, pages, args.tokens, DynamicCache(config=config), avoid, [(args.seed, n) for n in numbers])

    with enable(model, artifact, backend=args.backend) as active:
        group = max(artifact.geometry.layers[i].group for i in artifact.geometry.compressible)
        if active.backend.most_queries(group) < STEP:
            raise UsageError(
                f"groups of {group} query heads take fewer than {STEP} tokens at a time; this model is not one for this script"
            )
        cut = {way: replace(artifact, method=replace(artifact.method, **WAYS[way])) for way in args.ways or WAYS}

        def caches() -> dict[str, Cache]:
            ours = {way: RotateKCache(model.config, PreparedArtifact(one), active.backend) for way, one in cut.items()}
            return {"": DynamicCache(config=config), **ours}

        def read(part: str, numbers: range) -> Found:
            if part == "conversation":
                pairs = [(single[2 * n], single[2 * n + 1]) for n in numbers]
                return conversations(model, pairs, words_of(asked(), args.between), caches())
            return long_texts(model, [single[n] for n in numbers], texts_of(part, numbers), caches())

        return [_part(part, read, len(single) // 2 if part == "conversation" else len(single), record, args) for part in args.part]


def _part(part: str, read: Callable[[str, range], Found], cases: int, record: dict[str, Any], args: argparse.Namespace) -> Values:
    """This process's batches of one part, written as they are done."""
    shard = Shard.parse(args.shard)
    header = {"part": part, "record": record, "cases": cases, "between": args.between, "seed": args.seed}
    values = Values.begin(header, shard.file(args.output, f"refresh-{part}"))
    for number, some in shard.batches(cases, args.batch_size):
        values.add(number, {}, read(part, range(some.start, some.stop)))
        print(f"{part} {args.shard}: {some.stop} of {cases}", file=sys.stderr, flush=True)
    return values


def run(args: argparse.Namespace) -> int:
    """Measure, put together, or only print."""
    if args.table:
        print(markdown(read_csv(args.table)))
        return 0
    found = [read_values(own) for own in by_run(args.merge)] if args.merge else measure(args)
    if args.merge or Shard.parse(args.shard).count == 1:
        found.sort(key=lambda values: PARTS.index(values.header["part"]))
        rows = [row for values in found if values.notes for row in rows_of(values.header, values.notes)]
        write_csv(args.output if args.merge else args.output / "refresh.csv", rows, FIELDS)
        print(markdown([{name: str(row.get(name, "")) for name in FIELDS} for row in rows]))
    return 0


def main() -> int:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--output", type=Path, help="folder for what is found of each batch and refresh.csv; with --merge the CSV")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="only put these .jsonl files together")
    parser.add_argument("--print", type=Path, dest="table", metavar="FILE", help="only print the tables of this CSV")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="by default all of them")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), help="of refreshing; by default all of them")
    parser.add_argument("--tokens", type=int, default=4000, help="length of a text")
    parser.add_argument("--between", type=int, default=256, help="tokens of text between the two pages of a conversation")
    parser.add_argument("--samples", type=int, default=60, help="documents; those of one page are read, two in a conversation")
    parser.add_argument("--batch-size", type=int, default=8, help="pages or conversations that are read at once")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="measure each N-th batch, from the I-th")
    parser.add_argument("--kv-budget", type=float, help="planned for this budget instead of the artifact's")
    add_data_options(parser)
    args = parser.parse_args()
    if sum(one is not None for one in (args.artifact, args.merge, args.table)) != 1:
        parser.error("pass an ARTIFACT to measure, --merge FILES or --print FILE")
    if args.table is None and args.output is None:
        parser.error("pass --output")
    return ended(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
