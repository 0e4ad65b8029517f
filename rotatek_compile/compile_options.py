"""What `rotatek-compile` can be told; it is checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError
from .names import ALLOCATIONS, BASES, METHODS, OURS, SPANS, refuse_unknown

KEEP_RATIO = 0.25  # our own method's, where none is given


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """Everything `rotatek-compile` can be told; validated on construction.

    Raises:
        UsageError: an option out of range, or an unknown name.
    """

    model: str
    calib: str
    output: Path
    method: str = OURS  # or a rival's name (runtime/rivals/registry.py)
    keep_ratio: float | None = None  # KEEP_RATIO for our own method
    kv_budget: float | None = None  # rivals only
    basis: str = "two-sided"
    allocation: str = "allocated"
    span: str = "visual"
    window: int = 128
    num_samples: int = 64
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

    def __post_init__(self) -> None:
        refuse_unknown("method", self.method, METHODS)
        if self.method == OURS:
            if self.kv_budget is not None:
                raise UsageError(f"--kv-budget comes with a rival --method; {OURS} is set by --keep-ratio, use --keep-ratio")
            object.__setattr__(self, "keep_ratio", KEEP_RATIO if self.keep_ratio is None else self.keep_ratio)
        else:
            for name, default in (("span", "visual"), ("basis", "two-sided"), ("allocation", "allocated")):
                if (seen := getattr(self, name)) != default:
                    raise UsageError(f"--{name} {seen} comes with --method {OURS}; rivals code images, in their own way: leave it out")
        if self.kv_budget is not None and not 0 < self.kv_budget <= 1:
            raise UsageError(f"--kv-budget {self.kv_budget} is out of range; it is a fraction of the dense bytes, above 0 and up to 1")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise UsageError(f"--keep-ratio {self.keep_ratio} is out of range; it is a fraction kept, above 0 and up to 1")
        for name, least in (("window", 1), ("num_samples", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is out of range; it must be at least {least}")
        for name, allowed in (("basis", BASES), ("allocation", ALLOCATIONS), ("span", SPANS)):
            refuse_unknown(name, getattr(self, name), allowed)
