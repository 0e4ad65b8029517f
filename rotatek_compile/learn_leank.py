"""The training of LeanK (arXiv 2508.02215): scales of Key channels learned through the answers, then binary masks at a ratio.

Stage 1 learns a scale s in [0, 1] for every channel of every KV head of every layer, by Adam, from s = 1, clamped after each step:

    loss = mean over answer tokens of |h(s) - h|² / hidden  +  weight · mean |s| ,

h: what the output projection is given. Stage 2 goes on from there without the second term, for one ratio: the forward pass sees the mask of
the ratio · all channels of largest s, the backward pass takes the mask for s itself (straight through). Published: 2,000 steps, rate 0.02,
weight 0.06, then 200 steps. Rounding of widths is the coder's (runtime/rivals/leank.py).

Where it differs: scales act on image tokens, which every method here codes; published are all but the first and newest tokens. Image tokens
among themselves see Keys as they are (scaled_reading.py), because images are coded after prefill; published, the whole forward pass is
scaled. Documents and answers are the calibration set's; published are synthetic retrievals of 4k to 96k tokens. Batches are put together
once. Schedules of the rate are not known to us: the first stage has it constant; the second starts at a quarter of it, falls to nothing in
a line, and of the mask it began with and up to ten on the way keeps what costs least on all batches, widths rounded. With the rate of the
first stage every scale moves by chance further than scales differ, and the mask at the end was worse than the one at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .batches import Encoded
from .errors import RotateKError, UsageError
from .geometry import Geometry
from .runtime.rivals.base import require_head_dim
from .runtime.rivals.leank import STEP, largest, lean_masks
from .runtime.rivals.leank_learned import MAX_RATIOS, LearnedScales
from .scaled_reading import Page, ScaledReader, frozen

STEPS, BINARY_STEPS, RATE, WEIGHT = 2000, 200, 0.02, 0.06  # published
BINARY_RATE = 0.005  # with 0.02 the second stage forgot what the first had learned: an error of 0.24 on tiny-qwen3-vl, from 0.0008
CHECKS = 10  # masks of the second stage that are tried on all batches, and the first
SHOWN = 20  # losses of a stage that are kept, each the mean of as many steps

Scales = dict[int, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeanOptions:
    """How to train; `ratios` are those of stage 2.

    Raises:
        UsageError: an option out of range.
    """

    ratios: tuple[float, ...] = ()
    steps: int = STEPS
    binary_steps: int = BINARY_STEPS
    rate: float = RATE
    binary_rate: float = BINARY_RATE
    weight: float = WEIGHT
    batch_size: int = 8
    seed: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, option, least in (
            ("steps", "steps", 0),
            ("binary_steps", "steps-binary", 0),
            ("batch_size", "batch-size", 1),
            ("seed", "seed", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"--{option} {getattr(self, name)} is out of range; it must be at least {least}")
        for name, option in (("rate", "lr"), ("binary_rate", "lr-binary"), ("weight", "weight")):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{option} {getattr(self, name):g} is out of range; it must be a number from 0 on")
        if len(self.ratios) > MAX_RATIOS:
            raise UsageError(f"{len(self.ratios)} --ratios are more than one file may hold; it holds {MAX_RATIOS}")
        if not all(0 < ratio <= 1 for ratio in self.ratios) or len(set(self.ratios)) < len(self.ratios):
            raise UsageError(f"--ratios {' '.join(map(str, self.ratios))} must be different shares, above 0 and at most 1")


@dataclass(slots=True)
class Losses:
    """Errors of the hidden states, each the mean of a twentieth of the steps: of stage 1, and of stage 2 by ratio."""

    first: list[float] = field(default_factory=list)
    second: dict[float, list[float]] = field(default_factory=dict)


def check_model(geometry: Geometry) -> None:
    """Refuse a model that has nothing to scale.

    Raises:
        UsageError: it reads no images, or its heads cannot have widths in steps of 32.
    """
    if geometry.text_only:
        raise UsageError(f"leank-learned scales Keys of images, and {geometry.model_type} reads text alone; choose another model")
    require_head_dim("leank-learned", geometry, lambda dim: dim % STEP == 0, f"a multiple of {STEP}")


def learn(model: Any, items: Sequence[Encoded], geometry: Geometry, options: LeanOptions) -> tuple[LearnedScales, Losses]:
    """Both stages on these documents; the model is left as it was.

    Returns:
        scales on the CPU, float32, and the losses.

    Raises:
        UsageError: as `check_model`.
        RotateKError: there is no document, none has an answer to predict after its images, or the loss is no number any more.
    """
    check_model(geometry)
    if not items:
        raise RotateKError("there are no documents to train on; pass more with --num-samples")
    with frozen(model):
        reader = ScaledReader(model, geometry)
        pages = prefilled(reader, items, options)
        losses = Losses()
        first, losses.first = first_stage(reader, pages, options)
        second = {}
        for ratio in options.ratios:
            second[ratio], losses.second[ratio] = second_stage(reader, pages, options, first, ratio)
    return LearnedScales(_on_cpu(first), {ratio: _on_cpu(scales) for ratio, scales in second.items()}), losses


def prefilled(reader: ScaledReader, items: Sequence[Encoded], options: LeanOptions) -> list[Page]:
    """All documents as batches, in a random order.

    Raises:
        RotateKError: as `learn`.
    """
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(options.seed)).tolist()
    size, pages = reader.geometry.rows_at_once(options.batch_size), []
    with tqdm(total=len(order), desc="prefill", unit="doc", disable=None if not options.quiet else True, leave=False) as bar:
        for start in range(0, len(order), size):
            batch = [items[n] for n in order[start : start + size]]
            # where nothing is read after the images, they are exact for what predicts the only answer token
            if read := [item for item in batch if len(item.prompt) > item.visual_end or len(item.answer) > 1]:
                pages.append(reader.prefill(read))
            bar.update(len(batch))
    if not pages:
        raise RotateKError("no document has an answer token that is predicted after its images; use documents with longer answers")
    return pages


def first_stage(reader: ScaledReader, pages: Sequence[Page], options: LeanOptions) -> tuple[Scales, list[float]]:
    """Scales fp32 [Hkv, D] by layer, and the errors on the way."""
    start = {i: torch.ones(shape, device=reader.cutter.device) for i, shape in _shapes(reader.geometry).items()}
    rates = [options.rate] * options.steps
    return _descend(reader, pages, options.seed, start, rates, "scales", options.quiet, lambda flat: flat, weight=options.weight)


def second_stage(
    reader: ScaledReader, pages: Sequence[Page], options: LeanOptions, first: Scales, ratio: float
) -> tuple[Scales, list[float]]:
    """As `first_stage`, from its scales, with the mask of `ratio` in their place; of all that were checked those that cost least."""
    found: list[tuple[float, Scales]] = []

    def check(scales: Scales) -> None:
        found.append((mask_error(reader, pages, scales, ratio), scales))

    steps = options.binary_steps
    rates = [options.binary_rate * (1 - step / steps) for step in range(steps)]
    words = f"mask {ratio:g}"
    _, errors = _descend(reader, pages, options.seed, first, rates, words, options.quiet, lambda flat: binary(flat, ratio), check=check)
    return min(found, key=lambda one: one[0])[1], errors


@torch.no_grad()
def mask_error(reader: ScaledReader, pages: Sequence[Page], scales: Scales, ratio: float) -> float:
    """Error of the hidden states under the mask with rounded widths that a coder would use, mean over all batches.

    Heads of width 0 have Keys of zero here; a coder leaves them the mean Key.
    """
    device = reader.cutter.device
    masks = {i: torch.zeros(scale.shape, device=device) for i, scale in scales.items()}
    for i, heads in lean_masks(reader.geometry, ratio, scales).items():
        for head, kept in enumerate(heads):
            masks[i][head, list(kept)] = 1
    return float(torch.stack([reader.error(page, masks) for page in pages]).mean())


def binary(flat: Tensor, ratio: float) -> Tensor:
    """1 for the ratio · N largest of N numbers, 0 for the rest, with the gradient of the numbers themselves."""
    (kept,) = largest([flat.detach()], int(ratio * flat.numel() + 1e-6))
    return kept.to(flat) + (flat - flat.detach())


def _descend(
    reader: ScaledReader,
    pages: Sequence[Page],
    seed: int,
    start: Scales,
    rates: Sequence[float],
    words: str,
    quiet: bool,
    seen: Callable[[Tensor], Tensor],
    *,
    weight: float = 0.0,
    check: Callable[[Scales], None] = lambda scales: None,
) -> tuple[Scales, list[float]]:
    """Adam on the loss, a step at each of `rates`.

    Args:
        seen: makes what the Keys are multiplied with of all scales in one row.
        check: is shown the scales before the first step and `CHECKS` times on the way, the last after all steps.
    """
    steps = len(rates)
    check({i: scale.clone() for i, scale in start.items()})
    flat = torch.cat([scale.flatten() for scale in start.values()]).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([flat], lr=RATE)
    errors: list[Tensor] = []
    with tqdm(total=steps, desc=words, unit="step", disable=None if not quiet else True, leave=False) as bar:
        for step, page in zip(range(steps), _drawn(pages, seed), strict=False):
            optimizer.param_groups[0]["lr"] = rates[step]
            error = reader.error(page, _by_layer(seen(flat), start))
            loss = error + weight * flat.abs().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                flat.clamp_(0, 1)
            if (step + 1) % -(-steps // CHECKS) == 0 or step + 1 == steps:
                check({i: scale.clone() for i, scale in _by_layer(flat.detach(), start).items()})
            errors.append(error.detach())  # asked for below, so that a GPU is not waited for in every step
            bar.update(1)
            if step % max(1, steps // SHOWN) == 0:
                if not math.isfinite(float(loss.detach())):
                    raise RotateKError(
                        f"{words}: the loss is no number any more after {step + 1} steps; use --dtype float32 or a lower --lr"
                    )
                bar.set_postfix(error=f"{float(error.detach()):.3g}", scale=f"{float(flat.detach().mean()):.3f}")
    if errors and not bool(flat.detach().isfinite().all()):
        raise RotateKError(f"{words}: scales are no numbers any more after {steps} steps; use --dtype float32 or a lower --lr")
    shown = [float(part.mean()) for part in torch.stack(errors).tensor_split(min(SHOWN, len(errors)))] if errors else []
    return {i: scale.clone() for i, scale in _by_layer(flat.detach(), start).items()}, shown


def _drawn(pages: Sequence[Page], seed: int) -> Iterator[Page]:
    """Without end; every batch once before any comes again."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        for number in torch.randperm(len(pages), generator=draw).tolist():
            yield pages[number]


def _by_layer(flat: Tensor, like: Scales) -> Scales:
    parts = flat.split([scale.numel() for scale in like.values()])
    return {i: part.view_as(scale) for (i, scale), part in zip(like.items(), parts, strict=True)}


def _shapes(geometry: Geometry) -> dict[int, tuple[int, int]]:
    return {i: (geometry.layers[i].kv_heads, geometry.layers[i].head_dim) for i in geometry.compressible}


def _on_cpu(scales: Scales) -> Scales:
    return {i: scale.float().cpu() for i, scale in scales.items()}
