"""Plans that were made, in the user's cache directory: with --resume a killed run goes on with what its statistics came to."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .artifact import library_versions
from .cached_tensors import cache_directory, save_cached
from .errors import ArtifactError
from .geometry import Geometry
from .rap_plan import RapPlan

STORE_FORMAT = 2  # raised whenever the same documents would give another plan


class PlanStore:
    """The plan of one (model, data, options); `key` is what must be equal, JSON values only."""

    def __init__(self, key: dict[str, Any]) -> None:
        text = json.dumps(key | {"store_format": STORE_FORMAT, "libraries": library_versions()}, sort_keys=True)
        self.file = cache_directory() / f"rap-{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"

    def load(self, geometry: Geometry, options: dict[str, Any]) -> RapPlan | None:
        """What was saved; None for nothing, or for a damaged file."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            plan = RapPlan.from_tensors(load_file(self.file), options)
            plan.check(geometry)
        except (SafetensorError, OSError, ValueError, ArtifactError):
            return None
        return plan

    def save(self, plan: RapPlan) -> None:
        """Write atomically.

        Raises:
            RotateKError: the cache directory cannot be written.
        """
        save_cached(self.file, {name: tensor.cpu() for name, tensor in plan.tensors().items()}, "the plan")
