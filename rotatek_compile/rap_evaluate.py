"""rotatek-eval on a pruned checkpoint: the base model and the pruned one answer the same documents, each with the stock cache.

Both are in memory at once: KL needs both models' probabilities of a document, and to keep all of one model's would take more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, DynamicCache

from .artifact import Artifact
from .batches import Encoded
from .errors import UsageError
from .evaluate import Answered, Evaluator, Prefilled
from .methods import ARTIFACT, DENSE, Entry

if TYPE_CHECKING:
    from typing_extensions import Self


class PrunedCache(DynamicCache):
    """A stock cache that says that the pruned model is to answer."""


@dataclass(frozen=True, slots=True)
class BothPrefilled(Prefilled):
    """A batch after its exact part, through the base model and through the pruned one."""

    pruned: Prefilled


class PairEvaluator(Evaluator):
    """An evaluator of the base model that hands over to the pruned one where the cache is a `PrunedCache`."""

    def __init__(self, dense: Evaluator, pruned: Any) -> None:
        about = (dense.processor, dense.ask, dense.eos, dense.max_new_tokens)
        super().__init__(dense.model, *about)
        self.pruned = Evaluator(pruned, *about)

    def prefill(self, items: Sequence[Encoded]) -> BothPrefilled:
        """As `Evaluator.prefill`, of both models."""
        exact = super().prefill(items)
        return BothPrefilled(exact.items, exact.chunk, exact.rest, exact.logits, exact.exact, self.pruned.prefill(items))

    def finish(self, prefilled: Prefilled, cache: Cache) -> Answered:
        """As `Evaluator.finish`, by the model that the cache is for."""
        if isinstance(cache, PrunedCache):
            assert isinstance(prefilled, BothPrefilled)
            return self.pruned.finish(prefilled.pruned, cache)
        return super().finish(prefilled, cache)


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
        evaluators[:] = [PairEvaluator(one, pruned) for one in evaluators]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def dense(self) -> Entry:
        """The base model."""
        return Entry(DENSE, lambda: DynamicCache(config=self.text))

    def compiled(self) -> Entry:
        """The pruned model."""
        assert self.artifact.rap is not None
        return Entry(ARTIFACT, lambda: PrunedCache(config=self.text), self.artifact.rap.words, keep_ratio=self.artifact.rap.keep_ratio)


def refuse_others(artifact: Artifact, options: Mapping[str, Any]) -> None:
    """Refuse options of rotatek-eval that speak of a coded cache.

    Raises:
        UsageError: naming the first.
    """
    where = f"{artifact.path} is a smaller checkpoint (RAP)"
    for name in ("suite", "methods", "token_methods", "also", "no_fallback"):
        if options.get(name):
            raise UsageError(f"--{name.replace('_', '-').removesuffix('s')} speaks of a coded cache, and {where}; leave it out")
    if options["backend"] != "auto":
        raise UsageError(f"--backend {options['backend']} decodes a coded cache, and {where}; leave it out")
