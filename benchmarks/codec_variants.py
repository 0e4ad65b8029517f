"""Rows of ours that bench_codec.py measures: the curve over budgets, one part changed at a time, and escape tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rotatek_compile.artifact import Artifact
from rotatek_compile.comparison import SLACK
from rotatek_compile.replan import replanned

WITHOUT_FALLBACK = (1 / 8, 1 / 32)  # budgets where the curve also shows ours held to its plan
KEEP_RATIO = 0.125  # of the ablation of own bases: there a plan is in directions, and an own basis comes on top
ESCAPES = (1 / 256, 1 / 128, 1 / 64, 1 / 32)  # shares of the tokens
BASE = "as planned"
GROUPS = ("allocation", "precision", "basis", "own bases", "other domain", "fallback", "as shipped")
CALIBRATED = 0  # `prior_tokens` of: never an own basis
SEGMENT_ALONE, BOTH = 1, 256  # ... of: the calibrated covariance counts for nearly nothing, or for half a page


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of ours: what is changed, which question that belongs to, and what the row does not show."""

    group: str
    words: str
    artifact: Artifact
    does_not_show: str


def changed(artifact: Artifact, budget: float, **method: Any) -> Artifact:
    """Planned for a KV budget with parts of the method changed; bits count here, unlike in `replanned` of an artifact for a keep ratio."""
    return replanned(replace(artifact, method=replace(artifact.method, kv_budget=budget, **method)), kv_budget=budget)


def held(artifact: Artifact, **method: Any) -> Artifact:
    """A plan as it is, run otherwise."""
    return replace(artifact, method=replace(artifact.method, **method))


def plain_of(artifact: Artifact) -> Artifact:
    """What parts are changed of: no fallback that would repair what is taken away, no own basis, no escape token."""
    return held(artifact, fallback_factor=0.0, prior_tokens=CALIBRATED, escape_ratio=0.0)


def some_groups(variants: Iterable[Variant], groups: Collection[str] | None) -> Iterator[Variant]:
    """Those of these groups, and what they are compared with; all of them where none is named."""
    return (variant for variant in variants if not groups or variant.group in (BASE, *groups))


def curve(artifact: Artifact, budget: float) -> Iterator[Variant]:
    """Ours at one budget."""
    plan = changed(artifact, budget)
    compiled = artifact.method.kv_budget
    if compiled is not None and abs(compiled - budget) < SLACK and artifact.method.max_kl is None:
        yield Variant(
            "curve", "as compiled", artifact, "what a plan for another budget is worth: this one was checked on documents kept aside"
        )
    yield Variant("curve", "", plan, "that the budget holds where heads fall back: they take more, which the coded span says")
    if any(abs(budget - one) < SLACK for one in WITHOUT_FALLBACK):
        alone = "documents unlike the calibration data, for which the fallback is there"
        yield Variant("curve", "no fallback", held(plan, fallback_factor=0.0), alone)


def ablations(artifact: Artifact, budget: float, pca: Artifact | None, other: Artifact | None, own_bases: bool) -> Iterator[Variant]:
    """One part changed at a time, at one budget.

    Args:
        pca: the same compiled with --basis pca; None leaves the row out.
        other: compiled on other documents; None leaves the rows out.
        own_bases: with the rows of plans by directions, which know no budget, so that once for all budgets is enough.
    """
    plain = plain_of(artifact)
    yield Variant(
        BASE, "", changed(plain, budget), "how plans checked on documents kept aside do: all rows are planned from stored sensitivities"
    )
    for how in ("energy", "uniform"):
        say = "whether more calibration documents would change the order; the bundled models have 20 heads"
        words = f"allocation by {how}" if how == "energy" else "same plan in every head"
        yield Variant("allocation", words, changed(plain, budget, allocation=how), say)
    for bits in ("native", "8", "4"):
        words = "native directions only" if bits == "native" else f"{bits}-bit directions only"
        say = "speed: what a precision costs while decoding is in bench_decode"
        yield Variant("precision", words, changed(plain, budget, key_bits=bits, value_bits=bits), say)
    if pca is not None:
        say = "the basis alone: its sensitivities were measured with it, so its plan differs too"
        yield Variant("basis", "basis pca", changed(plain_of(pca), budget), say)
    say = "equal bytes: every page has a Key basis of its own, see the coded span; ranks and bits are those planned for two-sided"
    yield Variant("basis", "basis paper, of the page at hand", held(changed(plain, budget), basis="paper"), say)
    yield from _own_bases(plain, budget, own_bases)
    if other is not None:
        say = "a domain that looks different: the other pages are drawn with the same glyphs"
        yield Variant("other domain", "calibrated on another domain, no fallback", changed(plain_of(other), budget), say)
        yield Variant("other domain", "calibrated on another domain, as shipped", changed(other, budget), say)
    yield Variant("fallback", "with fallback", held(changed(plain, budget), fallback_factor=artifact.method.fallback_factor),
                  "inputs built to break the calibration: bench_broken_inputs")  # fmt: skip
    yield Variant("as shipped", "as shipped: fallback, own bases and escape tokens as compiled", changed(artifact, budget),
                  "which of its parts does it: see the rows above, and the escape tokens")  # fmt: skip


def _own_bases(plain: Artifact, budget: float, nested: bool) -> Iterator[Variant]:
    say = "long segments, where an own basis is cheap: these pages have about 500 tokens, so paying for one leaves few directions"
    choices = ((SEGMENT_ALONE, "own bases from the page alone"), (BOTH, "own bases from page and calibration together"))
    for prior, words in choices:
        yield Variant("own bases", f"{words}, within the budget", held(changed(plain, budget), prior_tokens=prior), say)
    if nested:
        wide = replanned(plain, keep_ratio=KEEP_RATIO)
        say = "equal bytes: own bases come on top of the plan here, see the coded span"
        for prior, words in ((CALIBRATED, "calibrated bases only"), *choices):
            yield Variant("own bases", f"{words}, keep ratio {KEEP_RATIO:g}", held(wide, prior_tokens=prior), say)


def escapes(artifact: Artifact, budget: float) -> Iterator[Variant]:
    """Tokens that stay raw, out of the same bytes and on top of them."""
    plain = plain_of(artifact)
    base = changed(plain, budget)
    yield Variant(BASE, "", base, "what the compiler would choose for such pages: it was calibrated on others")
    say = "other pages: how many tokens carry an answer differs from page to page"
    for share in ESCAPES:
        words = f"1/{round(1 / share)} of the tokens raw"
        if share < budget * 0.75:
            yield Variant("escape tokens", f"{words}, of the same bytes", changed(plain, budget, escape_ratio=share), say)
        yield Variant(
            "escape tokens", f"{words}, on top", held(base, escape_ratio=share), f"{say}; nor equal bytes: these tokens come on top"
        )
