"""What keeps a cache correct while it goes on: a long text after a page, and a conversation with a second page in it.

    python benchmarks/bench_refresh.py ARTIFACT --output refresh.csv          # ARTIFACT is compiled with --span all
    python benchmarks/bench_refresh.py --print refresh.csv

Long text: a page is read, then thousands of tokens follow a few at a time, as in decoding, so that what leaves the window is coded in
blocks; the same text goes through a stock cache. KL to it in nats per token, by quarter of the text: without the refresh (fallback factor
0), with it, and with it but never an own basis. The texts are questions of other documents, and tokens drawn at random, which no
calibration has seen.

Conversation: page A, a question and its answer, questions of other documents as text, page B; then the question about A again, and the one
about B. KL per answer token, and the share of answers whose every token the model would still choose.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from rotatek_compile.api import base_source, load_base
from rotatek_compile.artifact import Artifact, read_artifact
from rotatek_compile.batches import Encoded, end_ids, merge_media, positions, rope_index
from rotatek_compile.calibration_data.errors import DataError
from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.documents import Documents, usable
from rotatek_compile.errors import RotateKError, UsageError
from rotatek_compile.placement import input_device
from rotatek_compile.replan import replanned
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.prepared import PreparedArtifact
from rotatek_compile.statistics import Bootstrap

STEP = 16  # tokens that come at a time: few enough for the backend to append them to the window, as it does single ones
QUARTERS = 4
WAYS: dict[str, dict[str, Any]] = {
    "off": {"fallback_factor": 0.0},
    "on": {"fallback_factor": 8.0},
    "on, calibrated bases only": {"fallback_factor": 8.0, "prior_tokens": 0},
}
"""Rows of both tables, as fields of `Method`; the factor is the one artifacts are compiled with."""


class Reader:
    """Reads one token sequence piece by piece into a cache."""

    def __init__(self, model: Any, whole: Encoded, cache: Cache) -> None:
        self.model, self.whole, self.cache, self.seen = model, whole, cache, 0
        self.device = input_device(model)

    def copy(self) -> Reader:
        """The same place with a cache of its own."""
        other = Reader(self.model, self.whole, copy.deepcopy(self.cache))
        other.seen = self.seen
        return other

    @torch.inference_mode()
    def read(self, count: int, page: Encoded | None = None) -> Tensor:
        """The next `count` tokens, which hold all of a page if one is given; fp64 log-probabilities [count, V] of what follows each."""
        first, self.seen = self.seen, self.seen + count
        ids = torch.tensor([self.whole.prompt[first : self.seen]], device=self.device)
        places = positions([self.whole], [first], torch.ones(1, count, dtype=torch.int64)).to(self.device)
        media = merge_media([page], self.device, self.model.dtype) if page is not None else {}
        mask = torch.ones(1, self.seen, dtype=torch.int64, device=self.device)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=self.cache, use_cache=True, **media)
        logprobs: Tensor = out.logits[0].double().log_softmax(-1)
        return logprobs


def divergence(dense: Tensor, got: Tensor) -> Tensor:
    """KL(dense || got) per position, fp64 [T], of log-probabilities [T, V]."""
    return (dense.exp() * (dense - got)).sum(-1).clamp_min(0)


def joined(parts: Sequence[Encoded | list[int]]) -> Encoded:
    """Prompts up to the end of their pages, and text, as one sequence; positions go on where the part before ended."""
    ids: list[int] = []
    places: list[Tensor] = []
    axes = next((p.positions.shape[0] for p in parts if isinstance(p, Encoded) and p.positions is not None), 0)
    for part in parts:
        own = part.prompt[: part.visual_end] if isinstance(part, Encoded) else part
        ids = ids + list(own)
        if axes:
            start = int(places[-1].max()) + 1 if places else 0
            found = torch.arange(len(own)).expand(axes, -1)
            if isinstance(part, Encoded) and part.positions is not None:
                found = part.positions[:, : part.visual_end]
            places.append(found + start)
    first = next(part for part in parts if isinstance(part, Encoded))
    return replace(first, prompt=ids, visual_end=len(ids), positions=torch.cat(places, 1) if axes else None)


def question(item: Encoded) -> list[int]:
    """What follows the page in a prompt."""
    return item.prompt[item.visual_end :]


def texts(items: Sequence[Encoded], tokens: int, vocabulary: int, avoid: Iterable[int], seed: int) -> dict[str, list[int]]:
    """Questions and answers of documents one after the other, and as many random tokens."""
    words = [token for item in items for token in (*question(item), *item.answer[:-1])]
    allowed = np.setdiff1d(np.arange(vocabulary), list(avoid))
    random = np.random.default_rng(seed).choice(allowed, tokens).tolist()
    return {"questions of other documents": (words * (tokens // len(words) + 1))[:tokens], "random tokens": random}


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


def opened(cache: Any) -> int:
    """How often rows left the coordinates that their blocks were written in, over all layers."""
    return sum(layer.blocks.opened for layer in cache.layers if getattr(layer, "blocks", None) is not None)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows."""
    artifact = read_artifact(args.artifact)
    if artifact.method.span != "all" or artifact.method.rival:
        raise UsageError(f"{args.artifact} does not code text; pass an artifact compiled with --span all")
    if args.kv_budget:
        artifact = replanned(artifact, kv_budget=args.kv_budget)
    data = open_data(args.data, "evaluation", args.seed)
    places = list(usable(data, args.samples + 1))
    model, processor = load_base(artifact, model=args.model, dtype=args.dtype, device=args.device)
    eos, config = end_ids(model), model.config.get_text_config(decoder=True)
    items = list(Documents(data, places, processor, artifact.geometry, eos[0], rope_index(model)))
    single = [item for item in items if len(item.sample.images) == 1]
    if len(single) < 2:
        raise UsageError("the conversation takes two documents of one page each; pass a larger --samples")
    source, device = base_source(artifact, args.model), input_device(model)
    record = {
        "model": Path(source.name).name if source.is_local else source.name,
        "data": args.data,
        "tokens": args.tokens,
        "kv_budget": artifact.method.kv_budget or "",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    given = texts(items, args.tokens, config.vocab_size, (*artifact.geometry.visual_token_ids, *eos), args.seed)
    rows = []
    with enable(model, artifact, backend=args.backend) as active:
        group = max(artifact.geometry.layers[i].group for i in artifact.geometry.compressible)
        if active.backend.most_queries(group) < STEP:
            raise UsageError(
                f"groups of {group} query heads take fewer than {STEP} tokens at a time; this model is not one for this script"
            )
        choices = [(words, replace(artifact, method=replace(artifact.method, **method))) for words, method in WAYS.items()]

        def fresh(cut: Artifact) -> RotateKCache:
            return RotateKCache(model.config, PreparedArtifact(cut), active.backend)

        for name, text in given.items():
            dense = long_text(model, single[0], text, DynamicCache(config=config))[0]
            for words, cut in choices:
                got, cache = long_text(model, single[0], text, fresh(cut))
                parts = [part.mean().item() for part in divergence(dense, got).chunk(QUARTERS)]
                sizes = cache_bytes(cache, single[0].visual_end + len(text))
                numbers = {f"kl_{n + 1}": value for n, value in enumerate(parts)}
                agree = (dense.argmax(-1) == got.argmax(-1)).double().mean().item()
                about = {"kind": "long text", "what": name, "refresh": words, "cases": 1, "agreement": agree, "opened": opened(cache)}
                rows.append(about | numbers | {"span": sizes.span / sizes.span_dense, "fallback_heads": cache.stats()["fallback_heads"]})
                print(rows[-1], file=sys.stderr, flush=True)
        rows += _conversations(model, single, given["questions of other documents"][: args.between], choices, fresh, config)
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


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Both tables of one model."""
    first = rows[0]
    budget = f"KV budget {float(first['kv_budget']):.4g}" if first["kv_budget"] else "the artifact's keep ratio"
    about = f"{first['device']}, {first['dtype']}, torch {first['torch']}, transformers {first['transformers']}"
    lines = [f"{first['model']}, {budget}, span all, {about}", ""]
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
    parser.add_argument("--print", type=Path, dest="table", help="only print the tables of this CSV")
    parser.add_argument("--output", type=Path, help="CSV to write")
    parser.add_argument("--tokens", type=int, default=4000, help="length of the text")
    parser.add_argument("--between", type=int, default=256, help="tokens of text between the two pages of a conversation")
    parser.add_argument("--samples", type=int, default=60, help="documents that conversations and text are made of")
    parser.add_argument("--kv-budget", type=float, help="planned for this budget instead of the artifact's")
    parser.add_argument("--data", default="mixed")
    parser.add_argument("--model", help="base weights other than the recorded ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "torch", "reconstruct"))
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    args = parser.parse_args()
    if (args.artifact is None) == (args.table is None):
        parser.error("pass an ARTIFACT to measure, or --print FILE")
    try:
        if args.table:
            with args.table.open(newline="", encoding="utf-8") as stream:
                rows: list[dict[str, Any]] = list(csv.DictReader(stream))
        else:
            rows = measure(args)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                with args.output.open("w", newline="", encoding="utf-8") as stream:
                    writer = csv.DictWriter(stream, FIELDS, lineterminator="\n", restval="")
                    writer.writeheader()
                    writer.writerows(rows)
    except (RotateKError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    print(markdown([{name: row.get(name, "") for name in FIELDS} for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
