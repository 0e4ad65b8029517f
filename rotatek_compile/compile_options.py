"""What `rotatek-compile` can be told; it is checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .names import (
    ALLOCATIONS,
    BASES,
    BITS,
    COMPILE_METHODS,
    OURS,
    RAP,
    RAP_BUDGETS,
    RAP_SCORES,
    SPANS,
    STACKED,
    check_number,
    check_selection,
    refuse_unknown,
)

if TYPE_CHECKING:
    from .artifact_config import Method

MOST_ESCAPES = 0.25  # an artifact with more is refused
KEEP_RATIO = 0.25  # our own method's, where no budget is given
RAP_KEEP_RATIO = 0.7  # of `--method rap`
CODING = (
    "kv_budget", "max_kl", "key_bits", "value_bits", "escape_ratio", "prior_tokens", "basis", "allocation", "span", "window",
    "token_keep_ratio", "token_method",
)  # fmt: skip
PRUNING = ("keep_ratio", "rap_score", "rap_budget", "repair", "recover")
"""What `--method rap+rotatek` is told for the one and for the other of its two parts."""
SENSITIVITY_SAMPLES = 36  # four of each skill of `mixed`: a head that none of them needs would look worthless


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """Everything `rotatek-compile` can be told; validated on construction.

    Raises:
        UsageError: an option out of range, or an unknown name.
    """

    model: str
    calib: str
    output: Path
    method: str = OURS  # or a rival's name (runtime/rivals/registry.py), or RAP, or STACKED
    keep_ratio: float | None = None  # KEEP_RATIO for our own method without another budget; with RAP what the weights keep
    kv_budget: float | None = None  # fraction of the dense bytes of Keys and Values
    max_kl: float | None = None  # nats per answer token
    key_bits: str | None = None  # native with a keep ratio, auto with a budget of bytes
    value_bits: str | None = None
    escape_ratio: float | None = None  # share of a segment's tokens that stay raw; None: chosen with a budget of bytes, else none
    prior_tokens: int | None = None  # what the calibrated covariance counts for in own bases, 0 for none; None: chosen, else the default
    basis: str = "two-sided"
    allocation: str = "allocated"
    span: str = "visual"
    window: int = 128
    token_keep_ratio: float | None = None  # share of each image's tokens that stay in the cache; all without it
    token_method: str | None = None  # the score that chooses them
    num_samples: int = 64
    sensitivity_samples: int | None = None  # documents on which cuts are measured; SENSITIVITY_SAMPLES, or num_samples if that is fewer
    batch_size: int = 4
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    calib_revision: str | None = None  # branch, tag or commit of calibration data on the Hub
    trust_remote_code: bool = False
    resume: bool = False
    overwrite: bool = False
    with_weights: bool = False
    quiet: bool = False
    # of --method rap and rap+rotatek (compile_rap.py)
    rap_score: str | None = None  # how pairs are ranked; logit
    rap_budget: str | None = None  # how layers share what is kept; sensitivity
    repair: bool = True  # refit what is kept in closed form
    recover: int | None = None  # steps of distillation afterwards

    def __post_init__(self) -> None:
        refuse_unknown("method", self.method, COMPILE_METHODS)
        if self.method not in (RAP, STACKED):
            self._refuse_rap_options()
        if self.method == OURS:
            self._check_budget()
        elif self.method == RAP:
            self._check_rap()
        elif self.method == STACKED:
            self._check_stacked()
        else:
            for name in ("max_kl", "key_bits", "value_bits", "escape_ratio", "prior_tokens"):
                if getattr(self, name) is not None:
                    option = name.replace("_", "-")
                    raise UsageError(
                        f"--{option} comes with --method {OURS}; rivals have their own codes: leave it out, or use --kv-budget"
                    )
            for name, default in (("span", "visual"), ("basis", "two-sided"), ("allocation", "allocated")):
                if (seen := getattr(self, name)) != default:
                    raise UsageError(f"--{name} {seen} comes with --method {OURS}; rivals code images, in their own way: leave it out")
        self._check_selection()
        for name in ("kv_budget", "keep_ratio", "max_kl", "escape_ratio"):
            check_number(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.kv_budget is not None and not 0 < self.kv_budget <= 1:
            raise UsageError(f"--kv-budget {self.kv_budget} is out of range; it is a fraction of the dense bytes, above 0 and up to 1")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise UsageError(f"--keep-ratio {self.keep_ratio} is out of range; it is a fraction kept, above 0 and up to 1")
        if self.escape_ratio is not None and not 0 <= self.escape_ratio <= MOST_ESCAPES:
            raise UsageError(
                f"--escape-ratio {self.escape_ratio:g} is out of range; it is a fraction of an image's tokens, from 0 to {MOST_ESCAPES:g}"
            )
        for name, least in (("window", 1), ("num_samples", 1), ("sensitivity_samples", 1), ("batch_size", 1), ("prior_tokens", 0)):
            if getattr(self, name) is None:
                continue
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is out of range; it must be at least {least}")
        if self.sensitivity_samples is None:
            object.__setattr__(self, "sensitivity_samples", min(SENSITIVITY_SAMPLES, self.num_samples))
        elif self.sensitivity_samples > self.num_samples:
            raise UsageError(
                f"--sensitivity-samples {self.sensitivity_samples} are more documents than --num-samples {self.num_samples}; raise that"
            )
        for name, allowed in (("basis", BASES), ("allocation", ALLOCATIONS), ("span", SPANS)):
            refuse_unknown(name, getattr(self, name), allowed)

    def _refuse_rap_options(self) -> None:
        for name, said in (("rap_score", self.rap_score), ("rap_budget", self.rap_budget), ("recover", self.recover)):
            if said is not None:
                raise UsageError(f"--{name.replace('_', '-')} {said} comes with --method {RAP}; leave it out")
        if not self.repair:
            raise UsageError(f"--no-repair comes with --method {RAP}; leave it out")

    def _check_rap(self) -> None:
        """What goes with a smaller checkpoint: a keep ratio, and nothing that speaks of a coded cache."""
        for name in ("kv_budget", "max_kl", "key_bits", "value_bits", "escape_ratio", "prior_tokens"):
            if (seen := getattr(self, name)) is not None:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} {seen} speaks of a coded cache, --method {RAP} has none: leave it out, or use --keep-ratio")
        for name, default in (("span", "visual"), ("basis", "two-sided"), ("allocation", "allocated"), ("window", 128)):
            if (seen := getattr(self, name)) != default:
                raise UsageError(f"--{name} {seen} speaks of a coded cache, --method {RAP} has none: leave it out")
        self._check_pruning()

    def _check_stacked(self) -> None:
        """A smaller checkpoint, whose keep ratio it is, and a budget of the coded cache beside it."""
        if self.kv_budget is None and self.max_kl is None:
            raise UsageError(
                f"--method {STACKED} needs --kv-budget or --max-kl for the coded cache: its --keep-ratio says what the weights keep"
            )
        self._check_pruning()
        self._check_budget(("kv_budget", "max_kl"))

    def _check_pruning(self) -> None:
        """What a smaller checkpoint is told, defaults filled in."""
        if self.with_weights:
            words = f"--method {self.method} writes weights of its own"
            raise UsageError(f"--with-weights puts the base model's weights beside an artifact; {words}")
        for name, default, known in (("rap_score", RAP_SCORES[0], RAP_SCORES), ("rap_budget", RAP_BUDGETS[0], RAP_BUDGETS)):
            chosen = default if getattr(self, name) is None else getattr(self, name)
            refuse_unknown(name.replace("_", "-"), chosen, known)
            object.__setattr__(self, name, chosen)
        if self.recover is not None and self.recover < 1:
            raise UsageError(f"--recover {self.recover} is out of range; it must be at least 1 step")
        if self.keep_ratio is None:
            object.__setattr__(self, "keep_ratio", RAP_KEEP_RATIO)

    def _check_selection(self) -> None:
        """Fewer image tokens go with images alone, and with budgets that do not measure."""
        check_selection(self.token_method, self.token_keep_ratio)
        if self.token_method is None:
            return
        if self.method == RAP:
            raise UsageError(f"--token-method {self.token_method} chooses what a cache keeps, --method {RAP} writes weights: leave it out")
        if self.span != "visual":
            raise UsageError(f"--token-method {self.token_method} comes with --span visual: --span {self.span} codes text at the same plan")
        if self.max_kl is not None:
            raise UsageError("--max-kl measures what codes cost, not what dropped tokens do; with --token-method give --kv-budget")

    def _check_budget(self, kinds: tuple[str, ...] = ("keep_ratio", "kv_budget", "max_kl")) -> None:
        """One of these budgets, and the bits that go with it."""
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) > 1:
            words = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{words} are budgets of different kinds; give one of them")
        if self.max_kl is not None and not 0 < self.max_kl < float("inf"):
            raise UsageError(f"--max-kl {self.max_kl} is out of range; it is in nats per answer token, above 0")
        by_ratio = given in ([], ["keep_ratio"])
        if by_ratio and self.keep_ratio is None:
            object.__setattr__(self, "keep_ratio", KEEP_RATIO)
        for name in ("key_bits", "value_bits"):
            if (bits := getattr(self, name)) is None:
                object.__setattr__(self, name, "native" if by_ratio else "auto")
            else:
                refuse_unknown(name.replace("_", "-"), bits, BITS)
        if by_ratio and self.value_bits == "auto":
            raise UsageError("--value-bits auto comes with --kv-budget or --max-kl; with --keep-ratio choose native, 8 or 4")

    def of_pruning(self) -> CompileOptions:
        """What `--method rap` is told of these options of `rap+rotatek`."""
        return replace(self, method=RAP, **self._unsaid(CODING))

    def of_coding(self) -> CompileOptions:
        """What our own method is told of them, for the pruned model."""
        return replace(self, method=OURS, **self._unsaid(PRUNING))

    def _unsaid(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {field.name: field.default for field in fields(self) if field.name in names}

    @property
    def chooses_coding(self) -> bool:
        """Whether escape tokens and own bases are measured: within a budget of bytes that is spent by measure.

        `paper` makes own bases as published; with a keep ratio both would come on top of the plan.
        """
        by_bytes = self.kv_budget is not None or self.max_kl is not None
        return self.method == OURS and by_bytes and self.allocation == "allocated" and self.basis != "paper"

    def own_method(self) -> Method:
        """What an artifact says of our own method: these options, before anything is measured."""
        from .artifact_config import Method

        assert self.key_bits is not None and self.value_bits is not None
        prior = self.prior_tokens if self.prior_tokens is not None else 0 if self.chooses_coding else Method().prior_tokens
        method = Method(
            basis=self.basis,
            span=self.span,
            window=self.window,
            keep_ratio=1.0 if self.keep_ratio is None else self.keep_ratio,
            allocation=self.allocation,
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            kv_budget=self.kv_budget,
            max_kl=self.max_kl,
            escape_ratio=self.escape_ratio or 0.0,
            prior_tokens=prior,
        )
        return self.selected(method)

    def selected(self, method: Method) -> Method:
        """A method on the image tokens that these options keep; its KV budget is still that of all tokens (token_budget.with_total)."""
        if self.token_method is None or self.token_keep_ratio is None:
            return method
        from .token_budget import with_selection

        return with_selection(method, self.token_method, self.token_keep_ratio)
