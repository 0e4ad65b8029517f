"""From what bench_refresh.py found of each batch to the rows of a CSV and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from measuring import Rows, versions

from rotatek_compile.statistics import Bootstrap

QUARTERS = 4
TEXTS = {"questions": "questions of other documents", "generated": "the model's own words", "random": "random tokens"}
TALK = ("A, first", "A again after B", "B")
RECORD = ("model", "data", "tokens", "kv_budget", "device", "dtype", "torch", "transformers")
FIELDS = (
    "kind", "what", "refresh", "cases", "kl_1", "kl_2", "kl_3", "kl_4", "kl_low", "kl_high", "agreement", "dense_right", "span", "opened",
    "fallback_heads", *RECORD,
)  # fmt: skip
LONG = ("pages", "refresh", "KL per token, 1st quarter", "2nd", "3rd", "4th", "same token chosen", "coded span", "refreshes a page")
ASKED = ("asked about", "conversations", "refresh", "KL per answer token", "same answer as dense", "dense is right", "coded span")
NOT_SHOWN = (
    "Not shown: other texts than these; the bundled models were never trained on texts this long or on conversations, so KL to dense tells "
    "how closely the cache is followed, not how good the text is."
)


def rows_of(header: Mapping[str, Any], notes: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> Rows:
    """Rows of one part.

    Args:
        header: `part` and `record`, columns that all rows share.
        notes: by batch, way of refreshing, and subject (the turn of a conversation, or nothing): `kl`, sums by case and quarter
            [cases, 1 or 4]; `tokens`, that they are sums over: by quarter, or of a conversation by case; `agree` (tokens, or answers) and
            `right` by case; `span`, `span_dense` (bytes), `opened` and `fallback_heads` of the batch.
    """
    batches = [notes[number] for number in sorted(notes)]
    talk, rows = header["part"] not in TEXTS, []
    for way in batches[0]:
        for subject in batches[0][way]:
            own = [batch[way][subject] for batch in batches]
            kl = [case for one in own for case in one["kl"]]
            agree = [n for one in own for n in one["agree"]]
            tokens = [n for one in own for n in one["tokens"]] if talk else [own[0]["tokens"][-1]] * len(kl)
            low, high = Bootstrap(len(kl)).interval([case[-1] for case in kl], tokens)
            row = {"kind": "conversation" if talk else "long text", "what": subject or TEXTS[header["part"]], "refresh": way}
            row |= {"cases": len(kl), "kl_low": low, "kl_high": high, "fallback_heads": sum(one["fallback_heads"] for one in own)}
            row["span"] = sum(one["span"] for one in own) / sum(one["span_dense"] for one in own)
            if talk:
                row |= {"kl_1": sum(case[0] for case in kl) / sum(tokens), "agreement": sum(agree) / len(kl)}
                row["dense_right"] = sum(n for one in own for n in one["right"]) / len(kl)
            else:
                lengths = own[0]["tokens"]
                row |= {f"kl_{n + 1}": sum(case[n] for case in kl) / (len(kl) * lengths[n]) for n in range(QUARTERS)}
                row |= {"agreement": sum(agree) / (len(kl) * sum(lengths)), "opened": sum(one["opened"] for one in own) / len(kl)}
            rows.append(row | dict(header["record"]))
    return sorted(rows, key=lambda row: TALK.index(row["what"])) if talk else rows


def markdown(rows: Rows) -> str:
    """Tables of one model from rows as a CSV has them, one for each kind and run; the interval of a long text is of its last quarter."""
    runs: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        runs.setdefault(tuple(str(row[name]) for name in ("kind", *RECORD)), []).append(row)
    return "\n\n".join([*(_table(own) for own in runs.values()), NOT_SHOWN])


def _table(rows: Rows) -> str:
    first = rows[0]
    budget = f"KV budget {float(first['kv_budget']):.4g}" if first["kv_budget"] else "the artifact's keep ratio"
    talk = first["kind"] == "conversation"
    columns = ASKED if talk else (f"{first['tokens']} tokens of text", *LONG)
    lines = [f"{first['model']}, {budget}, span all, {versions(first)}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        spread = f" [{float(row['kl_low']):.1e}, {float(row['kl_high']):.1e}]" if row["kl_low"] != "" else ""
        cells = [row["what"], str(row["cases"]), row["refresh"]]
        if talk:
            cells += [f"{float(row['kl_1']):.1e}{spread}", f"{float(row['agreement']):.3f}", f"{float(row['dense_right']):.3f}"]
            cells.append(f"{float(row['span']):.4f}")
        else:
            cells += [f"{float(row[f'kl_{n + 1}']):.1e}" for n in range(QUARTERS)]
            cells[-1] += spread
            cells += [f"{float(row['agreement']):.3f}", f"{float(row['span']):.4f}", f"{float(row['opened']):.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
