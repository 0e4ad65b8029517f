"""What keeps a cache correct while it goes on: a long text after a page, and a conversation with a second page in it.

    python benchmarks/bench_refresh.py ARTIFACT --output refresh.csv          # ARTIFACT is compiled with --span all
    python benchmarks/bench_refresh.py ARTIFACT --only generated --ways off --output a.csv  # a part of it, in a process of its own
    python benchmarks/bench_refresh.py --print a.csv b.csv --output refresh.csv             # parts put together

Long text: a page is read, then thousands of tokens follow a few at a time, as in decoding, so that what leaves the window is coded in
blocks; the same text goes through a stock cache. KL to it in nats per token, by quarter of the text: without the refresh (fallback factor
0), with it, and with it but never an own basis. The texts are questions of other documents, what the dense model itself goes on to write
after a question (sampled at temperature 1, never ending), and tokens drawn at random, which no calibration has seen.

Conversation: page A, a question and its answer, questions of other documents as text, page B; then the question about A again, and the one
about B. KL per answer token, and the share of answers whose every token the model would still choose.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from long_texts import Reader, generated, joined, question, random_tokens, words_of
from measuring import Rows, add_data_options, add_table_options, ended, opened, record_of, show_table, versions
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from rotatek_compile.api import base_source, load_base
from rotatek_compile.artifact import Artifact, read_artifact
from rotatek_compile.batches import Encoded, end_ids, rope_index
from rotatek_compile.documents import Documents, usable
from rotatek_compile.errors import UsageError
from rotatek_compile.placement import input_device
from rotatek_compile.replan import replanned
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.prepared import PreparedArtifact
from rotatek_compile.statistics import Bootstrap

STEP = 16  # tokens that come at a time: few enough for the backend to append them to the window, as it does single ones
QUARTERS = 4
TEXTS = {"questions": "questions of other documents", "generated": "the model's own words", "random": "random tokens"}
PARTS = (*TEXTS, "conversation")
WAYS: dict[str, dict[str, Any]] = {
    "off": {"fallback_factor": 0.0},
    "on, calibrated bases only": {"prior_tokens": 0},
    "on, own bases too": {"prior_tokens": 256},
}
"""Rows of both tables, as fields of `Method`; where it is on, the bound is the artifact's."""


def divergence(dense: Tensor, got: Tensor) -> Tensor:
    """KL(dense || got) per position, fp64 [T], of log-probabilities [T, V]."""
    return (dense.exp() * (dense - got)).sum(-1).clamp_min(0)


def long_text(model: Any, page: Encoded, text: list[int], cache: Cache) -> tuple[Tensor, Any]:
    """Log-probabilities over a text that follows a page, fp64 on the CPU [T, V]."""
    reader = Reader(model, joined([page, text]), cache)
    reader.read(page.visual_end, page)
    return torch.cat([reader.read(min(STEP, len(text) - at)).cpu() for at in range(0, len(text), STEP)]), reader.cache


def conversation(model: Any, a: Encoded, b: Encoded, between: list[int], cache: Cache) -> list[Tensor]:
    """Log-probabilities over the answers about A, about A again once B was read, and about B."""
    asked = [*question(a), *a.answer]
    whole = joined([a, asked, between, b, asked])
    reader = Reader(model, whole, cache)
    reader.read(a.visual_end, a)

    def answered(at: Reader, item: Encoded) -> Tensor:
        return at.read(len(question(item)) + len(item.answer))[-len(item.answer) - 1 : -1].cpu()

    found = [answered(reader, a)]
    for at in range(0, len(between), STEP):
        reader.read(min(STEP, len(between) - at))
    reader.read(b.visual_end, b)
    about_b = reader.copy()
    about_b.whole = joined([a, asked, between, b, [*question(b), *b.answer]])
    return [*found, answered(reader, a), answered(about_b, b)]


def refreshes(cache: Any) -> int:
    """How often rows left the coordinates that their blocks were written in, over all layers."""
    return sum(layer.blocks.opened for layer in cache.layers if getattr(layer, "blocks", None) is not None)


def measure(args: argparse.Namespace) -> Rows:
    """All rows, or those of `--only`."""
    artifact = read_artifact(args.artifact)
    if artifact.method.span != "all" or artifact.method.rival:
        raise UsageError(f"{args.artifact} does not code text; pass an artifact compiled with --span all")
    if args.kv_budget:
        artifact = replanned(artifact, kv_budget=args.kv_budget)
    data = opened(args.data, args.seed)
    places = list(usable(data, args.samples + 1))
    model, processor = load_base(artifact, model=args.model, dtype=args.dtype, device=args.device)
    eos, config = end_ids(model), model.config.get_text_config(decoder=True)
    items = list(Documents(data, places, processor, artifact.geometry, eos[0], rope_index(model)))
    single = [item for item in items if len(item.sample.images) == 1]
    if len(single) < 2:
        raise UsageError("the conversation takes two documents of one page each; pass a larger --samples")
    record = record_of(base_source(artifact, args.model), args.data, input_device(model), model.dtype)
    record |= {"tokens": args.tokens, "kv_budget": artifact.method.kv_budget or ""}
    avoid, wanted = (*artifact.geometry.visual_token_ids, *eos), args.only or PARTS
    makers = {
        "questions": lambda: words_of(items, args.tokens),
        "generated": lambda: generated(model, single[0], args.tokens, DynamicCache(config=config), avoid, args.seed),
        "random": lambda: random_tokens(args.tokens, config.vocab_size, avoid, args.seed),
    }
    rows = []
    with enable(model, artifact, backend=args.backend) as active:
        group = max(artifact.geometry.layers[i].group for i in artifact.geometry.compressible)
        if active.backend.most_queries(group) < STEP:
            raise UsageError(
                f"groups of {group} query heads take fewer than {STEP} tokens at a time; this model is not one for this script"
            )
        if not artifact.method.fallback_factor:
            raise UsageError(f"{args.artifact} never refreshes (fallback factor 0); pass one as the compiler makes it")
        choices = [
            (words, replace(artifact, method=replace(artifact.method, **method)))
            for words, method in WAYS.items()
            if words in (args.ways or WAYS)
        ]

        def fresh(cut: Artifact) -> RotateKCache:
            return RotateKCache(model.config, PreparedArtifact(cut), active.backend)

        for part in [part for part in makers if part in wanted]:
            name, text = TEXTS[part], makers[part]()
            dense = long_text(model, single[0], text, DynamicCache(config=config))[0]
            for words, cut in choices:
                got, cache = long_text(model, single[0], text, fresh(cut))
                parts = [part.mean().item() for part in divergence(dense, got).chunk(QUARTERS)]
                sizes = cache_bytes(cache, single[0].visual_end + len(text))
                numbers = {f"kl_{n + 1}": value for n, value in enumerate(parts)}
                agree = (dense.argmax(-1) == got.argmax(-1)).double().mean().item()
                about = {"kind": "long text", "what": name, "refresh": words, "cases": 1, "agreement": agree, "opened": refreshes(cache)}
                rows.append(about | numbers | {"span": sizes.span / sizes.span_dense, "fallback_heads": cache.stats()["fallback_heads"]})
                print(rows[-1], file=sys.stderr, flush=True)
        if "conversation" in wanted:
            rows += _conversations(model, single, words_of(items, args.between), choices, fresh, config)
    return [row | record for row in rows]


def _conversations(
    model: Any, items: Sequence[Encoded], between: list[int], choices: Sequence[tuple[str, Artifact]], fresh: Any, config: Any
) -> list[dict[str, Any]]:
    pairs = list(zip(items[::2], items[1::2], strict=False))
    exact = [conversation(model, a, b, between, DynamicCache(config=config)) for a, b in pairs]
    turns = ("A, first", "A again after B", "B")
    rows = []
    for way, cut in choices:
        found, fallback, spans = [], 0, []
        for a, b in pairs:
            cache = fresh(cut)
            found.append(conversation(model, a, b, between, cache))
            sizes = cache_bytes(cache, cache.get_seq_length())
            spans.append((sizes.span, sizes.span_dense))
            fallback += cache.stats()["fallback_heads"]
        for turn, words in enumerate(turns):
            answers = [(a, a, b)[turn].answer for a, b in pairs]
            costs = [float(divergence(d[turn], g[turn]).sum()) for d, g in zip(exact, found, strict=True)]
            tokens = [len(answer) for answer in answers]
            low, high = Bootstrap(len(pairs)).interval(costs, tokens)
            same = [bool((d[turn].argmax(-1) == g[turn].argmax(-1)).all()) for d, g in zip(exact, found, strict=True)]
            right = [d[turn].argmax(-1).tolist() == answer for d, answer in zip(exact, answers, strict=True)]
            rows.append({
                "kind": "conversation", "what": words, "refresh": way, "cases": len(pairs), "kl_1": sum(costs) / sum(tokens),
                "kl_low": low, "kl_high": high, "agreement": sum(same) / len(same), "dense_right": sum(right) / len(right),
                "span": sum(s for s, _ in spans) / sum(d for _, d in spans), "fallback_heads": fallback,
            })  # fmt: skip
    return rows


FIELDS = (
    "kind", "what", "refresh", "cases", "kl_1", "kl_2", "kl_3", "kl_4", "kl_low", "kl_high", "agreement", "dense_right", "span", "opened",
    "fallback_heads", "model", "data", "tokens", "kv_budget", "device", "dtype", "torch", "transformers",
)  # fmt: skip
LONG = ("refresh", "KL per token, 1st quarter", "2nd", "3rd", "4th", "same token chosen", "coded span", "refreshes", "heads that fell back")
TALK = ("asked about", "conversations", "refresh", "KL per answer token", "same answer as dense", "dense is right", "coded span")
NOT_SHOWN = (
    "Not shown: other texts than these, after other pages than one; the bundled models were never trained on texts this long or on "
    "conversations, so KL to dense tells how closely the cache is followed, not how good the text is."
)


def markdown(rows: Rows) -> str:
    """Both tables of one model."""
    first = rows[0]
    budget = f"KV budget {float(first['kv_budget']):.4g}" if first["kv_budget"] else "the artifact's keep ratio"
    lines = [f"{first['model']}, {budget}, span all, {versions(first)}", ""]
    columns = (f"{first['tokens']} tokens of text", *LONG)
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        if row["kind"] == "long text":
            cells = [row["what"], row["refresh"], *(f"{float(row[f'kl_{n + 1}']):.1e}" for n in range(QUARTERS))]
            cells += [f"{float(row['agreement']):.3f}", f"{float(row['span']):.4f}", str(row["opened"]), str(row["fallback_heads"])]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| {' | '.join(TALK)} |", "|" + "---|" * len(TALK)]
    for row in rows:
        if row["kind"] == "conversation":
            spread = f"{float(row['kl_1']):.1e} [{float(row['kl_low']):.1e}, {float(row['kl_high']):.1e}]"
            cells = [row["what"], str(row["cases"]), row["refresh"], spread, f"{float(row['agreement']):.3f}"]
            lines.append(f"| {' | '.join([*cells, format(float(row['dense_right']), '.3f'), format(float(row['span']), '.4f')])} |")
    lines += ["", NOT_SHOWN]
    return "\n".join(lines)


def main() -> int:
    """Measure and save, or only print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?")
    add_table_options(parser, several=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="by default all of them")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), help="of refreshing; by default all of them")
    parser.add_argument("--tokens", type=int, default=4000, help="length of a text")
    parser.add_argument("--between", type=int, default=256, help="tokens of text between the two pages of a conversation")
    parser.add_argument("--samples", type=int, default=60, help="documents that conversations and text are made of")
    parser.add_argument("--kv-budget", type=float, help="planned for this budget instead of the artifact's")
    add_data_options(parser)
    args = parser.parse_args()
    if (args.artifact is None) == (args.table is None):
        parser.error("pass an ARTIFACT to measure, or --print FILE")
    return ended(lambda: int(not show_table(args, measure, markdown, FIELDS)))


if __name__ == "__main__":
    sys.exit(main())
