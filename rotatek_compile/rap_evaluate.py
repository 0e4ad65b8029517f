"""rotatek-eval on a pruned checkpoint: the base model and the pruned one answer the same documents.

Each with the stock cache, and where the artifact codes for the pruned model (`--method rap+rotatek`) that one with the coded cache too,
from one and the same prefill. Both are in memory at once: KL needs both models' probabilities of a document, and to keep all of one
model's would take more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, DynamicCache

from .artifact import Artifact
from .batches import Encoded
from .errors import UsageError
from .evaluate import Answered, Evaluator, Prefilled
from .methods import ARTIFACT, DENSE, Entry, Methods
from .names import OURS, RAP
from .rap_artifact import RapSection
from .runtime.cache import RotateKCache
from .runtime.enable import enable
from .runtime.recording import LayerRecord, Recording

if TYPE_CHECKING:
    from typing_extensions import Self


class PrunedCache(DynamicCache):
    """A stock cache that says that the pruned model is to answer."""


@dataclass(frozen=True, slots=True)
class BothPrefilled(Prefilled):
    """A batch after its exact part, through the base model and through the pruned one."""

    pruned: Prefilled


class PairEvaluator(Evaluator):
    """An evaluator of the base model that hands over to the pruned one where the cache is a `PrunedCache` or a coded one."""

    def __init__(self, dense: Evaluator, pruned: Any, section: RapSection | None) -> None:
        about = (dense.processor, dense.ask, dense.eos, dense.max_new_tokens)
        super().__init__(dense.model, *about)
        self.pruned, self.section = Evaluator(pruned, *about), section

    def prefill(self, items: Sequence[Encoded]) -> BothPrefilled:
        """As `Evaluator.prefill`, of both models."""
        exact = super().prefill(items)
        return BothPrefilled(exact.items, exact.chunk, exact.rest, exact.logits, exact.exact, self.pruned.prefill(items))

    def finish(self, prefilled: Prefilled, cache: Cache) -> Answered:
        """As `Evaluator.finish`, by the model that the cache is for."""
        if isinstance(cache, (PrunedCache, RotateKCache)):
            assert isinstance(prefilled, BothPrefilled)
            pruned, rap = prefilled.pruned, self.section
            if rap is not None and isinstance(cache, PrunedCache) and isinstance(pruned.exact, Recording):
                pruned = replace(pruned, exact=narrowed(pruned.exact, rap))
            return self.pruned.finish(pruned, cache)
        return super().finish(prefilled, cache)


def narrowed(recording: Recording, section: RapSection) -> Recording:
    """A recording of whole heads as the pruned model's stock cache has them: without the zeros behind the kept channels."""
    layers = []
    for recorded, wide in zip(recording.layers, section.layers, strict=True):
        if isinstance(recorded, LayerRecord):
            recorded = replace(recorded, keys=recorded.keys[..., : 2 * wide.pairs], values=recorded.values[..., : wide.value])
        layers.append(recorded)
    return replace(recording, layers=tuple(layers))


class PrunedRun:
    """What rotatek-eval asks of `enable` and of `Methods`, for an artifact of `--method rap`: two entries and no rivals.

    Args:
        evaluators: of the base model; changed in place to `PairEvaluator`.
    """

    @dataclass(frozen=True, slots=True)
    class Stock:
        """Names what attends."""

        name: str = "stock"

    def __init__(self, artifact: Artifact, evaluators: list[Evaluator], pruned: Any) -> None:
        self.artifact, self.backend = artifact, self.Stock()
        self.text = pruned.config.get_text_config(decoder=True)
        evaluators[:] = [PairEvaluator(one, pruned, artifact.rap) for one in evaluators]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def dense(self) -> Entry:
        """The base model."""
        return Entry(DENSE, lambda: DynamicCache(config=self.text))

    def compiled(self, name: str = ARTIFACT) -> Entry:
        """The pruned model."""
        assert self.artifact.rap is not None
        return Entry(name, lambda: PrunedCache(config=self.text), self.artifact.rap.words, keep_ratio=self.artifact.rap.keep_ratio)

    def entries(self, names: Sequence[str], budgets: Sequence[float], ratios: Sequence[float]) -> list[Entry]:
        """All rows; `refuse_others` has seen that nothing else is asked for."""
        return [self.dense(), self.compiled()]


class StackedRun(PrunedRun):
    """What rotatek-eval asks of `enable` and of `Methods`, for an artifact of `--method rap+rotatek`: the base, the pruned model alone,
    and the pruned model with the coded cache, perhaps at other budgets.

    Args:
        backend, fallback: as of `enable`.
    """

    def __init__(self, artifact: Artifact, evaluators: list[Evaluator], pruned: Any, backend: str, fallback: bool) -> None:
        super().__init__(artifact, evaluators, pruned)
        self.enabled = enable(pruned, artifact, backend=backend, fallback=fallback)
        self.backend = self.Stock(self.enabled.backend.name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.enabled.disable()

    def entries(self, names: Sequence[str], budgets: Sequence[float], ratios: Sequence[float]) -> list[Entry]:
        """The three rows, and our own codes at the budgets that are asked for."""
        methods, alone = Methods(self.enabled), replace(self.compiled(RAP), ours=True)  # a part of what is ours, and no rival of it
        return [self.dense(), alone, methods.compiled(), *methods.chosen(names, budgets, ratios)]


def refuse_others(artifact: Artifact, options: Mapping[str, Any]) -> None:
    """Refuse options of rotatek-eval that speak of a coded cache that the artifact has not, or that no pruned model has.

    Rivals would code the zeros behind the kept channels (`whole_heads`) as if they were Keys and Values.

    Raises:
        UsageError: naming the first.
    """
    if artifact.coded:
        where = f"{artifact.path} is a smaller checkpoint (RAP) with a cache of our own"
        for name in ("suite", "token_methods", "also", "learned"):
            if options.get(name):
                raise UsageError(f"--{name.replace('_', '-').removesuffix('s')} compares with methods that are not made for it: {where}")
        if other := [name for name in options["methods"] if name != OURS]:
            raise UsageError(f"--method {other[0]} is not made for it: {where}; compare with an artifact of the base model")
        if options["ratios"]:
            raise UsageError(f"--keep-ratio {options['ratios'][0]} cannot be chosen: {where}; use --kv-budget")
        return
    where = f"{artifact.path} is a smaller checkpoint (RAP)"
    for name in ("suite", "methods", "token_methods", "also", "learned", "no_fallback"):
        if options.get(name):
            raise UsageError(f"--{name.replace('_', '-').removesuffix('s')} speaks of a coded cache, and {where}; leave it out")
    if options["backend"] != "auto":
        raise UsageError(f"--backend {options['backend']} decodes a coded cache, and {where}; leave it out")
