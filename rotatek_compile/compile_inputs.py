"""What every compilation starts from: the model, the calibration documents, and what the artifact says of both."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from .artifact import Artifact, Method
from .batches import end_ids, processor_hash, rope_index, template_hash
from .calibration_data.registry import DataSource
from .compile_options import CompileOptions
from .documents import Documents, usable
from .geometry import Geometry
from .models import Source, identity, load_model, load_processor
from .placement import AUTO
from .planning import uniform_of
from .token_budget import index_share

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class CompilePlan:
    """What `--dry-run` shows: nothing but configs was read."""

    source: Source
    config: Any
    geometry: Geometry
    data: DataSource
    device: torch.device
    dtype: torch.dtype
    rival: Artifact | None  # what a rival's artifact will be, but for its measured tensors

    def bytes_per_token(self, method: Method | None) -> tuple[int, float | None]:
        """Dense bytes per coded token over the compressed layers, and about those of the plan's codes (or of the rival).

        Of a method that drops image tokens the latter are of one that was read, and its KV budget is that of the kept ones (`with_total`).
        None where measuring has to say.
        """
        dense = self.geometry.dense_bytes_per_token()
        if self.rival is not None:
            return dense, self.rival.bytes_per_token()
        if method is None or method.max_kl is not None:
            return dense, None
        if method.kv_budget is not None:
            codes = method.kv_budget * dense
        else:
            plan = uniform_of(self.geometry, method)
            codes = float(sum(head.bytes_per_token for heads in plan.values() for head in heads))
        if method.token_method is None:
            return dense, codes
        return dense, method.token_keep_ratio * (codes + index_share(self.geometry, method.token_method) * dense)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A loaded model with its documents. `base` and `record` are the sections base_model and calibration of the artifact."""

    model: Any
    processor: Any
    items: Documents
    base: dict[str, Any]
    record: dict[str, Any]

    @property
    def pad_id(self) -> int:
        return self.processor.tokenizer.pad_token_id or 0


def load_inputs(plan: CompilePlan, count: int, options: CompileOptions) -> Inputs:
    """The model, and at most `count` documents.

    Raises:
        RotateKError, DataError: weights that do not load, documents that cannot be used.
    """
    samples = usable(plan.data, count, plan.geometry.text_only)  # before weights are loaded: a picture that does not open is said at once
    if len(samples) == 1:
        warnings.warn(f"{plan.data.name} has one calibration document: what is kept fits that one; pass dozens like yours", stacklevel=3)
    processor = load_processor(plan.source)
    model = load_model(plan.source, plan.dtype, plan.device, spread=options.device == AUTO)
    items = Documents(plan.data, samples, processor, plan.geometry, end_ids(model)[0], rope_index(model))
    record = {
        "data": plan.data.name,
        **({"repository": plan.data.repository} if plan.data.repository else {}),
        "revision": plan.data.revision,
        "split": plan.data.split,
        "num_samples": len(items),
        "seed": options.seed,
        "samples": plan.data.hash_ids(list(samples.values())),
        "template": template_hash(processor),
        "processor": processor_hash(processor),
    }
    return Inputs(model, processor, items, identity(plan.source, plan.config), record)
