"""Compiling for a rival method: knock-outs are measured, because that is all a rival can learn; the rest is its name and setting."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .artifact import Artifact, Method, library_versions
from .batches import Encoded
from .cutter import Cutter
from .geometry import Geometry
from .knockout import diagnosis, measure_knockouts
from .token_budget import kept_tokens, of_kept_tokens, with_total

if TYPE_CHECKING:
    from .compile_options import CompileOptions


def rival_artifact(options: CompileOptions, geometry: Geometry, knockouts: dict[int, Tensor] | None = None) -> Artifact:
    """An artifact that names a rival method and its setting; without knock-outs (fp32 [Hkv] by layer) it only tells bytes.

    Raises:
        UsageError: a budget or keep ratio that the rival registry refuses.
    """
    from .runtime.rivals.registry import PROMISED_FROM, make_coder

    heads = knockouts or {i: torch.zeros(geometry.layers[i].kv_heads) for i in geometry.compressible}
    ratio = 1.0 if options.keep_ratio is None else options.keep_ratio
    method = options.selected(Method(window=options.window, keep_ratio=ratio, rival=options.method))
    if options.kv_budget is not None:
        method = with_total(method, geometry, options.kv_budget)
    fewest = kept_tokens(PROMISED_FROM, method.token_keep_ratio)
    asked = {"kv_budget": method.kv_budget, "keep_ratio": options.keep_ratio}
    with of_kept_tokens(method):
        make_coder(options.method, geometry, **asked, state={"knockout": heads}, tokens=fewest)
    return Artifact(geometry, method, {f"layers.{i}.knockout": t for i, t in heads.items()}, {}, {})


def compile_rival(
    options: CompileOptions, geometry: Geometry, model: Any, items: Sequence[Encoded], base: dict[str, Any], record: dict[str, Any]
) -> Artifact:
    """Measure knock-outs on all items.

    Args:
        base, record: what the artifact says of its checkpoint and calibration data.
    """
    before = time.perf_counter()
    cutter = Cutter(model, geometry, {}, span_all=False)
    artifact = rival_artifact(options, geometry, measure_knockouts(cutter, items, options.quiet, geometry.rows_at_once(options.batch_size)))
    artifact.base_model, artifact.calibration, artifact.libraries = base, record | {"documents": len(items)}, library_versions()
    artifact.report = {
        "kv_bytes_per_token": {"dense": geometry.dense_bytes_per_token(), "compressed": artifact.bytes_per_token()},
        "seconds": {"total": 0.0, "sensitivities": time.perf_counter() - before},
        "knockout": diagnosis(artifact.knockout()),
        "layers": [{"layer": i, "kl_when_knocked_out": [float(x) for x in heads]} for i, heads in artifact.knockout().items()],
    }
    return artifact
