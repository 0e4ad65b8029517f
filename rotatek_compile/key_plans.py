"""Plans of the Keys alone, Values raw: so that methods are compared by their Keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .allocate import Menu, plan_from_choice, spend
from .artifact import Artifact
from .cost_curves import dense_bytes, every_slabs
from .errors import UsageError
from .kernels.slabs import Slabs
from .names import check_fraction
from .plan import HeadPlan, plan_tensors
from .plan_words import promised_bytes
from .planning import tokens_to_pay
from .replan import costs_of
from .token_budget import every_token


def with_key_budget(artifact: Artifact, key_budget: float) -> Artifact:
    """The artifact with a plan whose Keys take at most a share of the dense Keys, all Values raw.

    Spent over heads and precisions by the stored sensitivities of the Keys, as `replanned` does; no escape tokens, and no token is dropped.
    The method's `kv_budget` becomes what Keys and Values are promised to take together.

    Args:
        key_budget: of the dense bytes of the Keys of a segment of 512 tokens, means and scales included, in (0, 1].

    Raises:
        UsageError: out of range, smaller than the means, or an artifact without bases or sensitivities.
    """
    check_fraction("--key-budget", key_budget)
    method, geometry = every_token(replace(artifact.method, escape_ratio=0.0)), artifact.geometry
    if method.rival is not None or not method.levels:
        raise UsageError("a budget of the Keys alone needs an artifact of rotatek with sensitivities; compile one")
    tokens = tokens_to_pay(method, key_budget)
    curves = costs_of(artifact).by(method.allocation)[0]
    menus = {}
    for (i, h), curve in curves.items():
        dim = geometry.layers[i].head_dim
        keys, value = every_slabs(dim), Slabs(dim)
        cost = np.array([promised_bytes(key, dim, tokens) for key in keys], dtype=np.int64)
        menus[i, h] = Menu(tuple(HeadPlan(key, value) for key in keys), cost, np.array([curve.key.of(key) for key in keys]))
    try:
        plan = plan_from_choice(spend(menus, int(key_budget * dense_bytes(geometry, tokens) / 2 * (1 + 1e-12))), menus)
    except ValueError as error:
        raise UsageError(f"{key_budget:g} of the Keys' bytes is too small: means alone take {1 / tokens:.4g}; use at least that") from error
    method = replace(method, kv_budget=(key_budget + 1) / 2, max_kl=None, key_bits="auto", value_bits="native")
    return replace(artifact, method=method, tensors=artifact.tensors | plan_tensors(plan))
