"""The training loop: a schedule by wall-clock time, curriculum, routed reading, checkpoints that a killed run resumes from, and a log."""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import routing
from .bundled import bundled
from .documents import Batch, DocumentStream, Vocabulary, stream_batches
from .forward import Losses
from .rendering import Renderer

SHORTEST = 1e-9  # of a phase whose length is a divisor


@dataclass(frozen=True, slots=True)
class Settings:
    """`seconds` is the time of the whole training, compiling included; fractions are of it."""

    seconds: float
    work: Path
    pages_per_step: int = 96
    length: int = 512  # text tokens behind the pages
    peak_rate: float = 1e-3
    warmup_steps: int = 300
    constant_until: float = 0.55
    curriculum_until: float = 0.30
    auxiliary_weight: float = 0.3
    clip: float = 1.0
    look_away: float = 0.0  # weight of the penalty on reading through pairs of other skills (routing.py); 0 for plain training
    routed: float = 0.0  # share of documents in which other pairs cannot see pages
    route_at: float = 0.93  # both begin when token accuracy passes this, and grow for `route_ramp` seconds
    route_ramp: float = 60.0
    rest_from: int = 0  # layer from which on answers are continued, before which they are begun; 0 for no such division
    unroute_from: float = 0.8  # from here on that share falls to nothing at the end
    workers: int = 8
    compile_layers: bool = True
    save_every: float = 120.0
    log_every: float = 10.0
    max_steps: int | None = None
    seed: int = 0

    def rate(self, step: int, progress: float) -> float:
        """Learning rate after `step` steps and the fraction `progress` of the time."""
        decay = min(1.0, (1.0 - progress) / max(SHORTEST, 1.0 - self.constant_until))
        return self.peak_rate * min(1.0, (step + 1) / self.warmup_steps) * max(0.0, decay)

    def strength(self, since: float) -> float:
        """How far assigned reading is in force, 0 to 1, `since` seconds after it began (negative: not yet)."""
        return min(1.0, max(0.0, since / max(SHORTEST, self.route_ramp)))

    def routed_share(self, strength: float, progress: float) -> float:
        """Share of routed documents at a fraction of the time."""
        return self.routed * strength * min(1.0, (1 - progress) / max(SHORTEST, 1 - self.unroute_from))


class Meter:
    """Sums since the last report, kept on the device so that a step never waits for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._clear()

    def _clear(self) -> None:
        self.losses, self.steps = torch.zeros(3, device=self.device), 0
        self.hits, self.tokens = torch.zeros(2, len(bundled.SKILLS), device=self.device).unbind()

    def add(self, batch: Batch, losses: Losses, looking: torch.Tensor) -> None:
        self.losses += torch.stack((losses.answer, losses.auxiliary, looking)).detach().float()
        self.steps += 1
        skill = torch.where(batch.answer, batch.slot // 2, 0)
        self.tokens.index_add_(0, skill.flatten(), batch.answer.flatten().float())
        self.hits.index_add_(0, skill.flatten(), (losses.hit & batch.answer).flatten().float())

    def drain(self) -> dict[str, float]:
        """Mean losses, and token accuracy over all answers and per skill; starts anew."""
        loss, auxiliary, looking = (self.losses / max(self.steps, 1)).tolist()
        hits, tokens = self.hits.tolist(), self.tokens.tolist()
        skills = {skill: h / max(t, 1) for skill, h, t in zip(bundled.SKILLS, hits, tokens, strict=True)}
        self._clear()
        return {"loss": loss, "auxiliary": auxiliary, "looking": looking, "accuracy": sum(hits) / max(sum(tokens), 1)} | skills


class Trainer:
    """Trains `model` in place.

    Args:
        forward: the family's BatchedForward of that model.
        prepare: its pages uint8 [N, H, W] to pixel values.
        vocabulary: its token ids.
    """

    def __init__(self, model: Any, forward: Any, prepare: Any, vocabulary: Vocabulary, settings: Settings, device: torch.device) -> None:
        self.model, self.forward, self.prepare = model.train(), forward, prepare
        self.settings, self.device = settings, device
        self.renderer = Renderer(device)
        self.stream = DocumentStream(settings.seed, settings.pages_per_step, settings.length, vocabulary)
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.peak_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
        self.step, self.elapsed_before = 0, 0.0
        self.log: list[dict[str, float]] = []
        self.router, self.route_from = None, float("inf")  # seconds at which assigned reading began
        if settings.routed or settings.look_away:
            text = model.config.get_text_config()
            self.router = routing.Router(bundled.SKILLS, text.num_hidden_layers, text.num_key_value_heads, settings.rest_from, device)
            routing.register()
            text._attn_implementation = routing.NAME
        settings.work.mkdir(parents=True, exist_ok=True)

    @property
    def state_file(self) -> Path:
        return self.settings.work / "state.pt"

    def save_state(self, elapsed: float) -> None:
        """Write everything a later --resume needs; the rename makes a half-written file impossible."""
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "elapsed": elapsed, "log": self.log, "route_from": self.route_from,
        }  # fmt: skip
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state_file)

    def resume(self) -> None:
        """Go on from the state in the work folder, if there is one; data is drawn anew."""
        if not self.state_file.exists():
            return
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_before, self.log = state["step"], state["elapsed"], state["log"]
        self.route_from = state["route_from"]
        torch.manual_seed(self.settings.seed + self.step)
        self.stream.name += f"/resumed at {self.step}"
        print(f"resumed at step {self.step}, {self.elapsed_before:.0f} s", flush=True)

    def train_step(self, batch: Batch, elapsed: float) -> tuple[Losses, torch.Tensor]:
        """One optimizer step; returns its losses, and the attention that pairs of other skills pay to pages."""
        settings, pages, progress = self.settings, batch.cells.shape[1], elapsed / self.settings.seconds
        strength = settings.strength(elapsed - self.route_from)
        paid = torch.zeros((), device=self.device)
        with torch.no_grad():
            pixels = self.prepare(self.renderer.draw(batch.cells.flatten(0, 1)))
            others, weights, reading = self._reading(batch, settings.routed_share(strength, progress))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses = self.forward.losses(pixels, pages, batch.tokens, batch.answer, batch.cells, reading)
        loss = losses.answer + settings.auxiliary_weight * losses.auxiliary
        if others is not None:
            paid = routing.looking(losses.masses, others, weights)
            loss = loss + settings.look_away * strength * paid
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.step, progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses, paid

    def _reading(self, batch: Batch, share: float) -> tuple[torch.Tensor | None, torch.Tensor | None, list[dict[str, torch.Tensor]]]:
        """Which heads are not a token's own, what tokens weigh, and what every layer's attention is told; nothing for plain training."""
        if self.router is None:
            return None, None, []
        columns = self.forward.page_columns(batch.cells.shape[1])
        before = columns[-1].stop + self.forward.after_page
        visual = torch.zeros(before + batch.tokens.shape[1], device=self.device)
        for page in columns:
            visual[page] = 1.0
        others = self.router.others(batch.slot, before)
        routed = (torch.rand(batch.tokens.shape[0], device=self.device) < share)[:, None, None]
        reading = [{"blocked": other & routed, "visual": visual} for other in others]
        return others, self.router.weights(batch.slot, before), reading

    def run(self, started: float) -> None:
        """Train until `settings.seconds` after `started` (time.monotonic), minus what a resumed run had used."""
        settings, meter = self.settings, Meter(self.device)
        elapsed = self.elapsed_before + time.monotonic() - started
        logged, saved, logged_step = elapsed, elapsed, self.step
        batches = stream_batches(self.stream, settings.workers)
        while elapsed < settings.seconds and (settings.max_steps is None or self.step < settings.max_steps):
            progress = elapsed / settings.seconds
            self.stream.progress.fill_(min(1.0, progress / max(SHORTEST, settings.curriculum_until)))
            batch = next(batches).to(self.device)
            meter.add(batch, *self.train_step(batch, elapsed))
            # Without waiting now and then the CPU would run ahead of the GPU, and the clock would mean nothing.
            if self.device.type == "cuda" and self.step % 8 == 0:
                torch.cuda.synchronize()
            elapsed = self.elapsed_before + time.monotonic() - started
            if elapsed - logged >= settings.log_every:
                self._report(meter, elapsed, (self.step - logged_step) * settings.pages_per_step / (elapsed - logged))
                logged, logged_step = elapsed, self.step
            if elapsed - saved >= settings.save_every:
                self.save_state(elapsed)
                saved = elapsed
        if self.step > logged_step:
            self._report(meter, elapsed, (self.step - logged_step) * settings.pages_per_step / max(elapsed - logged, 1e-9))
        self.save_state(elapsed)

    def _report(self, meter: Meter, elapsed: float, speed: float) -> None:
        measured = meter.drain()
        if self.route_from == float("inf") and measured["accuracy"] >= self.settings.route_at:
            self.route_from = elapsed
        row = {"step": self.step, "seconds": round(elapsed, 1), "pages_per_second": round(speed, 1),
               "learning_rate": self.optimizer.param_groups[0]["lr"]} | measured  # fmt: skip
        self.log.append(row)
        skills = " ".join(f"{skill} {row[skill]:.3f}" for skill in bundled.SKILLS)
        losses = f"loss {row['loss']:.4f} aux {row['auxiliary']:.3f} look {row['looking']:.4f} acc {row['accuracy']:.4f}"
        print(f"{self.step} {elapsed:.0f}s {speed:.0f}p/s {losses} | {skills}", flush=True)

    def write_log(self, path: Path) -> None:
        """The log as CSV, one row per report."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.log[0]) if self.log else ["step"])
            writer.writeheader()
            writer.writerows(self.log)
