"""Escape tokens and own bases, chosen by what whole plans cost on the documents kept aside.

Both take bytes from a plan: an escape token is raw in every head, an own basis is paid for with directions. Whether that pays depends on
the documents, so candidates are measured, through the cache itself (cache_check.py). The simple choice, neither of the two, is also the
fastest at prefill, and stays unless another is better beyond what so few documents leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .artifact import Artifact, Method
from .cache_check import answer_tokens, kl_through_cache
from .cutter import Cutter, Prefilled
from .errors import UsageError
from .parallel import Processes
from .plan import Plan, plan_tensors
from .statistics import Bootstrap

ESCAPE_RATIOS = (1 / 256, 1 / 64)
PRIOR_TOKENS = 256  # what the calibrated covariance counts for where own bases are tried
ENOUGH_DOCUMENTS = 12  # with fewer, one answer decides
FIRST_LOOK = 1 / 3  # of the documents; who costs more than the simple choice on them is not read further
GOOD_ENOUGH = 1e-5  # nats per token below which nothing is worth slower prefill


@dataclass(slots=True)
class _Trial:
    """One candidate: KL of the documents read so far [documents], in one order for all candidates."""

    artifact: Artifact
    kl: np.ndarray
    dropped: bool = False


class CodingChoice:
    """Measures candidates against the simple one, on documents that several processes may share.

    Args:
        docs: this process's share.
        plan_for: the plan of a method's budget beside its escape tokens; raises UsageError where there is no room for them.
    """

    def __init__(self, cutter: Cutter, docs: Sequence[Prefilled], plan_for: Callable[[Method], Plan], together: Processes) -> None:
        self.cutter, self.plan_for, self.together = cutter, plan_for, together
        first = round(len(docs) * FIRST_LOOK)
        self.parts = (docs[:first], docs[first:])
        self.tokens = int(sum(together.gather(int(answer_tokens(docs).sum()))))
        self.documents = sum(together.gather(sum(len(doc.items) for doc in docs)))
        self.trials: list[_Trial] = []

    def chosen(self, artifact: Artifact, escape_ratios: Iterable[float], prior_tokens: Iterable[int]) -> Artifact:
        """The artifact as it is, or with the escape ratio and then the own bases that are better beyond noise.

        Args:
            artifact: the simple choice; one of its two settings may be forced.
            escape_ratios, prior_tokens: what else may be chosen; nothing of a setting that is forced.
        """
        if self.documents < ENOUGH_DOCUMENTS:
            return artifact
        simple = _Trial(artifact, self._kl(artifact))
        self.trials.append(simple)
        if simple.kl.sum() <= GOOD_ENOUGH * self.tokens:
            return artifact
        best = simple
        for changes in ([{"escape_ratio": ratio} for ratio in escape_ratios], [{"prior_tokens": prior} for prior in prior_tokens]):
            tried = [trial for change in changes if (trial := self._tried(best.artifact, change, simple)) is not None]
            best = min([best, *(trial for trial in tried if self._beats(trial, simple))], key=lambda trial: trial.kl.sum())
        return best.artifact

    def report(self, chosen: Artifact) -> dict[str, Any]:
        """What was tried and what it measured; `ratio` is the paired interval of a candidate's KL over the simple one's."""
        return {
            "documents": self.documents,
            "escape_ratio": chosen.method.escape_ratio,
            "prior_tokens": chosen.method.prior_tokens,
            "tried": [
                {
                    "escape_ratio": trial.artifact.method.escape_ratio,
                    "prior_tokens": trial.artifact.method.prior_tokens,
                    "documents": len(trial.kl),
                    "kl": None if trial.dropped else float(trial.kl.sum() / max(self.tokens, 1)),
                    "ratio": None if number == 0 else list(self._ratio(trial, self.trials[0])),
                }
                for number, trial in enumerate(self.trials)
            ],
        }

    def kl(self, chosen: Artifact) -> float | None:
        """KL per answer token of the artifact that was chosen; None if nothing was measured."""
        return next((float(trial.kl.sum() / max(self.tokens, 1)) for trial in self.trials if trial.artifact is chosen), None)

    def _tried(self, artifact: Artifact, change: dict[str, Any], simple: _Trial) -> _Trial | None:
        method = replace(artifact.method, **change)
        plan: Plan | None = artifact.plan()
        if "escape_ratio" in change:
            plan = self.together.broadcast(self._plan(method) if self.together.main else None)
        if plan is None:
            return None
        trial = _Trial(replace(artifact, method=method, tensors=artifact.tensors | plan_tensors(plan)), np.zeros(0))
        self.trials.append(trial)
        for part in (0, 1):
            trial.kl = np.concatenate([trial.kl, self._part(trial.artifact, part)])
            if trial.kl.sum() >= simple.kl[: len(trial.kl)].sum():
                trial.dropped = part == 0
                break
        return trial

    def _plan(self, method: Method) -> Plan | None:
        try:
            return self.plan_for(method)
        except UsageError:
            return None  # no room for so many raw tokens

    def _kl(self, artifact: Artifact) -> np.ndarray:
        return np.concatenate([self._part(artifact, part) for part in (0, 1)])

    def _part(self, artifact: Artifact, part: int) -> np.ndarray:
        return np.concatenate(self.together.gather(kl_through_cache(self.cutter, self.parts[part], artifact)))

    def _beats(self, trial: _Trial, simple: _Trial) -> bool:
        return not trial.dropped and self._ratio(trial, simple)[1] < 1

    @staticmethod
    def _ratio(trial: _Trial, simple: _Trial) -> tuple[float, float]:
        return Bootstrap(len(trial.kl)).ratio(trial.kl.tolist(), simple.kl[: len(trial.kl)].tolist())
