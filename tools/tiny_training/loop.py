"""The training loop: a schedule by wall-clock time, curriculum, checkpoints that a killed run resumes from, and a log."""

from __future__ import annotations

import csv
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlavaNextForConditionalGeneration

from .documents import CELLS, FormsComposer
from .forward import BatchedForward, Losses, tile_pages
from .packing import pack_turns

MAX_PAGES = 3
LOG_FIELDS = ("step", "seconds", "pages_per_second", "learning_rate", "pages", "loss", "auxiliary", "accuracy")


@dataclass(frozen=True, slots=True)
class Settings:
    """`seconds` is the time of the whole training, compiling included; fractions are of it."""

    seconds: float
    work: Path
    pages_per_step: int = 96
    turns: int = 12
    peak_rate: float = 1e-3
    warmup_steps: int = 300
    constant_until: float = 0.55
    curriculum_until: float = 0.30
    auxiliary_weight: float = 0.3
    clip: float = 1.0
    compile_layers: bool = True
    save_every: float = 60.0
    log_every: float = 10.0
    max_steps: int | None = None
    seed: int = 0

    def rate(self, step: int, progress: float) -> float:
        """Learning rate after `step` steps and the fraction `progress` of the time."""
        decay = min(1.0, (1.0 - progress) / (1.0 - self.constant_until))
        return self.peak_rate * min(1.0, (step + 1) / self.warmup_steps) * max(0.0, decay)

    def stage(self, progress: float) -> tuple[tuple[float, ...], tuple[int, int]]:
        """Odds of one, two and three pages, and the range of fields per page: from easy to the full distribution."""
        grown = min(1.0, progress / self.curriculum_until)
        return (1.0, grown, grown), (2 + round(2 * grown), 3 + round((CELLS - 3) * grown))


@dataclass(slots=True)
class Meter:
    """Sums of losses per page count, kept on the device so that a step never waits for the GPU."""

    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)

    def add(self, pages: int, losses: Losses) -> None:
        values = torch.stack((losses.answer, losses.auxiliary, losses.accuracy)).detach().float()
        self.sums[pages] = self.sums[pages] + values if pages in self.sums else values
        self.steps[pages] = self.steps.get(pages, 0) + 1

    def drain(self) -> dict[int, list[float]]:
        """{pages: [loss, auxiliary, accuracy]} since the last call."""
        means = {pages: (self.sums[pages] / self.steps[pages]).tolist() for pages in sorted(self.sums)}
        self.sums.clear()
        self.steps.clear()
        return means


class Trainer:
    """Trains `model` in place."""

    def __init__(self, model: LlavaNextForConditionalGeneration, settings: Settings, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.settings, self.device = settings, device
        self.composer = FormsComposer(device)
        self.forward = BatchedForward(model, compile_layers=settings.compile_layers)
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.peak_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
        self.step, self.elapsed_before = 0, 0.0
        self.random = random.Random(settings.seed)
        self.log: list[dict[str, float]] = []
        settings.work.mkdir(parents=True, exist_ok=True)

    @property
    def state_file(self) -> Path:
        return self.settings.work / "state.pt"

    def save_state(self, elapsed: float) -> None:
        """Write everything a later --resume needs; the rename makes a half-written file impossible."""
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "elapsed": elapsed, "log": self.log,
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
        self.random.seed(self.settings.seed + self.step)
        torch.manual_seed(self.settings.seed + self.step)
        print(f"resumed at step {self.step}, {self.elapsed_before:.0f} s", flush=True)

    def train_step(self, progress: float) -> tuple[int, Losses]:
        """One optimizer step on documents of one page count."""
        settings = self.settings
        odds, rows = settings.stage(progress)
        pages = self.random.choices(range(1, MAX_PAGES + 1), odds)[0]
        with torch.no_grad():
            documents = self.composer.compose(max(1, settings.pages_per_step // pages), pages, rows)
            turns = pack_turns(documents, settings.turns)
            pixels = tile_pages(documents.pages.flatten(0, 1))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses = self.forward.losses(pixels, pages, turns.tokens, turns.answer, documents.cells)
        (losses.answer + settings.auxiliary_weight * losses.auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.step, progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return pages, losses

    def run(self, started: float) -> None:
        """Train until `settings.seconds` after `started` (time.monotonic), minus what a resumed run had used."""
        settings, meter = self.settings, Meter()
        elapsed = self.elapsed_before + time.monotonic() - started
        logged, saved, logged_step = elapsed, elapsed, self.step
        while elapsed < settings.seconds and (settings.max_steps is None or self.step < settings.max_steps):
            meter.add(*self.train_step(elapsed / settings.seconds))
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
        rate = self.optimizer.param_groups[0]["lr"]
        parts = []
        for pages, (loss, auxiliary, accuracy) in meter.drain().items():
            row = (self.step, round(elapsed, 1), round(speed, 1), rate, pages, loss, auxiliary, accuracy)
            self.log.append(dict(zip(LOG_FIELDS, row, strict=True)))
            parts.append(f"{pages}p loss {loss:.4f} aux {auxiliary:.4f} acc {accuracy:.4f}")
        print(f"step {self.step} {elapsed:.0f}s {speed:.0f} pages/s lr {rate:.1e} | {' | '.join(parts)}", flush=True)

    def write_log(self, path: Path) -> None:
        """The log as CSV, one row per report and page count."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LOG_FIELDS)
            writer.writeheader()
            writer.writerows(self.log)
