"""How bench_steps.py times one step of a model over each kind of cache: clocks, a time box, and the loops."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from step_caches import DENSE, FixedLayer, artifact_of, dense_attention, fill_many, fill_ours, random_kv, with_text
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LogitsProcessor, StaticCache
from transformers.cache_utils import Cache

from rotatek_compile.geometry import geometry_of
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.recorder import CudaRecorder
from rotatek_compile.text_attention import attended_by

WARM = 12
CODED_ROWS = 4  # of the largest batch


def timed(step: Callable[[int], Any], device: torch.device, steps: int, warm: int = WARM) -> float:
    """Seconds of a step, mean over `steps` after `warm` others; `step` is told its number."""
    for number in range(warm):
        step(number)
    start = now(device)
    for number in range(warm, warm + steps):
        step(number)
    return (now(device) - start) / steps


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(LogitsProcessor):
    """Reads the clock in a loop of transformers, after `warm` steps and after `steps` more."""

    def __init__(self, device: torch.device, warm: int, steps: int) -> None:
        self.device, self.at, self.calls, self.read = device, (warm, warm + steps), 0, [0.0, 0.0]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.calls in self.at:
            self.read[self.at.index(self.calls)] = now(self.device)
        self.calls += 1
        return scores


class TooLongError(Exception):
    """A time box is over."""


class NotCapturedError(RuntimeError):
    """A row that is to be captured was not; at the largest batch because there was no room for the stretch."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TooLongError inside when the time is over (main thread only)."""

    def ended(number: int, frame: Any) -> None:
        raise TooLongError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ended)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Bench:
    """One model, its caches filled with `tokens` tokens in each of `batch` rows."""

    def __init__(self, model: Any, batch: int, tokens: int, steps: int) -> None:
        self.model, self.batch, self.tokens, self.steps = model, batch, tokens, steps
        self.geometry = geometry_of(model.config)
        self.like = next(model.parameters())
        self.device = self.like.device
        self.ids = torch.randint(10, 30000, (batch, 1), device=self.device)

    def clock(self, step: Callable[[int], Any], steps: int, warm: int = WARM) -> float:
        """As `timed`; every loop but that of transformers' `generate` is measured here."""
        return timed(step, self.device, steps, warm)

    def call(self, cache: Any, number: int) -> Any:
        """One step as `generate` asks for it, the next token chosen on the device."""
        places = torch.full((self.batch, 1), self.tokens + number, device=self.device)
        logits = self.model(input_ids=self.ids, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        self.ids = logits[:, -1].argmax(-1, keepdim=True)

    def stock(self) -> tuple[float, int]:
        """Seconds of a step and bytes of the cache."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        for index in range(len(self.geometry.layers)):
            cache.update(*random_kv(self.geometry, index, self.batch, self.tokens, self.like), index)
        seconds = self.clock(lambda number: self.call(cache, number), self.steps // 2, warm=4)
        return seconds, cache_bytes(cache).stored

    def static(self, compile_seconds: float) -> tuple[float, int]:
        """The steps of `generate` itself, which compiles them on a GPU; `compile_seconds` bounds all of it."""
        warm, steps = 6, self.steps // 2
        most = warm + steps + 1
        cache = StaticCache(config=self.model.config.get_text_config(), max_cache_len=self.tokens + most + 1)
        for index in range(len(self.geometry.layers)):
            cache.update(*random_kv(self.geometry, index, self.batch, self.tokens, self.like), index)
        clock = Clock(self.device, warm, steps)
        ids = torch.randint(10, 30000, (self.batch, self.tokens + 1), device=self.device)  # the last one is read, the others are stored
        options = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False, "logits_processor": [clock]}
        try:
            with at_most(compile_seconds):
                self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        finally:
            self.model.__dict__.pop("_compiled_call", None)
            torch.compiler.reset()
        return (clock.read[1] - clock.read[0]) / steps, cache_bytes(cache).stored

    def dense(self) -> tuple[float, int]:
        """The faster of two attention kernels, which get no mask: every token is seen. Captured on a GPU."""
        filled = [FixedLayer(*random_kv(self.geometry, i, self.batch, self.tokens, self.like)) for i in range(len(self.geometry.layers))]
        cache = Cache(layers=filled)
        places = torch.full((self.batch, 1), self.tokens, device=self.device)
        given = {"position_ids": places, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        found = []

        def step(ids: torch.Tensor) -> None:
            ids.copy_(self.model(input_ids=ids, **given).logits[:, -1].argmax(-1, keepdim=True))

        with attended_by(self.model, DENSE, dense_attention, masked=False):
            if self.device.type != "cuda":
                return self.clock(lambda number: step(self.ids), self.steps), cache_bytes(cache).stored
            for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                with sdpa_kernel(kernel):
                    for _ in range(3):
                        step(self.ids)
                    torch.cuda.synchronize()
                    recorder = CudaRecorder(self.device)
                    recorder.record(partial(step, self.ids.clone()))
                found.append(self.clock(lambda number, one=recorder: one.replay(), self.steps))
                del recorder
        return min(found), cache_bytes(cache).stored

    def ours(self, plan: tuple[Any, Any], graphs: bool, copied: bool = False, span: str = "visual") -> tuple[float, int]:
        """Through `enable`; `copied` codes `CODED_ROWS` rows and writes them out for the batch, a multiple of these."""
        artifact = artifact_of(self.geometry, Slabs(*plan[0]), Slabs(*plan[1]))
        with enable(self.model, with_text(artifact) if span == "all" else artifact, graphs=graphs) as enabled:
            cache = enabled.new_cache()
            if copied:
                fill_many(cache, self.geometry, self.batch, self.tokens, self.like, CODED_ROWS)
            else:
                fill_ours(cache, self.geometry, self.batch, self.tokens, self.like)
            seconds = self.clock(lambda number: self.call(cache, number), self.steps)
            held = cache_bytes(cache).stored  # afterwards: a captured stretch makes room
            if graphs and self.device.type == "cuda" and not any(h.captured for h in enabled.graphs.histories.values()):
                raise NotCapturedError("nothing was captured")
        return seconds, int(held)
