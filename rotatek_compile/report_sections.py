"""What the page of `rotatek-inspect --html` asks: one section for each question, one panel in it for each artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .report_costs import budgets_panel, cuts_panel, errors_panel, knockouts_panel
from .report_data import ANGLE_SHARE, Numbers
from .report_panels import Panel, angles_panel, bytes_panel, ranks_panel, spectra_panel, variance_panel
from .report_plots import LEAST_KL


@dataclass(frozen=True, slots=True)
class Section:
    name: str
    title: str
    how: str
    panels: list[Panel] = field(default_factory=list)


Draw = Callable[[Numbers, Sequence[Numbers]], Panel]
SECTIONS: tuple[tuple[str, str, str, Draw], ...] = (
    (
        "ranks",
        "What each head keeps",
        "Directions kept of each KV head's Keys and Values, and bits per channel over all of its channels: layers down, heads across.",
        ranks_panel,
    ),
    (
        "knockouts",
        "Which heads read the images",
        "KL of the answers to the dense model's when one head's image Keys and Values (text, where the model "
        "reads no images) become their means. Logarithmic colours.",
        knockouts_panel,
    ),
    (
        "cuts",
        "What a cut costs",
        "KL of the answers when the Keys, or the Values, of one head alone are cut to so many directions × bits; budgets are spent by it. "
        "Logarithmic colours.",
        cuts_panel,
    ),
    (
        "spectra",
        "Spectra and the kept part",
        "Energy of each head's directions in order, on a logarithmic axis from its largest down to a millionth of it, coloured by bits.",
        spectra_panel,
    ),
    (
        "variance",
        "Explained variance per layer",
        "What the kept directions hold of the energy. A head that matters little may keep little.",
        variance_panel,
    ),
    (
        "angles",
        "Image and text subspaces",
        f"Principal angles between the subspaces that the leading D/{ANGLE_SHARE} directions of image Keys and of text Keys span. "
        "Small angles mean that one basis could serve both.",
        angles_panel,
    ),
    (
        "errors",
        "Predicted against measured error",
        "One dot for each head and cut. The nearer to a rising line, the better the energy that is cut tells what the cut costs. "
        f"Rounding of 8 and 4 bits counts as error. Costs below {LEAST_KL:.0e} nats are rounding; they stand on the axis.",
        errors_panel,
    ),
    (
        "budgets",
        "KL over budget",
        "What the plan for each budget of Keys and Values together should cost, from what each head's cuts cost alone. Heads that stand in "
        "for one another make the whole cost more.",
        budgets_panel,
    ),
    (
        "bytes",
        "Bytes by part",
        "One segment: codes, a scale of 2 bytes for each direction of 8 or 4 bits, and a mean of 2 bytes a channel. Bases are shared "
        "by all sequences; one corrected for an image would add to it.",
        bytes_panel,
    ),
)


def sections(artifacts: Sequence[Numbers]) -> list[Section]:
    """All sections; artifacts side by side share their scales, so that equal colours and heights mean equal numbers."""
    made = []
    for name, title, how, draw in SECTIONS:
        have = [one for one in artifacts if name not in one.missing]
        panels = [Panel(without=one.missing[name]) if name in one.missing else draw(one, have) for one in artifacts]
        made.append(Section(name, title, how, panels))
    return made
