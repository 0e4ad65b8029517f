"""`--recover`: a short distillation of the pruned model from the dense one, as published, where training is wanted after all.

LoRA (Hu et al., arXiv 2106.09685) on the four projections of every text layer, cross entropy plus KL to the dense model at temperature 2
(RAP, arXiv 2602.02599: rank 8, alpha 16, dropout 0.05), on the calibration documents; merged at the end, so that nothing is left to carry.

Not as published: one document in eight is not trained on, and the adapters are those that were nearest to the dense model on these, or
none. Cross entropy on a few dozen documents learns them by heart, and a model that lost little is soon further away than before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from tqdm import tqdm

from .batches import Encoded
from .errors import RotateKError
from .geometry import Geometry
from .rap_reading import PROJECTIONS, read
from .rap_statistics import loss_of
from .rereading import decoder_layers

RANK, ALPHA, DROPOUT, TEMPERATURE = 8, 16, 0.05, 2.0
RATE = 1e-3  # peak learning rate; the paper names none
WARMUP = 0.05  # share of the steps
HELD_OUT = 8  # one document in so many says when to stop
CHECKS = 10  # times that it is asked


def recover(
    pruned: Any,
    dense: Any | None,
    documents: Sequence[Encoded],
    steps: int,
    *,
    geometry: Geometry,
    batch_size: int,
    pad_id: int,
    quiet: bool,
    rate: float = RATE,
    seed: int = 0,
) -> tuple[float, float]:
    """Train `pruned` in place for so many steps of `batch_size` documents; its weights keep their shapes and dtype.

    Args:
        pruned: a model whose text layers have narrower q, k, v and o projections.
        dense: the model it was made from; None: cross entropy alone.
        documents: calibration documents, read again and again in a random order; of eight or more the last eighth is held out.

    Returns:
        how far it was from the dense model on the held-out documents and how far it is: KL in nats per scored token (without a dense
        model their loss). It is left as it was where no step brought it nearer.

    Raises:
        RotateKError: peft is not installed, there is no document, or the loss is no number any more.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RotateKError("--recover trains adapters with the package peft: pip install peft") from error
    if not documents:
        raise RotateKError("--recover has no calibration documents to train on; pass more with --num-samples")
    held_out = list(documents[len(documents) - len(documents) // HELD_OUT :]) or list(documents)
    taught = documents[: len(documents) - len(documents) // HELD_OUT]
    names = [f"{name}.{part}" for name in _attention_names(pruned, geometry) for part in PROJECTIONS]
    before = [(p, p.requires_grad) for p in pruned.parameters()]
    was_training = pruned.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=names)
        adapted = get_peft_model(pruned, config).train()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        bar = tqdm(total=steps, desc="recovery", unit="step", disable=None if not quiet else True, leave=False)
        best = [p.detach().clone() for p in trained]
        try:
            first = nearest = _distance(adapted, dense, held_out, batch_size, geometry, pad_id)
            for step, items in zip(range(steps), _drawn(taught, batch_size, seed), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = rate * schedule(step, steps)
                loss = _loss(adapted, dense, items, geometry, pad_id)
                if not math.isfinite(float(loss.detach())):
                    raise RotateKError(f"--recover: the loss is no number any more after {step} steps; use --dtype float32 or leave it out")
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                bar.update(1)
                if (step + 1) % -(-steps // CHECKS) == 0 or step + 1 == steps:
                    now = _distance(adapted, dense, held_out, batch_size, geometry, pad_id)
                    if now < nearest:
                        nearest, best = now, [p.detach().clone() for p in trained]
        finally:
            bar.close()
            with torch.no_grad():
                for p, wanted in zip(trained, best, strict=True):
                    p.copy_(wanted)
            adapted.merge_and_unload()
            for p, wanted in before:
                p.requires_grad_(wanted)
            pruned.train(was_training)
    return first, nearest


def schedule(step: int, steps: int) -> float:
    """Share of the peak rate: a short rise, then half a cosine to nothing."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _loss(adapted: Any, dense: Any | None, items: Sequence[Encoded], geometry: Geometry, pad_id: int) -> Tensor:
    batch = read(adapted, items, geometry, pad_id, None)
    logits = adapted(**batch.inputs, logits_to_keep=batch.last).logits
    loss = loss_of(logits, batch)
    if dense is None:
        return loss
    with torch.no_grad():
        wanted = dense(**batch.inputs, logits_to_keep=batch.last).logits
    scored = batch.scored[:, -logits.shape[1] :].to(logits.device)
    ours, theirs = ((x[scored].float() / TEMPERATURE).log_softmax(-1) for x in (logits, wanted))
    return loss + TEMPERATURE**2 * kl_div(ours, theirs, reduction="batchmean", log_target=True)


@torch.no_grad()
def _distance(adapted: Any, dense: Any | None, documents: Sequence[Encoded], batch_size: int, geometry: Geometry, pad_id: int) -> float:
    """KL to the dense model, or without one the loss, per scored token."""
    training = adapted.training
    adapted.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(documents), batch_size):
        batch = read(adapted, documents[start : start + batch_size], geometry, pad_id, None)
        logits = adapted(**batch.inputs, logits_to_keep=batch.last).logits
        scored = batch.scored[:, -logits.shape[1] :].to(logits.device)
        count = int(scored.sum())
        if dense is None:
            total += float(loss_of(logits, batch)) * count
        else:
            wanted = dense(**batch.inputs, logits_to_keep=batch.last).logits
            ours, theirs = (x[scored].double().log_softmax(-1) for x in (logits, wanted))
            total += float(kl_div(ours, theirs, reduction="sum", log_target=True))
        tokens += count
    adapted.train(training)
    return total / tokens


def _drawn(documents: Sequence[Encoded], batch_size: int, seed: int) -> Iterator[list[Encoded]]:
    """Batches without end; every document once before any comes again."""
    draw = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += torch.randperm(len(documents), generator=draw).tolist()
        yield [documents[n] for n in waiting[:batch_size]]
        waiting = waiting[batch_size:]


def _attention_names(model: Any, geometry: Geometry) -> list[str]:
    """Full names of the text layers' attention modules: a vision tower may use the same short ones."""
    layers = decoder_layers(model, len(geometry.layers)) or []
    wanted: set[int] = {id(getattr(layer, "self_attn", None)) for layer in layers}
    return [name for name, module in model.named_modules() if id(module) in wanted]
