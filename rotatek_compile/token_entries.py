"""Token selection in an evaluation: any method on fewer image tokens, at the same budget of bytes over all tokens that were read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from transformers.cache_utils import Cache

from .errors import UsageError
from .names import OURS, SHARED_SELECTIONS
from .runtime.cache import RotateKCache
from .runtime.coder import BeforeRopeCoder
from .runtime.prepared import PreparedArtifact
from .runtime.rivals.registry import PROMISED_FROM, RIVALS, make_coder
from .token_budget import TOKENS_ALONE, code_share, fitting_ratio, kept_tokens, selecting, with_selection

if TYPE_CHECKING:
    from .artifact_config import Method
    from .methods import Entry, Methods
    from .runtime.coder import Coder


def selection_words(token_method: str, ratio: float) -> str:
    """Such as `snapkv, 0.25 of the tokens`."""
    return f"{token_method}, {ratio:.4g} of the tokens"


def token_entries(
    methods: Methods,
    names: Iterable[str],
    budgets: Sequence[float],
    ratios: Sequence[float],
    token_methods: Iterable[str],
    token_ratios: Sequence[float],
) -> list[Entry]:
    """Each method under each selection, at each budget or keep ratio it can take.

    `native`, which is what runs if no method is named, keeps its tokens as they are: a budget says how many these are.

    Args:
        names: our own method or rivals. budgets: over all tokens. ratios: what a method keeps of the numbers of a kept token.
        token_ratios: shares of tokens that are kept.

    Raises:
        UsageError: settings that a method cannot take.
    """
    made, names = [], list(names)
    if budgets and token_ratios and set(names) <= {TOKENS_ALONE}:
        raise UsageError("--kv-budget says how many tokens stay as they are, and so does --token-keep-ratio; give one of the two")
    if ratios and not any(name == OURS or "keep_ratio" in RIVALS[name].settings for name in names):
        raise UsageError(f"{', '.join(names) or TOKENS_ALONE} has no keep ratio; leave --keep-ratio out")
    for token_method in token_methods:
        for name in names or [TOKENS_ALONE]:
            if name == TOKENS_ALONE:
                made += [alone(methods, token_method, kv_budget=budget) for budget in budgets]
                made += [alone(methods, token_method, ratio) for ratio in token_ratios] if not budgets else []
                continue
            if not token_ratios:
                raise UsageError(
                    f"--token-method {token_method} with --method {name} needs --token-keep-ratio: tokens and codes share a budget"
                )
            takes = name == OURS or "keep_ratio" in RIVALS[name].settings
            knobs: list[dict[str, float]] = [{"kv_budget": budget} for budget in budgets]
            knobs += [{"keep_ratio": ratio} for ratio in ratios if takes]
            if ratios and not takes and not budgets:
                raise UsageError(f"{name} has no keep ratio; leave --keep-ratio out")
            if not knobs and takes and name != OURS:
                raise UsageError(f"{name} needs --kv-budget or --keep-ratio")
            for ratio in token_ratios:
                made += [joint(methods, name, token_method, ratio, **knob) for knob in knobs or [{}]]
    return made


def alone(methods: Methods, token_method: str, ratio: float | None = None, kv_budget: float | None = None) -> Entry:
    """Tokens that are kept as they are: a share of them, or as many as a budget has room for."""
    if kv_budget is not None:
        ratio = fitting_ratio(methods.artifact.geometry, token_method, kv_budget)
    assert ratio is not None
    return _rival(methods, TOKENS_ALONE, token_method, ratio, requested=kv_budget)


def joint(
    methods: Methods, name: str, token_method: str, ratio: float, kv_budget: float | None = None, keep_ratio: float | None = None
) -> Entry:
    """A share of the tokens, coded by a method; the budget is of all tokens."""
    if name == OURS:
        if methods.artifact.method.rival:
            raise UsageError(f"the artifact was compiled for {methods.artifact.method.rival} and has no bases; compile one for {OURS}")
        cut = selecting(methods.artifact, token_method, ratio, keep_ratio=keep_ratio, kv_budget=kv_budget)
        about = {"requested_budget": kv_budget, "kv_budget": kv_budget, "keep_ratio": keep_ratio, "ours": True}
        return _entry(methods, name, token_method, ratio, "", _maker(methods, cut.method, PreparedArtifact(cut)), **about)
    return _rival(methods, name, token_method, ratio, kv_budget, keep_ratio, kv_budget)


def _rival(
    methods: Methods,
    name: str,
    token_method: str,
    ratio: float,
    kv_budget: float | None = None,
    keep_ratio: float | None = None,
    requested: float | None = None,
) -> Entry:
    methods.check_span(name)
    methods.check_learned(name)
    geometry = methods.artifact.geometry
    share = code_share(geometry, token_method, ratio, kv_budget) if kv_budget is not None else None
    fewest = kept_tokens(PROMISED_FROM, ratio)
    try:
        coder = make_coder(name, geometry, kv_budget=share, keep_ratio=keep_ratio, state=methods.state, tokens=fewest)
    except UsageError as error:
        if share is None:
            raise
        raise UsageError(f"{error} (of the kept tokens, to whose codes --kv-budget {kv_budget:g} leaves {share:.4g})") from error
    method = with_selection(methods.artifact.method, token_method, ratio)
    make = _maker(methods, method, PreparedArtifact(replace(methods.artifact, method=method)), coder)
    about = {"requested_budget": requested, "kv_budget": requested, "keep_ratio": keep_ratio}
    return _entry(methods, name, token_method, ratio, coder.setting, make, **about)


def _entry(methods: Methods, name: str, token_method: str, ratio: float, setting: str, make: Callable[[], Cache], **about: object) -> Entry:
    from .methods import Entry

    budget = about["requested_budget"]
    words = [selection_words(token_method, ratio), setting, f"KV budget {budget:g}" if budget is not None else ""]
    # not marked as calibrated: rows of several calibrations are pooled by budget, which many selections share (suite.over_calibrations)
    return Entry(name, make, ", ".join(filter(None, words)), **about)  # type: ignore[arg-type]


def _maker(methods: Methods, method: Method, prepared: PreparedArtifact, coder: Coder | None = None) -> Callable[[], Cache]:
    methods.check_sight(coder)
    if isinstance(coder, BeforeRopeCoder) and method.token_method not in (None, *SHARED_SELECTIONS):
        raise UsageError(f"{coder.name} codes heads jointly, {method.token_method} keeps other tokens in each; use {SHARED_SELECTIONS[0]}")
    if method.token_method is not None:
        methods.enabled.token_methods.add(method.token_method)
    config, backend = methods.enabled.model.config, methods.enabled.backend
    return lambda: RotateKCache(config, prepared, backend, coder)
