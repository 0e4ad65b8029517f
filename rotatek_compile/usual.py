"""How far single calibration documents stray from the mean of all: what is still usual, and from where on a page is unlike them.

Moments say what a plan discards on average, and nothing of how much documents differ. So the segments of those calibration documents that
are prefilled anyway (cutter.py) are compared with the calibrated spectra, one by one:

- *Tail ratio*: the energy that a segment has beyond the first r directions over what calibration expects there, the largest of all
  segments, for every r. *Code ratio*: likewise the error of 4-bit codes of these directions, which grows where a page has few strong tokens
  among many weak ones. A head falls back when it discards more than such segments do (runtime/rounding_error.py).
- *Angle* between a segment's Values and the leading half of their directions, its mean and standard deviation over segments. A page whose
  angles are unlike that in the root mean square over all heads is unlike the calibration documents (runtime/monitor.py). Values, because
  Keys also change with the place of a page in the prompt; half, because what a head was not calibrated on shows where it has little energy.
  No plan takes part in it, so that it holds for every budget.

All energies are those of whitened coordinates (bases.py), about the segment's own mean for images, about the calibrated mean for text, as
they are coded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .coding_error import ROUNDING
from .geometry import Geometry
from .kernels.codes import scales_and_errors
from .parallel import Processes
from .plan import SIDES

if TYPE_CHECKING:
    from .bases import Basis
    from .cutter import Prefilled
    from .moments import Moments

FACTOR = 2.0
"""`Method.fallback_factor` where these ratios are known. Of 126 unseen images of the bundled data none discarded more than 1.08 times what
90 calibration images do at most, in any of 40 heads. The same pages behind 300 tokens of text discard more than 1.5 times as much in a
tenth of the heads, more than twice in one of a hundred: a smaller factor would spend bytes wherever a page stands elsewhere."""
UNKNOWN_FACTOR = 8.0  # what a head may discard over the mean where nothing is known of single documents
FEWEST = 8  # documents, below which nothing is said of what is usual
SHORT = 0.1  # of the images are shorter than those that a budget is planned for (planning.py)
TOKENS = 64  # shorter images say little about angles; text is compared in blocks of so many
MARGIN = 1.1  # over the largest deviation of a calibration document from all others, and over 1 where they are all alike
LARGEST_RATIO = 1e9  # where calibration found next to nothing, ratios say nothing
LEAST_SPREAD = 0.1  # of an angle, as a share of its mean
ROUNDED = 0.25  # angles below this share of a step of the compute dtype (radians) are made of rounding errors, and not looked at
SAMPLED = 128  # tokens of a segment whose 4-bit codes are looked at


def leading_angles(energy: np.ndarray) -> np.ndarray:
    """Degrees between segments and the leading half of their directions, acos √(share of the energy there): [..., D] -> [...]."""
    total = energy.sum(-1)
    share = np.divide(energy[..., : energy.shape[-1] // 2].sum(-1), total, out=np.ones_like(total), where=total > 0)
    found: np.ndarray = np.degrees(np.arccos(np.sqrt(share.clip(0, 1))))
    return found


def tail_ratios(energy: Tensor, spectrum: Tensor) -> Tensor:
    """Energy beyond the first r directions over the expected one, r = 0 .. D-1: [..., D] each -> [..., D]; 1 where there is none."""
    seen, expected = (x.flip(-1).cumsum(-1).flip(-1) for x in (energy.double(), spectrum.double()))
    floor = 1e-9 * expected[..., :1].clamp_min(1e-30)  # below it both are rounding
    return (seen + floor) / (expected + floor)


class UsualSegments:
    """What the segments of prefilled documents show; a document counts once, however often it is prefilled.

    Args:
        bases: by token kind, side and layer.
    """

    def __init__(self, geometry: Geometry, moments: Moments, bases: Mapping[str, Mapping[str, Mapping[int, Basis]]]) -> None:
        self.geometry, self.moments, self.bases = geometry, moments, bases
        self.largest: dict[str, Tensor] = {}  # by `layers.{i}.{kind}.{side}`, tail and code ratios fp64 [2, Hkv, D] on the layer's device
        self.angles: dict[str, list[Tensor]] = {}  # by document, of each of its images: [layers · Hkv]
        self.lengths: list[int] = []  # tokens of every image
        self._encode: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._seen: set[str] = set()

    @torch.inference_mode()
    def see(self, doc: Prefilled) -> None:
        """Compare the segments of a prefilled batch."""
        from .recoding import runs_of

        images = doc.images.cpu()
        text = doc.prefix.mask.bool().cpu() & ~images.any(-1)
        runs = {"visual": runs_of(images), "text": _blocks(text)}
        new = {row for row, item in enumerate(doc.items) if item.sample.id not in self._seen}
        self._seen |= {doc.items[row].sample.id for row in new}
        self.lengths += [end - start for row, start, end in runs["visual"] if row in new]
        for kind in self.bases:
            for row, start, end in runs[kind]:
                if row in new and end - start > 1:
                    self._compare(doc, kind, row, slice(start, end))

    def _compare(self, doc: Prefilled, kind: str, row: int, columns: slice) -> None:
        energies = []
        for i in self.geometry.compressible:
            layer = doc.cache.layers[i]
            for side, x in zip(SIDES, (layer.keys, layer.values), strict=True):
                name = f"layers.{i}.{kind}.{side}"
                energy, errors = self._measured(name, i, kind, side, x[row, :, columns].float())
                spectrum = self._encode[name][1]
                ratio = tail_ratios(torch.stack([energy, errors]), torch.stack([spectrum, ROUNDING[4] * spectrum]))
                self.largest[name] = torch.maximum(self.largest[name], ratio) if name in self.largest else ratio
                energies += [energy] if side == "value" else []
        if kind == "visual" and columns.stop - columns.start >= TOKENS:
            angles = [torch.from_numpy(leading_angles(energy.double().cpu().numpy())) for energy in energies]
            self.angles.setdefault(doc.items[row].sample.id, []).append(torch.cat(angles))

    def _measured(self, name: str, layer: int, kind: str, side: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and error of 4-bit codes of each direction per token: x [Hkv, S, D] -> [Hkv, D] each."""
        if name not in self._encode:
            basis = self.bases[kind][side][layer]
            mean = self.moments.mean(layer, kind, side)
            self._encode[name] = basis.encode.to(x), basis.spectrum.to(x.device), mean.to(x)
        encode, _, mean = self._encode[name]
        centre = x.mean(1) if kind == "visual" else mean
        z = (x - centre.unsqueeze(1)) @ encode
        return z.square().mean(1), scales_and_errors(z[:, :: -(-z.shape[1] // SAMPLED)], 4)[1]

    def image_tokens(self, together: Processes | None = None) -> int | None:
        """Tokens that nine images in ten have at least; None where there are none."""
        lengths = [tokens for part in (together or Processes()).gather(self.lengths) for tokens in part]
        return int(np.quantile(lengths, SHORT)) if lengths else None

    def tensors(self, together: Processes | None = None) -> tuple[dict[str, Tensor], float | None]:
        """Tensors of the artifact (artifact.py) and the largest usual deviation, from what all processes saw.

        Nothing with fewer than `FEWEST` documents; no angles and None with fewer that have an image. Where no segment of a kind was seen,
        ratios are such that the fallback does as without them.
        """
        together = together or Processes()
        parts = together.gather(({name: x.cpu() for name, x in self.largest.items()}, self.angles, self._seen))
        if len(set().union(*(seen for _, _, seen in parts))) < FEWEST:
            return {}, None
        found: dict[str, Tensor] = {}
        for i in self.geometry.compressible:
            shape = self.geometry.layers[i].kv_heads, self.geometry.layers[i].head_dim
            for name in (f"layers.{i}.{kind}.{side}" for kind in self.bases for side in SIDES):
                ratios = [largest[name] for largest, _, _ in parts if name in largest]
                known = torch.stack(ratios).amax(0).clamp(1, LARGEST_RATIO) if ratios else torch.full((2, *shape), UNKNOWN_FACTOR / FACTOR)
                found[f"{name}_tail_ratio"], found[f"{name}_code_ratio"] = known.float()
        documents = [torch.stack(images).numpy() for _, angles, _ in parts for images in angles.values()]
        if len(documents) < FEWEST:
            return found, None
        stacked = np.concatenate(documents)
        usual = torch.from_numpy(np.stack([stacked.mean(0), spread(stacked)], -1)).float()
        heads = [self.geometry.layers[i].kv_heads for i in self.geometry.compressible]
        names = [f"layers.{i}.visual.value_angle" for i in self.geometry.compressible]
        return found | dict(zip(names, usual.split(heads), strict=True)), MARGIN * max(largest_deviation(documents), 1.0)


def spread(angles: np.ndarray) -> np.ndarray:
    """Standard deviation of angles [N, F] over N, not below `LEAST_SPREAD`."""
    least: np.ndarray = np.maximum(angles.std(0), LEAST_SPREAD * angles.mean(0)).clip(1e-6)
    return least


def legible(angles: np.ndarray, eps: float) -> np.ndarray:
    """Means and deviations of angles [..., 2] for a compute dtype with this step: infinite deviations where it hides the angle."""
    found = angles.copy()
    found[..., 1][found[..., 0] < np.degrees(ROUNDED * eps)] = np.inf
    return found


def deviations(angles: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Root mean square over F heads of how many standard deviations angles [N, F] are off: [N]."""
    found: np.ndarray = np.sqrt((((angles - mean) / deviation) ** 2).mean(-1))
    return found


def largest_deviation(documents: list[np.ndarray]) -> float:
    """The largest deviation of an image from those of all other documents; angles [images, F] of each document.

    From the others, because a document is like a mean that it is part of.
    """
    largest = 0.0
    for n, own in enumerate(documents):
        others = np.concatenate(documents[:n] + documents[n + 1 :])
        largest = max(largest, float(deviations(own, others.mean(0), spread(others)).max()))
    return largest


def _blocks(text: Tensor) -> list[tuple[int, int, int]]:
    """Whole blocks of `TOKENS` within the runs of true columns of bool [B, T], as row, first column, column after the last."""
    found = []
    for row, columns in enumerate(text):
        edges = torch.nn.functional.pad(columns.int(), (1, 1)).diff()
        for start, end in zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True):
            found += [(row, at, at + TOKENS) for at in range(start, end - TOKENS + 1, TOKENS)]
    return found
