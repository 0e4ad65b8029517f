"""Methods that an evaluation compares: the dense model, the artifact, its bases at other keep ratios and budgets, and the rivals.

Every one is an `Entry`: what it is called in a table, and a maker of fresh caches for the model that `enable` is active on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .allocate import uniform_plan
from .artifact import Artifact
from .artifact_config import Method
from .errors import RotateKError, UsageError
from .key_plans import with_key_budget
from .names import ALLOCATIONS, LEARNED, OURS, SUITES
from .plan import plan_tensors
from .replan import replanned
from .runtime.cache import RotateKCache
from .runtime.coder import BeforeRopeCoder, Coder
from .runtime.enable import enable
from .runtime.prepared import PreparedArtifact
from .runtime.rivals.registry import PROMISED_FROM, RIVALS, make_coder, smallest_budget
from .token_budget import every_token
from .token_entries import selection_words

DENSE, ARTIFACT = "dense", "artifact"
KV = "kv"
SUITE_BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
OWN_BUDGETS = (*SUITE_BUDGETS, 1 / 64)
SUITE_KEEP_RATIOS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
NO_ENERGY = "needs energies of the Key channels, which artifacts with --basis two-sided hold"


@dataclass(frozen=True, slots=True)
class Entry:
    """One row to be: method name, setting in words, what was asked for, and a maker of fresh caches.

    `requested_budget` is the KV budget that was wanted, `kv_budget` the one the method was given: larger where it cannot do with less.
    `ours`: it is our own method, to be compared with rivals of the same bytes.
    `axis`: what it is compared in, Keys and Values together or Keys beside Values that are the same on both sides (proof_suite.py); then
    `key_budget` is the share of the dense Keys that was wanted. `calibrated`: it depends on the artifact's calibration, of which
    `calibration` is the number.
    """

    method: str
    make: Callable[[], Cache]
    setting: str = ""
    requested_budget: float | None = None
    kv_budget: float | None = None
    keep_ratio: float | None = None
    ours: bool = False
    axis: str = KV
    key_budget: float | None = None
    calibrated: bool = False
    calibration: int = 0

    @property
    def name(self) -> str:
        """Method and setting."""
        return f"{self.method} ({self.setting})" if self.setting else self.method

    @property
    def label(self) -> str:
        """Unique within one evaluation."""
        where = f" [{self.axis}]" if self.axis != KV else ""
        return f"{self.name}{where}" + (f" #{self.calibration + 1}" if self.calibration else "")


class Methods:
    """Makes entries for the model of one `enable`, and for its artifact or another one of the same model.

    Args:
        artifact: the other one, calibrated differently; `calibration` is its number, from 1.
        learned: what rivals learned by training, by their name (`Learned.state`).

    Raises (every method):
        UsageError: unknown names and settings that a method cannot take, as `make_coder` says it; missing knock-outs.
    """

    def __init__(
        self, enabled: enable, artifact: Artifact | None = None, calibration: int = 0, learned: Mapping[str, Any] | None = None
    ) -> None:
        self.enabled, self.artifact, self.calibration = enabled, artifact or enabled.artifact, calibration
        self.prepared = PreparedArtifact(artifact) if artifact is not None else enabled.prepared
        self.unselected = self.prepared  # rivals keep all tokens, whatever the artifact does
        if self.artifact.method.token_method is not None:
            enabled.token_methods.add(self.artifact.method.token_method)
            every = replace(self.artifact.method, token_method=None, token_keep_ratio=1.0, token_budget=None)
            self.unselected = PreparedArtifact(replace(self.artifact, method=every))
        self.state: dict[str, Any] = {"knockout": knockouts(self.artifact), "energy": channel_energies(self.artifact)}
        self.state |= dict.fromkeys(LEARNED) | dict(learned or {})

    def dense(self) -> Entry:
        text = self.enabled.model.config.get_text_config(decoder=True)
        return Entry(DENSE, lambda: DynamicCache(config=text))

    def compiled(self) -> Entry:
        """The artifact as it is."""
        entry, method = self._compiled(), self.artifact.method
        if method.token_method is None:
            return entry
        words, whole = _of_tokens(method, entry.setting), method.token_budget
        return replace(entry, setting=words, requested_budget=whole, kv_budget=whole)

    def _compiled(self) -> Entry:
        method, coder = self.artifact.method, self.prepared.coder
        make = self.enabled.new_cache if self.prepared is self.enabled.prepared else self._cache_maker(self.prepared, coder)
        if coder is not None:
            setting = ", ".join(filter(None, (coder.name, coder.setting)))
            by_ratio = not method.kv_budget and "keep_ratio" in RIVALS[coder.name].settings
            ratio = method.keep_ratio if by_ratio else None
            return self._own(ARTIFACT, make, setting, method.kv_budget, method.kv_budget, ratio, ours=False)
        budget = method.kv_budget
        if budget is None:
            setting = f"keep ratio {method.keep_ratio:g}, {method.allocation}"
            return self._own(ARTIFACT, make, setting, keep_ratio=method.keep_ratio)
        wanted = f" for at most {method.max_kl:g} nats" if method.max_kl is not None else ""
        return self._own(ARTIFACT, make, f"KV budget {budget:.4g}{wanted}, {method.allocation}", budget, budget)

    def own(self, keep_ratio: float, *, every: bool = False) -> Entry:
        """The artifact's bases with the same rank in every head: ranks nest, so any uniform plan can be cut from them.

        Args:
            every: on all image tokens, where the artifact drops some.
        """
        self._check_bases()
        if not 0 < keep_ratio <= 1:
            raise UsageError(f"--keep-ratio {keep_ratio:g} is out of range; it must be above 0 and at most 1")
        geometry = self.artifact.geometry
        plan = uniform_plan(geometry, keep_ratio)
        method = replace(self.artifact.method, keep_ratio=keep_ratio, allocation="uniform", kv_budget=None, max_kl=None)
        method = replace(method, key_bits="native", value_bits="native", token_budget=None)
        method = every_token(method) if every else method
        cut = replace(self.artifact, method=method, tensors=self.artifact.tensors | plan_tensors(plan))
        widest = max(head.key.rank for heads in plan.values() for head in heads)
        make = self._cache_maker(PreparedArtifact(cut))
        return self._own(OURS, make, _of_tokens(method, f"uniform, {widest} directions"), keep_ratio=keep_ratio)

    def own_budget(self, kv_budget: float) -> Entry:
        """The artifact's bases at a KV budget, which its sensitivities spend over heads, directions and bits of Keys and Values."""
        self._check_bases()
        cut = replanned(self.artifact, kv_budget=kv_budget)
        make, how = self._cache_maker(PreparedArtifact(cut)), self.artifact.method.allocation
        setting = f"KV budget {kv_budget:g}" + (f", {how}" if how != ALLOCATIONS[0] else "")
        return self._own(OURS, make, _of_tokens(cut.method, setting), kv_budget, kv_budget)

    def own_keys(self, key_budget: float, axis: str) -> Entry:
        """The artifact's bases with Keys at a share of the dense Keys, and all Values raw."""
        self._check_bases()
        cut = with_key_budget(self.artifact, key_budget)
        make, budget = self._cache_maker(PreparedArtifact(cut)), cut.method.kv_budget
        return self._own(OURS, make, f"Keys {key_budget:g}, Values raw", budget, budget, axis=axis, key_budget=key_budget)

    def own_coded(self, coder: Coder, budget: float, axis: str, key_budget: float) -> Entry:
        """Our Keys as a coder made them; it codes Values too (proof_suite.py)."""
        return self._own(OURS, self._cache_maker(self.unselected, coder), coder.setting, budget, budget, axis=axis, key_budget=key_budget)

    def _own(
        self,
        name: str,
        make: Callable[[], Cache],
        setting: str,
        requested: float | None = None,
        given: float | None = None,
        keep_ratio: float | None = None,
        *,
        ours: bool = True,
        axis: str = KV,
        key_budget: float | None = None,
    ) -> Entry:
        return Entry(name, make, setting, requested, given, keep_ratio, ours, axis, key_budget, True, self.calibration)

    def _check_bases(self) -> None:
        if self.artifact.method.rival:
            raise UsageError(f"the artifact was compiled for {self.artifact.method.rival} and has no bases; compile one for {OURS}")

    def rival(self, name: str, kv_budget: float | None = None, keep_ratio: float | None = None, requested: float | None = None) -> Entry:
        """A rival at a KV budget or a keep ratio; `requested` is the budget that was wanted, by default the one given."""
        self.check_span(name)
        self.check_learned(name)
        coder = make_coder(name, self.artifact.geometry, kv_budget=kv_budget, keep_ratio=keep_ratio, state=self.state)
        return self.coded(name, coder, kv_budget if requested is None else requested, kv_budget, keep_ratio)

    def coded(
        self,
        name: str,
        coder: Coder,
        requested: float | None = None,
        given: float | None = None,
        keep_ratio: float | None = None,
        *,
        axis: str = KV,
        key_budget: float | None = None,
    ) -> Entry:
        """A row of a rival's coder, with the fields of `Entry`."""
        # what was learned by training is one for all calibrations
        calibrated = name in RIVALS and bool(RIVALS[name].learned) and RIVALS[name].learned not in LEARNED
        number = self.calibration if calibrated else 0
        make = self._cache_maker(self.unselected, coder)
        return Entry(name, make, coder.setting, requested, given, keep_ratio, False, axis, key_budget, calibrated, number)

    def check_span(self, name: str) -> None:
        """Refuse rivals beside an artifact that codes text too, before anything is measured or written."""
        if (span := self.artifact.method.span) != "visual":
            raise UsageError(f"method {name} codes images only, but the artifact has span {span!r}; compile one with --span visual")

    def chosen(self, names: Iterable[str], budgets: Sequence[float], ratios: Sequence[float]) -> list[Entry]:
        """Each method at each setting it can take; one that takes none of those given is run once, as it is."""
        names = list(names)
        if ratios and not any(name == OURS or (name in RIVALS and "keep_ratio" in RIVALS[name].settings) for name in names):
            known = [name for name in names if name in RIVALS]
            if known:
                raise UsageError(f"{', '.join(known)} has no keep ratio; leave --keep-ratio out")
        entries = []
        for name in names:
            if name == OURS:
                if not budgets and not ratios:
                    raise UsageError("--method rotatek needs --kv-budget or --keep-ratio; the artifact's own plan is measured in any case")
                entries += [self.own_budget(budget) for budget in budgets] + [self.own(ratio) for ratio in ratios]
                continue
            if name not in RIVALS:
                raise UsageError(f"unknown --method {name!r}; choose one of {', '.join((OURS, *RIVALS))}")
            made = [self.rival(name, kv_budget=budget) for budget in budgets]
            if "keep_ratio" in RIVALS[name].settings:
                made += [self.rival(name, keep_ratio=ratio) for ratio in ratios]
            entries += made or [self.rival(name)]
        return distinct(entries)

    def suite(self, name: str) -> list[Entry]:
        """All entries of a suite, dense first; a budget that a rival cannot meet becomes the smallest it can.

        Our own method meets them all, unless the artifact is too old to have measured what its Values matter.
        """
        if name not in SUITES:
            raise UsageError(f"unknown --suite {name!r}; choose one of {', '.join(SUITES)}")
        if name == "proof":
            from .proof_suite import proof_entries

            return distinct(proof_entries(self))
        entries = [self.dense(), self.compiled()]
        if not self.artifact.method.rival:
            entries += self.own_in_suite() + [self.own(ratio) for ratio in SUITE_KEEP_RATIOS]
        for rival in RIVALS:
            entries += self.rival_in_suite(rival, SUITE_KEEP_RATIOS)
        return distinct(entries)

    def own_in_suite(self) -> list[Entry]:
        if not self.artifact.method.levels or not self.artifact.sensitivity("value"):
            said = "the artifact holds no sensitivities of Values; compile it again with this version"
            warnings.warn(f"rotatek at KV budgets is left out of the suite: {said}", stacklevel=3)
            return []
        return [self.own_budget(budget) for budget in OWN_BUDGETS]

    def rival_in_suite(self, name: str, ratios: Sequence[float] = ()) -> list[Entry]:
        """A rival at every budget of a suite; at these keep ratios too if it meets none of them. None without the file it learned."""
        if (needed := RIVALS[name].learned) in LEARNED and self.state[needed] is None:
            return []
        if RIVALS[name].learned == "energy" and self.state["energy"] is None:
            warnings.warn(f"left out of the suite: {name} {NO_ENERGY}", stacklevel=2)
            return []
        self.check_learned(name)
        try:
            least = smallest_budget(name, self.artifact.geometry, PROMISED_FROM)
        except RotateKError as error:
            warnings.warn(f"left out of the suite: {error}", stacklevel=2)
            return []
        # a method that stores Values as they are meets no budget of the suite: its keep ratios are what can be compared
        by_ratio = least > max(SUITE_BUDGETS) and "keep_ratio" in RIVALS[name].settings
        if least >= 1:
            return []  # it keeps everything: that is the dense model
        fewest = RIVALS[name].ratios(self.artifact.geometry)[0]
        entries = [self.rival(name, keep_ratio=max(ratio, fewest)) for ratio in ratios] if by_ratio else []
        # rounded up: the budget is given in decimals, and one just below the least would be refused
        least = min(math.ceil(least * 1e6) / 1e6, 1.0)
        return entries + [self.rival(name, kv_budget=max(budget, least), requested=budget) for budget in SUITE_BUDGETS]

    def check_learned(self, name: str) -> None:
        needed = RIVALS[name].learned if name in RIVALS else ""
        if needed and self.state[needed] is None:
            where = f"artifact {self.artifact.path}" if self.artifact.path else "the artifact"
            if needed in LEARNED:
                raise UsageError(
                    f"{name} needs what it learned by training; name the file with --learned, docs/rivals.md says how to make one"
                )
            if needed == "energy":
                raise UsageError(f"{name} {NO_ENERGY}, and {where} has none")
            raise UsageError(f"{name} needs measured knock-outs and {where} has none; compile it again with this version")

    def check_sight(self, coder: Coder | None) -> None:
        """Let recordings hold what a coder asks for; refuse one that this model cannot show it to, before anything is measured."""
        if isinstance(coder, BeforeRopeCoder):
            self.enabled.show_before_rope()

    def _cache_maker(self, prepared: PreparedArtifact, coder: Coder | None = None) -> Callable[[], Cache]:
        self.check_sight(coder)
        config, backend = self.enabled.model.config, self.enabled.backend
        return lambda: RotateKCache(config, prepared, backend, coder)


def _of_tokens(method: Method, setting: str) -> str:
    """A setting in words, of the tokens that stay where some are dropped."""
    if method.token_method is None:
        return setting
    return f"{selection_words(method.token_method, method.token_keep_ratio)}, of these: {setting}"


def knockouts(artifact: Artifact) -> dict[int, Tensor] | None:
    """Measured knock-outs by layer, fp32 [Hkv]; None if the artifact was compiled without."""
    found: dict[int, Any] = {i: artifact.tensors.get(f"layers.{i}.knockout") for i in artifact.geometry.compressible}
    return None if any(tensor is None for tensor in found.values()) else found


def channel_energies(artifact: Artifact) -> dict[int, Tensor] | None:
    """Score of every Key channel of the images for leank by layer, fp64 [Hkv, D]: E[q_d²] · E[k_d²]; None without a two-sided basis.

    A two-sided basis holds both moments (bases.py): M = encode encodeᵀ, C = decode diag(spectrum) decodeᵀ, the covariance within images, to
    which the squared mean is added; how the means of images vary is not known.
    """
    if artifact.method.rival is not None or artifact.method.basis != "two-sided":
        return None
    found = {}
    for i in artifact.geometry.compressible:
        prefix = f"layers.{i}.{artifact.method.kinds[0]}.key"
        if f"{prefix}_encode" not in artifact.tensors:  # of a pruned checkpoint, which has no bases
            return None
        basis, mean = artifact.basis(i, artifact.method.kinds[0], "key"), artifact.tensors[f"{prefix}_mean"].double()
        keys = (basis.decode.square() * basis.spectrum.unsqueeze(-2)).sum(-1) + mean.square()
        found[i] = basis.encode.square().sum(-1) * keys
    return found


def distinct(entries: Iterable[Entry]) -> list[Entry]:
    """Entries without those that equal an earlier one in method and setting: coders of equal settings give equal segments."""
    seen: dict[str, Entry] = {}
    for entry in entries:
        seen.setdefault(entry.label, entry)
    return list(seen.values())
