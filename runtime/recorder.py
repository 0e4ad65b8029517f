"""What captures a decoding step and runs it again (graphs.py)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """What captures a step and runs it again."""

    def record(self, step: Callable[[], Any]) -> Any:
        """Capture `step`, which is not run by it; what it returns stays where replays write."""

    def replay(self) -> None:
        """Run what was recorded."""


class CudaRecorder:
    """A CUDA graph. `pool`: memory of an earlier one that is not replayed any more."""

    def __init__(self, device: torch.device, earlier: CudaRecorder | None = None) -> None:
        self.device, self.graph = device, torch.cuda.CUDAGraph()
        self.pool: Any = earlier.pool if earlier is not None else torch.cuda.graph_pool_handle()

    def record(self, step: Callable[[], Any]) -> Any:
        """See `Recorder`. Python must not collect garbage meanwhile: freeing another graph would end the capture."""
        collecting = gc.isenabled()
        gc.disable()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    return step()
                finally:
                    self.graph.capture_end()
        finally:
            torch.cuda.current_stream(self.device).wait_stream(stream)
            if collecting:
                gc.enable()

    def replay(self) -> None:
        self.graph.replay()
