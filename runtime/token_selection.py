"""Which image tokens a cache keeps: eviction after prefill, by four published scores.

Every token was read by every layer; afterwards a share of each image's tokens stays in the cache and the rest is dropped, Keys and Values
alike. Positions are untouched, because Keys carry theirs. Published methods differ from that and from one another in where they drop, and
where they do the docstrings below say so. All of them share, here: each image keeps the same share of its tokens (published: of all image
tokens together), an even number of them and at least two.

Scores that look at queries see the newest queries of the prefill. Where the question is asked after the page was compressed (`--ask after`)
no question is there yet: the newest queries are those of the page's own last tokens, and what they look at is not what a question will.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, normalize

from ..errors import RotateKError
from ..names import SHARED_SELECTIONS
from ..token_budget import kept_tokens
from .kept_tokens import KeptSegment
from .segments import IMAGE, Run
from .vision_attention import ATTENTION

SNAPKV_QUERIES, SNAPKV_POOL = 32, 5  # observation window, and neighbours that share a score
FASTV_QUERIES = 1
FASTV_LAYER = 1  # K - 1 of the published K = 2, counted among the layers of full attention
Features = Mapping[int, Sequence[Tensor]]
"""By modality (segments.py) one tensor [tokens, hidden] per image of a call, as the encoder returned them."""

QUERIES = {"fastv": FASTV_QUERIES, "snapkv": SNAPKV_QUERIES}


# -- scores -----------------------------------------------------------------------------------------------------------------------


def attention_received(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Attention that every Key receives from the newest queries, on average: fp32 [Hkv, G, N].

    mean over w of softmax(scaling · q_w Kᵀ), where query w of W is that of Key N - W + w and sees no later one.

    Args:
        queries: [Hkv, G, W, D], newest last. keys: [Hkv, N, D] with N >= W.
    """
    newest, count = queries.shape[2], keys.shape[1]
    logits = scaling * queries.float() @ keys.float().unsqueeze(1).mT
    later = torch.ones(newest, count, dtype=torch.bool, device=keys.device).triu(count - newest + 1)
    return logits.masked_fill(later, -torch.inf).softmax(-1).mean(2)


def fastv_scores(received: Tensor) -> Tensor:
    """FastV (arXiv 2403.06764, section 4.1): attention from the last query in layer K - 1, mean over all heads. [Hkv, G, S] -> [S].

    K = 2 as published, so layer 1 decides, counted among the layers of full attention. Published: tokens are dropped in the layers from K
    on while the prompt is read, and layers below keep all of them. Here all layers drop the same tokens after prefill, because with five
    layers the first two alone would take 2/5 of the dense bytes; hidden states are exact, which only helps.
    """
    return received.mean((0, 1))


def snapkv_scores(received: Tensor) -> Tensor:
    """SnapKV (arXiv 2404.14469, section 3): attention from the newest 32 queries, summed, then pooled over 5 neighbours. -> [Hkv, S].

    Each KV head chooses for itself, by the mean over its query heads (published: one choice per query head of models without groups).
    Average pooling with zeros at the ends, as published. Published: the observation window itself always stays; text does here, too (the
    cache's raw window), but where the newest queries belong to the image its last tokens compete with the others, because 32 tokens are
    more than small budgets hold.
    """
    return avg_pool1d(received.mean(1), SNAPKV_POOL, stride=1, padding=SNAPKV_POOL // 2)


def visionzip_scores(attention: Tensor) -> Tensor:
    """VisionZip (arXiv 2412.04467, section 3): attention that a patch receives in the vision tower, as `vision_attention.py` measures it.

    Dominant tokens alone: what is left over is dropped. Published, it is merged into a few contextual tokens before the language model
    reads them; after prefill there is nothing sound to merge, since Keys of different positions are rotated differently. All of the budget
    goes to dominant tokens instead.
    """
    return attention


def divprune(embeddings: Tensor, count: int) -> Tensor:
    """DivPrune (arXiv 2503.02175, algorithm 1): greedy max-min diversity of visual embeddings [S, E]; indices [n], in order of choice.

    Distance is 1 - cosine. First the token that is farthest from its nearest neighbour, then always the one that is farthest from its
    nearest chosen token; the first of equals. Published: before the language model reads them, so it never sees the others; here it has.
    """
    unit = normalize(embeddings.float(), dim=-1)
    similarity = unit @ unit.mT
    nearest = similarity.masked_fill(torch.eye(len(unit), dtype=torch.bool, device=unit.device), -torch.inf).amax(1)
    chosen = torch.empty(count, dtype=torch.int64, device=unit.device)
    for n in range(count):
        chosen[n] = one = nearest.argmin()
        nearest = similarity[one].clone() if n == 0 else torch.maximum(nearest, similarity[one])
        nearest[chosen[: n + 1]] = torch.inf
    return chosen


def highest(scores: Tensor, count: int) -> Tensor:
    """The tokens of the highest scores [..., S]: indices [..., n], ascending; the first of equals."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values


# -- selecting --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """What a layer can show of one image: its newest queries [Hkv, G, W, D] and the Keys [Hkv, N, D] that they see, newest last.

    own: where the image's S tokens are among these Keys, as slices in order.
    """

    queries: Tensor
    keys: Tensor
    own: Sequence[slice]


class TokenSelector:
    """Decides for one cache which image tokens stay; shared by its layers.

    Args:
        layers: indices of those of full attention, at least one.

    Attributes:
        scoring: the layer whose attention decides for all; None where every layer or none does.
    """

    def __init__(self, method: str, keep_ratio: float, layers: Sequence[int]) -> None:
        self.method, self.keep_ratio, self._layers = method, keep_ratio, layers
        self.scoring = layers[min(FASTV_LAYER, len(layers) - 1)] if method == "fastv" else None
        self.held: dict[int, KeptSegment] = {}  # by row, of the image it holds: an earlier layer codes it before the scoring one is asked
        self._chosen: dict[tuple[int, int], KeptSegment] = {}  # of this call, by row and number of the image in it
        self._waiting: list[tuple[Any, tuple[Any, ...]]] = []

    def fresh(self) -> TokenSelector:
        """One like this, for a cache without tokens."""
        return TokenSelector(self.method, self.keep_ratio, self._layers)

    @property
    def queries(self) -> int:
        """How many of the newest queries the score looks at; 0 for none."""
        return QUERIES.get(self.method, 0)

    def looks(self, layer: int) -> bool:
        """Whether this layer's queries are looked at."""
        return self.queries > 0 and self.scoring in (None, layer)

    def postpone(self, layer: int, commit: Any, arguments: tuple[Any, ...]) -> bool:
        """Keep a layer's commit until the scoring layer has decided; False if it need not wait."""
        if self.scoring is None or layer >= self.scoring:
            return False
        self._waiting.append((commit, arguments))
        return True

    def decided(self, layer: int) -> None:
        """The scoring layer has looked at this call: layers that wait go on."""
        if layer == self.scoring:
            waiting, self._waiting = self._waiting, []
            for commit, arguments in waiting:
                commit(*arguments)

    def end(self, unfinished: Iterable[int]) -> None:
        """The call is over; images of these rows go on in the next one."""
        self._chosen, self._waiting = {}, []
        self.held = {row: self.held[row] for row in unfinished if row in self.held}

    def select_rows(self, rows: Iterable[int]) -> None:
        """Rows were repeated, dropped or reordered."""
        self.held = {new: self.held[old] for new, old in enumerate(rows) if old in self.held}

    def keep(
        self, row: int, number: int, run: Run | None, tokens: int, seen: Seen | None, scaling: float, features: Features
    ) -> KeptSegment:
        """Which tokens of an image stay.

        Args:
            number: of the image in its row. run: a piece of it, None for one that was held and has ended.
            tokens: S.
            seen: of this layer, if it is looked at.
            features: of the call under way.

        Raises:
            RotateKError: the score needs what this model or this way to read an image does not show.
        """
        if self.method not in SHARED_SELECTIONS:
            assert seen is not None
            return KeptSegment.of(self._by_queries(seen, tokens, scaling), tokens)
        if run is None and self.scoring is not None:
            return self.held[row]
        if (row, number) not in self._chosen:
            if self.scoring is not None:
                assert seen is not None, "the scoring layer goes first"
                indices = self._by_queries(seen, tokens, scaling)
            else:
                indices = self._by_features(_features_of(self.method, features, run, tokens), tokens).unsqueeze(0)
            self._chosen[row, number] = KeptSegment.of(indices, tokens)
        return self._chosen[row, number]

    def hold(self, row: int, tokens: int, seen: Seen | None, scaling: float) -> None:
        """An image may go on in the next call: note what would stay if it does not. Called in the layer that is looked at."""
        if self.scoring is not None and seen is not None:
            self.held[row] = KeptSegment.of(self._by_queries(seen, tokens, scaling), tokens)

    def _by_queries(self, seen: Seen, tokens: int, scaling: float) -> Tensor:
        received = attention_received(seen.queries, seen.keys, scaling)
        own = torch.cat([received[..., part] for part in seen.own], -1)
        scores = snapkv_scores(own) if self.method == "snapkv" else fastv_scores(own).unsqueeze(0)
        return highest(scores, kept_tokens(tokens, self.keep_ratio))

    def _by_features(self, features: Tensor, tokens: int) -> Tensor:
        count = kept_tokens(tokens, self.keep_ratio)
        if self.method == "divprune":
            return divprune(features.reshape(tokens, -1), count).sort().values
        attention = getattr(features, ATTENTION, None)
        if attention is None:
            raise RotateKError(
                "visionzip needs the attention of the vision tower, and the images came encoded already; pass pixels, or use another "
                "--token-method"
            )
        return highest(visionzip_scores(attention), count)


def _features_of(method: str, features: Features, run: Run | None, tokens: int) -> Tensor:
    """The encoder's output for an image of this call."""
    if run is not None:
        media = features.get(run.kind, [])
        number = run.medium - (len(features.get(IMAGE, [])) if run.kind != IMAGE else 0)  # as media.py counts them
        if 0 <= number < len(media) and media[number].numel() // media[number].shape[-1] == tokens:
            return media[number]
    raise RotateKError(
        f"{method} looks at what the vision tower made of each image, and here it is not known which image these {tokens} tokens are "
        "(images read in chunks, or a model that does not tell them apart); use --token-method snapkv or fastv"
    )
