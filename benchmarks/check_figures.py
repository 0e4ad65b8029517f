"""Whether a rerun reproduces committed figures of JSON results: every figure that has an interval within the committed one.

`evidence.py` asks it of bench_rotation.py and bench_subspaces.py; tables of rotatek-eval have check_results.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Plain = dict[str, Any] | list[Any] | float | str | None


def figures(found: Plain, path: str = "") -> Iterator[tuple[str, float, float, float]]:
    """Every figure that has an interval: (name, value, low, high). Either `x` beside `x_interval`, or a list of three numbers in order."""
    if isinstance(found, dict):
        about = ", ".join(str(found[key]) for key in ("ratio", "way", "text_share", "words") if key in found)
        here = f"{path} ({about})" if about else path
        for key, value in found.items():
            interval = found.get(f"{key}_interval")
            if isinstance(interval, list) and isinstance(value, int | float):
                yield f"{here}/{key}", float(value), float(interval[0]), float(interval[1])
            else:
                yield from figures(value, f"{here}/{key}")
    elif isinstance(found, list):
        if len(found) == 3 and all(isinstance(x, int | float) for x in found):
            yield path, float(found[0]), float(found[1]), float(found[2])
        else:
            for value in found:
                yield from figures(value, path)


def outside(old: Plain, new: Plain, same: bool, slack: float = 1e-6) -> list[str]:
    """Figures of a rerun that are not within the committed interval (`same` documents), or whose interval does not meet it."""
    committed = {name: values for name, *values in figures(old)}
    said = []
    for name, value, low, high in figures(new):
        if name not in committed:
            continue
        was, least, most = committed[name]
        least, most = min(least, was) - slack - 1e-3 * abs(was), max(most, was) + slack + 1e-3 * abs(was)
        seen = (value, value) if same else (low, high)
        if not (seen[1] >= least and seen[0] <= most):
            said.append(f"{name.lstrip('/')}: {value:.3g} [{low:.3g}, {high:.3g}], committed {was:.3g} [{least:.3g}, {most:.3g}]")
    return said


def gone(old: Plain, new: Plain) -> list[str]:
    """Names of committed figures that a rerun does not have."""
    found = {name for name, *_ in figures(new)}
    return [name.lstrip("/") for name, *_ in figures(old) if name not in found]
