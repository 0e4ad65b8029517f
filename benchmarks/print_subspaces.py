"""The tables of bench_subspaces.py as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def figures(values: Sequence[float] | None, form: str = ".3f") -> str:
    """A mean and its interval; a dash for none."""
    if values is None:
        return "-"
    mean, low, high = (format(x, form) for x in values)
    return f"{mean} [{low}, {high}]"


def part(title: str, head: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """A title and a table; `head` is its first line without the outer bars."""
    lines = [title, "", f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def lines(found: dict[str, Any], name: str) -> list[str]:
    """All tables of one model."""
    own = found["models"][name]
    words = f"{found['num_samples']} calibration and {found['documents']} other documents of {found['data']}, float32"
    out = [f"{name}, {words}, {found['device']}, torch {found['torch']}, transformers {found['transformers']}", ""]
    rows = [[_over(r["ratio"]), r["way"], figures(r["keys"]), figures(r["logits"])] for r in own["explained"]]
    out += part("Explained on unseen pages:", "kept of D | what | of the Keys' variance | of the expected squared logits", rows)
    rows = [[what, figures(values, ".2f")] for what, values in own["drift"].items()]
    out += part("Drift:", "leading D/4 directions of the Keys of | mean squared cosine", rows)
    rows = [
        [f"{r['text_share']:.2f}", figures(r["images"]), figures(r["text"]), figures(r["kl"], ".1e"), figures(r["over_first"], ".2g")]
        for r in own["calibration_mix"]
    ]
    head = "text in the calibrated covariance | logit error of images | logit error of text | KL per token | over images alone"
    out += part("Calibration mix, D/4 kept:", head, rows)
    rows = [
        [str(r["words"]), f"{r['text_share']:.2f}", f"{r['surprise']:.2g}", figures(r["kl"], ".1e")]
        + [figures(r["over_first"], ".2g"), figures(r["over_channels"], ".2g")]
        for r in own["prompt_mix"]
    ]
    head = "words before the question | text of the prompt | dense model: nats per answer token | KL per token"
    return out + part("Prompt mix, D/4 kept:", f"{head} | over no words | over the channels'", rows)


def _over(ratio: float) -> str:
    return f"1/{round(1 / ratio)}"
