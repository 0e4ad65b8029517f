"""Fewer image tokens at a budget of bytes: how many are kept, and what their codes may take.

A KV budget F promises bytes over those of all tokens that were read. With token selection a share t of every image's tokens is kept, so
the codes of a kept token may take F / t of its dense bytes, less the index that says which token it is. `Method.kv_budget` is that share of
the kept tokens, because all that plans and codes works on them alone; `Method.token_budget` is F.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from .cost_curves import SEGMENT
from .errors import UsageError
from .geometry import Geometry
from .names import SHARED_SELECTIONS, check_selection
from .planning import smallest_share, tokens_to_pay

if TYPE_CHECKING:
    from .artifact import Artifact
    from .artifact_config import Method

INDEX_BYTES = 2  # of a kept token, in images of up to 65,536 tokens; one bit per token of the image where that is less
TOKENS_ALONE = "native"  # the rival that keeps what it is given as it is


def kept_tokens(tokens: int, ratio: float) -> int:
    """How many of an image's tokens are kept: an even number, because stored segments are padded to one, and at least two."""
    return tokens if ratio >= 1 else min(tokens, max(2, int(tokens * ratio + 1e-9) // 2 * 2))


def index_share(geometry: Geometry, token_method: str) -> float:
    """Bytes of the index of one kept token over its dense bytes: one index for all heads, or one for each KV head."""
    heads = sum(geometry.layers[i].kv_heads for i in geometry.compressible)
    indices = 1 if token_method in SHARED_SELECTIONS else heads
    return INDEX_BYTES * indices / geometry.dense_bytes_per_token()


def code_share(geometry: Geometry, token_method: str, ratio: float, budget: float) -> float:
    """Share of the dense bytes of the *kept* tokens that is left for their codes, with the means and scales they need.

    Raises:
        UsageError: nothing is left, with what to do.
    """
    share = budget / ratio - index_share(geometry, token_method)
    if share <= 0:
        raise UsageError(f"--kv-budget {budget:g} leaves nothing for the codes of {ratio:g} of the tokens; lower --token-keep-ratio")
    return min(share, 1.0)


def fitting_ratio(geometry: Geometry, token_method: str, budget: float) -> float:
    """The share of tokens that a budget has room for, as they are, with their indices."""
    return min(budget / (1 + index_share(geometry, token_method)), 1.0)


def with_selection(method: Method, token_method: str, ratio: float) -> Method:
    """A method that keeps fewer image tokens; its codes are as they were.

    Raises:
        UsageError: the method codes text too.
    """
    if method.span != "visual":
        raise UsageError(
            f"--token-method {token_method} keeps fewer image tokens, and the plan would not fit the text that --span {method.span} codes "
            "with it; compile with --span visual"
        )
    whole = method.image_tokens if method.token_method is None else round(method.image_tokens / method.token_keep_ratio)
    selected = token_method if ratio < 1 else None
    return replace(method, token_method=selected, token_keep_ratio=ratio, token_budget=None, image_tokens=kept_tokens(max(whole, 1), ratio))


def every_token(method: Method) -> Method:
    """The method on all image tokens, at the same share of each."""
    return method if method.token_method is None else with_selection(method, method.token_method, 1.0)


def with_total(method: Method, geometry: Geometry, budget: float) -> Method:
    """The method with a budget F over all tokens that were read; for one that keeps them all it is the plain budget.

    Raises:
        UsageError: a budget that the codes of the kept tokens cannot meet, with the smallest that can.
    """
    if method.token_method is None:
        return replace(method, kv_budget=budget, token_budget=None)
    share = code_share(geometry, method.token_method, method.token_keep_ratio, budget)
    if method.rival is None:
        share = _planned_share(method, geometry, share, budget)
    return replace(method, kv_budget=share, token_budget=budget)


@contextmanager
def of_kept_tokens(method: Method) -> Iterator[None]:
    """What is refused inside is said of the codes of kept tokens: name the budget that was asked for, too."""
    try:
        yield
    except UsageError as error:
        if method.token_budget is None:
            raise
        left = f"--kv-budget {method.token_budget:g} leaves {method.kv_budget:.4g}"
        raise UsageError(f"{error} (of the kept tokens, to whose codes {left})") from error


def _planned_share(method: Method, geometry: Geometry, share: float, budget: float) -> float:
    """What to plan with so that the promise holds for the kept tokens of an image of `SEGMENT` tokens.

    Plans spread means and scales over `tokens_to_pay` tokens; where fewer are kept, what is missing is left out of the share: own means
    take 4 D bytes of a head and scales at most 16 D · share, beside 4 D bytes of a raw token.
    """
    fewest, ratio = kept_tokens(SEGMENT, method.token_keep_ratio), method.token_keep_ratio
    least = smallest_share(geometry) * SEGMENT / fewest + method.escape_ratio
    if share < least:
        total = math.ceil((least + budget / ratio - share) * ratio * 1e4) / 1e4
        raise UsageError(
            f"--kv-budget {budget:g} is too small: the means of {fewest} kept tokens take {least:.4g} of their dense bytes; "
            f"use at least {total:g}, or keep fewer tokens as they are (--method {TOKENS_ALONE})"
        )
    paid = tokens_to_pay(method, share)
    return share if paid <= fewest else max(least, share - (1 + 4 * share) * (1 - fewest / paid) / fewest)


def selecting(
    artifact: Artifact,
    token_method: str | None,
    ratio: float | None,
    *,
    keep_ratio: float | None = None,
    kv_budget: float | None = None,
) -> Artifact:
    """The artifact with another selection of tokens, or none (ratio 1), and with another budget if one is given.

    Without a budget the plan stays, so bytes fall with the tokens. Plans are those of all tokens: what the two cost together is for
    `rotatek-eval` to say.

    Raises:
        UsageError: as `names.check_selection`, `with_selection` and `replan.replanned`.
    """
    from .replan import replanned

    if token_method is not None or ratio is not None:
        old = artifact.method
        named = token_method or old.token_method
        check_selection(named, old.token_keep_ratio if ratio is None and old.token_method else ratio)
        wanted = old.token_keep_ratio if ratio is None else ratio
        artifact = replace(artifact, method=with_selection(old, named or "", wanted))
    if keep_ratio is None and kv_budget is None:
        return artifact
    return replanned(artifact, keep_ratio=keep_ratio, kv_budget=kv_budget)
