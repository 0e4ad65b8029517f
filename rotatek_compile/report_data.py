"""The numbers behind the page of `rotatek-inspect --html`, from an artifact's own files; what it does not hold is said in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .artifact import IMAGE_TOKENS, RANK_STEP, Artifact
from .knockout import diagnosis

Map = dict[int, np.ndarray]  # by layer; the first axis is KV heads
ANGLE_SHARE = 4  # principal angles are between subspaces of D / ANGLE_SHARE directions, whatever the budget: artifacts stay comparable
LARGEST = 1e300  # of a number of report.json: JSON has integers that no float holds
LONGEST = 200  # characters of one fact; artifacts come from strangers


@dataclass(frozen=True, slots=True)
class Budget:
    """What is expected at one share of Key directions: KL in nats per answer token, with allocated and with uniform ranks.

    bytes: of one coded token over its dense bytes, Values included.
    """

    share: float
    bytes: float
    allocated: float
    uniform: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """One artifact. Maps hold fp64 [Hkv] by layer unless said; a quantity that the artifact lacks is empty, and `missing` says why.

    basis: None for a rival. main: the token kind that plots are about, `visual`, or `text` for a model without images.
    facts: what it is, in words. dims: D by layer. ranks: directions kept. knockouts: KL when a head's image Keys and Values become
    their means. cuts: KL when its Keys alone are cut, by rank. spectra: [Hkv, D] by kind and side, such as `visual.key`.
    angles: degrees [Hkv, D / 4], ascending, between the leading directions of image and of text Keys.
    parts: bytes of `IMAGE_TOKENS` coded tokens by part and layer; dense: the same of the stock cache.
    predicted: KL of the plan as the sum of its heads' own costs; measured: KL of the whole plan on documents kept aside.
    """

    name: str
    basis: str | None
    main: str
    facts: dict[str, str]
    dims: dict[int, int]
    ranks: Map
    knockouts: Map
    diagnosis: dict[str, Any]
    cuts: dict[int, Map]
    spectra: dict[str, Map]
    angles: Map
    parts: dict[str, dict[int, float]]
    dense: dict[str, dict[int, float]]
    budgets: list[Budget]
    predicted: float | None
    measured: float | None
    missing: dict[str, str]

    def kept(self, kind: str) -> Map:
        """Share of a kind's Key energy in the kept directions; 1 where there is none to keep."""
        return {i: _kept(s, self.ranks[i]) for i, s in self.spectra.get(f"{kind}.key", {}).items()}

    def discarded(self, rank: int | None = None) -> Map:
        """Energy of the main kind's Key directions from `rank` on, or from each head's own rank on."""
        spectra = self.spectra.get(f"{self.main}.key", {})
        return {i: _tails(s, self.ranks[i] if rank is None else np.full(len(s), rank)) for i, s in spectra.items()}

    def needed(self, name: str, share: float) -> Map:
        """The fewest directions that hold a share of the energy, for one of `spectra`."""
        return {i: _needed(s, share) for i, s in self.spectra.get(name, {}).items()}


def numbers(artifact: Artifact) -> Numbers:
    """Everything the page shows.

    Raises:
        UsageError: the artifact names a rival that does not exist.
    """
    ours = artifact.method.rival is None
    ranks = {i: np.array(r) for i, r in artifact.ranks().items()}
    knockouts = {i: t.double().numpy() for i, t in artifact.knockout().items()}
    spectra, angles = (_spectra(artifact), _angles(artifact)) if ours else ({}, {})
    cuts = _cuts(artifact) if ours else {}
    budgets, predicted = _budgets(artifact, ranks) if cuts else ([], None)
    parts, dense = _bytes(artifact, ranks)
    return Numbers(
        name=artifact.remote.repo if artifact.remote else artifact.path.resolve().name if artifact.path else "artifact",
        basis=artifact.method.basis if ours else None,
        main=artifact.method.kinds[0],
        facts=_facts(artifact),
        dims={i: artifact.geometry.layers[i].head_dim for i in artifact.geometry.compressible},
        ranks=ranks,
        knockouts=knockouts,
        diagnosis=diagnosis(artifact.knockout()) if knockouts else {},
        cuts=cuts,
        spectra=spectra,
        angles=angles,
        parts=parts,
        dense=dense,
        budgets=budgets,
        predicted=predicted,
        measured=_number(artifact.report.get("plan_kl")) if ours else None,
        missing=_missing(artifact, bool(knockouts), bool(cuts), bool(budgets)),
    )


def _facts(artifact: Artifact) -> dict[str, str]:
    method, geometry, data = artifact.method, artifact.geometry, artifact.calibration
    shapes = sorted({(geometry.layers[i].kv_heads, geometry.layers[i].head_dim) for i in geometry.compressible})
    dense, compressed = geometry.dense_bytes_per_token(), artifact.bytes_per_token()
    facts = {
        "base model": _name(artifact.base_model.get("id"), artifact.base_model.get("fingerprint") is not None),
        "commit": artifact.base_model.get("revision"),
        "architecture": geometry.model_type,
        "layers compressed": f"{len(geometry.compressible)} of {len(geometry.layers)}",
        "KV heads × D": ", ".join(f"{heads} × {dim}" for heads, dim in shapes),
        "method": method.words,
        "coded": " and ".join({"visual": "images", "text": "older text"}[kind] for kind in method.kinds),
        "raw window": f"{method.window} text tokens",
        "calibrated on": f"{data.get('num_samples', '?')} samples of {_name(data.get('data'), data.get('split') == 'local')}",
        "bytes per coded token": f"{compressed:,.0f} of {dense:,} dense ({dense / compressed:.2f}× smaller)",
        "made with": ", ".join(f"{k} {v}" for k, v in artifact.libraries.items()),
    }
    return {label: text[:LONGEST] for label, value in facts.items() if (text := str(value or ""))}


def _name(value: Any, local: bool) -> str:
    """A Hub id as it stands; of a local path the last part, because the rest means nothing elsewhere."""
    text = str(value or "unknown")
    return (text.replace("\\", "/").rstrip("/").split("/")[-1] or text) if local else text


def _missing(artifact: Artifact, knockouts: bool, cuts: bool, budgets: bool) -> dict[str, str]:
    method, found = artifact.method, {}
    if not knockouts:
        found["knockouts"] = "This artifact is older than knock-outs; compile it again to have them measured."
    if method.rival is not None:
        words = f"This artifact is for the rival method {method.rival[:LONGEST]}: it keeps no directions, so it holds knock-outs alone."
        return found | dict.fromkeys(("ranks", "cuts", "spectra", "variance", "angles", "errors", "budgets"), words)
    if "visual" not in method.kinds:
        found["angles"] = "The model reads no images."
    elif "text" not in method.kinds:
        found["angles"] = "This artifact codes images alone and holds no statistics of text; compile with --span all to compare them."
    if not cuts:
        found |= dict.fromkeys(("cuts", "errors", "budgets"), "No sensitivities were measured for this artifact.")
    elif not budgets:
        found["budgets"] = f"Sensitivities at ranks {list(method.levels)} cannot be interpolated; they must ascend from 0 in steps of 8."
    return found


def _spectra(artifact: Artifact) -> dict[str, Map]:
    kinds = artifact.method.kinds
    names = [*(f"{kind}.key" for kind in kinds), f"{kinds[0]}.value"]
    layers = artifact.geometry.compressible
    return {name: {i: artifact.tensors[f"layers.{i}.{name}_spectrum"].double().numpy() for i in layers} for name in names}


def _cuts(artifact: Artifact) -> dict[int, Map]:
    table = {i: artifact.tensors[f"layers.{i}.sensitivity"].double().clamp_min(0).numpy() for i in artifact.geometry.compressible}
    return {level: {i: heads[:, n] for i, heads in table.items()} for n, level in enumerate(artifact.method.levels)}


def _angles(artifact: Artifact) -> Map:
    """Principal angles (Björck and Golub 1973): arccos of the singular values of Q_aᵀ Q_b.

    Keys are rebuilt from the columns of `decode`, so these span the subspaces.
    """
    if len(artifact.method.kinds) < 2:
        return {}
    found = {}
    for i in artifact.geometry.compressible:
        rank = max(1, artifact.geometry.layers[i].head_dim // ANGLE_SHARE)
        frames = []
        for kind in ("visual", "text"):
            decode = torch.linalg.inv(artifact.tensors[f"layers.{i}.{kind}.key_encode"].double()).mT
            frames.append(torch.linalg.qr(decode[..., :rank]).Q)
        cosines = torch.linalg.svdvals(frames[0].mT @ frames[1]).clamp(0, 1)
        found[i] = torch.rad2deg(cosines.acos()).numpy()
    return found


def _bytes(artifact: Artifact, ranks: Map) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    layers, tokens = artifact.geometry.layers, IMAGE_TOKENS
    half = {i: 2.0 * tokens * layers[i].kv_heads * layers[i].head_dim for i in artifact.geometry.compressible}
    dense = {"Keys": half, "Values": dict(half)}
    if artifact.method.rival is not None:
        from .runtime.prepared import PreparedArtifact  # the runtime imports the artifact's module

        coder = PreparedArtifact(artifact).coder
        assert coder is not None
        return {"everything kept": {i: float(coder.bytes_of(tokens, i)) for i in half}}, dense
    codes = {i: 2.0 * tokens * float(r.sum()) for i, r in ranks.items()}
    means = {i: 4.0 * layers[i].kv_heads * layers[i].head_dim for i in half}  # one fp32 Key mean per head and image
    return {"Key codes": codes, "Values": dict(half), "Key means": means}, dense


def _budgets(artifact: Artifact, ranks: Map) -> tuple[list[Budget], float | None]:
    """Expected KL at every whole number of steps, and of the plan itself; nothing if the levels cannot be interpolated."""
    from . import allocate as allocation  # brings transformers with it

    geometry, levels = artifact.geometry, artifact.method.levels
    main = artifact.method.kinds[0]
    dims = [geometry.layers[i].head_dim for i in ranks]
    ascending = all(a < b for a, b in zip(levels, levels[1:], strict=False))
    if not levels or levels[0] != 0 or not ascending or any(x % RANK_STEP for x in levels) or levels[-1] > min(dims):
        return [], None
    curves: dict[int, list[np.ndarray]] = {}  # what allocation sees: with the small weight that orders heads of no measured cost
    costs: dict[int, list[np.ndarray]] = {}
    for i in ranks:
        measured, spectrum = artifact.tensors[f"layers.{i}.sensitivity"].clamp_min(0), artifact.tensors[f"layers.{i}.{main}.key_spectrum"]
        curves[i] = [allocation.cost_curve(levels, m, s) for m, s in zip(measured, spectrum, strict=True)]
        steps = np.arange(0, spectrum.shape[1] + 1, RANK_STEP)
        shares = [np.array([1 - _kept(s[None], np.array([n]))[0] for n in steps]) for s in spectrum.double().numpy()]
        costs[i] = [np.maximum(c - allocation.TIE_WEIGHT * s, 0.0) for c, s in zip(curves[i], shares, strict=True)]

    def cost(plan: Any) -> float:
        return float(sum(costs[i][h][int(r) // RANK_STEP] for i, heads in plan.items() for h, r in enumerate(heads)))

    def size(plan: Any) -> float:
        values = sum(geometry.layers[i].kv_heads * geometry.layers[i].head_dim for i in plan)
        return (sum(sum(heads) for heads in plan.values()) + values) / (2 * values)

    found, count = [], min(dims) // RANK_STEP
    for n in range(count + 1):
        best, uniform = allocation.allocate(geometry, curves, n / count), allocation.uniform_plan(geometry, n / count)
        found.append(Budget(n / count, size(uniform), cost(best), cost(uniform)))
    return found, cost(ranks)


def _number(value: Any) -> float | None:
    """A finite non-negative number of report.json, which nobody has checked."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST
    return float(value) if good else None


def _tails(spectrum: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    return np.array([energies[rank:].sum() for energies, rank in zip(spectrum, ranks, strict=True)])


def _kept(spectrum: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    total = spectrum.sum(1)
    return np.where(total > 0, 1 - _tails(spectrum, ranks) / np.where(total > 0, total, 1), 1.0)


def _needed(spectrum: np.ndarray, share: float) -> np.ndarray:
    total = spectrum.sum(1, keepdims=True)
    reached = spectrum.cumsum(1) >= share * total * (1 - 1e-12)
    return np.where(total[:, 0] > 0, reached.argmax(1) + 1, 0)
