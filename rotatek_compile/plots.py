"""Exact match and KL over bytes, one curve per method, with intervals; from the rows of results.csv.

Intervals are over documents, and over calibrations where several were measured. Each axis of the suite `proof` has figures of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import RotateKError
from .names import OURS

DENSE = "dense"  # of methods.py, which imports torch
MEASURES = {"exact_match": "exact match", "kl": "KL to the dense model, nats per answer token"}
SPAN = "bytes of coded images / dense"
XLABELS = {"kv": SPAN, "keys": f"{SPAN}, Values raw", "keys+values4": f"{SPAN}, Values at 4 bits"}
LEAST_KL = 1e-8  # a logarithmic axis has no zero


def require_matplotlib() -> None:
    """Say at once that plots cannot be made, not after hours of work.

    Raises:
        RotateKError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RotateKError("plots need matplotlib, which is not installed; pip install 'rotatek-compile[plot]'") from error


def plot_results(rows: Sequence[dict[str, Any]], directory: Path, skill: str = "all") -> list[Path]:
    """Write exact_match.png, kl.png and the same as SVG; one panel per mode, the coded span's bytes over dense on a log axis.

    Keys beside equal Values go into exact_match-keys.png and so on: they are no points of the same curves.

    Args:
        rows: of results.csv, as text or numbers.

    Returns:
        the files written.

    Raises:
        RotateKError: matplotlib is not installed, no row is about the skill, or a file cannot be written.
    """
    require_matplotlib()
    chosen = [row for row in rows if row["skill"] == skill]
    if not chosen:
        raise RotateKError(f"there is no row of skill {skill!r} to plot; choose one of {', '.join(sorted({r['skill'] for r in rows}))}")
    written = []
    for axis, words in XLABELS.items():
        own = [row for row in chosen if (row.get("axis") or "kv") == axis]
        if axis != "kv" and own:
            own = [row for row in chosen if row["method"] == DENSE] + own
        for measure in MEASURES if own else ():
            written += _figure(own, measure, directory / (measure if axis == "kv" else f"{measure}-{axis}"), words)
    return written


def _figure(rows: Sequence[dict[str, Any]], measure: str, stem: Path, xlabel: str) -> list[Path]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    asks = list(dict.fromkeys(row["ask"] for row in rows))
    figure = Figure(figsize=(6.0 * len(asks), 4.5), layout="constrained")
    for axes, ask in zip(figure.subplots(1, len(asks), squeeze=False)[0], asks, strict=True):
        _panel(axes, [row for row in rows if row["ask"] == ask], measure)
        if xlabel == SPAN:  # others reach over less than one doubling
            axes.set_xscale("log", base=2)
        axes.set(title=f"--ask {ask}", xlabel=xlabel, ylabel=MEASURES[measure])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    written = []
    for suffix in ("png", "svg"):
        file = stem.with_name(f"{stem.name}.{suffix}")
        try:
            with rc_context({"svg.hashsalt": stem.name}):  # equal results give equal files
                figure.savefig(file, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
        except OSError as error:
            raise RotateKError(f"could not write {file}: {error.strerror or error}") from error
        written.append(file)
    return written


def _panel(axes: Any, rows: list[dict[str, Any]], measure: str) -> None:
    from matplotlib import colormaps

    floor = LEAST_KL if measure == "kl" else 0.0
    for number, name in enumerate(dict.fromkeys(map(_curve, rows))):
        own = [row for row in rows if _curve(row) == name and float(row["span_bytes_dense"]) > 0]
        if not own:  # the dense model has no coded span
            if measure == "exact_match":
                level = float(next(row for row in rows if _curve(row) == name)[measure])
                axes.axhline(level, color="black", linestyle=":", label=name)
            continue
        own.sort(key=lambda row: float(row["span_bytes"]))
        x = [float(row["span_bytes"]) / float(row["span_bytes_dense"]) for row in own]
        y, low, high = ([max(float(row[key]), floor) for row in own] for key in (measure, f"{measure}_low", f"{measure}_high"))
        # a percentile interval need not hold the estimate when documents are few
        below = [max(a - b, 0.0) for a, b in zip(y, low, strict=True)]
        above = [max(b - a, 0.0) for a, b in zip(y, high, strict=True)]
        color = colormaps["tab20"](number % 10 * 2 + number // 10 % 2)  # ten strong colours, then their pale twins
        style = {"marker": "osD^v<>"[number % 7], "color": color, "linewidth": 1, "markersize": 5, "capsize": 2}
        axes.errorbar(x, y, yerr=[below, above], label=name, **style)
    if measure == "kl":
        axes.set_yscale("log")
    axes.grid(True, which="both", alpha=0.2)


def _curve(row: dict[str, Any]) -> str:
    """What a point belongs to: our own method at budgets is another curve than at keep ratios, with the same rank in every head."""
    by_rank = row["method"] == OURS and not row.get("kv_budget")
    return f"{row['method']}, uniform ranks" if by_rank else str(row["method"])
