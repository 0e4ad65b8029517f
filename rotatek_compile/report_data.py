"""The numbers behind the page of `rotatek-inspect --html`, from an artifact's own files; what it does not hold is said in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .artifact import IMAGE_TOKENS, Artifact
from .inspection import sizes
from .kernels.slabs import Slabs
from .knockout import diagnosis
from .plan import SIDES, Plan
from .plan_words import channel_bits, level_words, mean_bytes, scale_bytes
from .report_predictions import Budget, Map, budgets_of, errors_of

ANGLE_SHARE = 4  # principal angles are between subspaces of D / ANGLE_SHARE directions, whatever the budget: artifacts stay comparable
LARGEST = 1e300  # of a number of report.json: JSON has integers that no float holds
LONGEST = 200  # characters of one fact; artifacts come from strangers


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """One artifact. Maps hold fp64 [Hkv] by layer unless said; a quantity that the artifact lacks is empty, and `missing` says why.

    basis: None for a rival. main: the token kind that plots are about, `visual`, or `text` for a model without images.
    facts: what it is, in words. dims: D by layer. plan: by layer and head. knockouts: KL when a head's image Keys and Values become
    their means. cuts: KL when its Keys (Values) alone are cut, by side and level. spectra: [Hkv, D] by kind and side, such as
    `visual.key`. errors: by side and level, what the cut leaves of a head's spectrum as error, rounding of its codes included.
    angles: degrees [Hkv, D / 4], ascending, between the leading directions of image and of text Keys.
    parts: bytes of `IMAGE_TOKENS` coded tokens by part and layer; dense: the same of the stock cache.
    budgets: expected KL over bytes as allocated; uniform: of the best plan that is the same in every head; exact: of the artifact's own.
    measured: KL of the whole plan on documents kept aside.
    """

    name: str
    basis: str | None
    main: str
    facts: dict[str, str]
    dims: dict[int, int]
    plan: Plan
    knockouts: Map
    diagnosis: dict[str, Any]
    cuts: dict[str, dict[Slabs, Map]]
    errors: dict[str, dict[Slabs, Map]]
    spectra: dict[str, Map]
    angles: Map
    parts: dict[str, dict[int, float]]
    dense: dict[str, dict[int, float]]
    budgets: list[Budget]
    uniform: list[Budget]
    exact: Budget | None
    measured: float | None
    missing: dict[str, str]

    def slabs(self, side: str) -> dict[int, list[Slabs]]:
        """One side of the plan."""
        return {i: [getattr(head, side) for head in heads] for i, heads in self.plan.items()}

    def ranks(self, side: str) -> Map:
        """Directions kept."""
        return {i: np.array([one.rank for one in heads]) for i, heads in self.slabs(side).items()}

    def bits(self, side: str) -> Map:
        """Bits per channel."""
        return {i: np.array([channel_bits(one, self.dims[i]) for one in heads]) for i, heads in self.slabs(side).items()}

    def raw(self, side: str) -> bool:
        """Whether every head of one side is stored as it is."""
        return all(one == Slabs(self.dims[i]) for i, heads in self.slabs(side).items() for one in heads)

    def kept(self, name: str) -> Map:
        """Share of the energy in the kept directions for one of `spectra`; 1 where there is none to keep."""
        ranks = self.ranks(name.rpartition(".")[2])
        return {i: _kept(s, ranks[i]) for i, s in self.spectra.get(name, {}).items()}

    def needed(self, name: str, share: float) -> Map:
        """The fewest directions that hold a share of the energy, for one of `spectra`."""
        return {i: _needed(s, share) for i, s in self.spectra.get(name, {}).items()}


def numbers(artifact: Artifact) -> Numbers:
    """Everything the page shows.

    Raises:
        UsageError: the artifact names a rival that does not exist.
    """
    ours = artifact.method.rival is None
    knockouts = {i: t.double().numpy() for i, t in artifact.knockout().items()}
    spectra, angles = (_spectra(artifact), _angles(artifact)) if ours else ({}, {})
    cuts = _cuts(artifact) if ours else {}
    budgets, uniform, exact = budgets_of(artifact) if cuts else ([], [], None)
    parts, dense = _bytes(artifact)
    return Numbers(
        name=artifact.remote.repo if artifact.remote else artifact.path.resolve().name if artifact.path else "artifact",
        basis=artifact.method.basis if ours else None,
        main=artifact.method.kinds[0],
        facts=_facts(artifact),
        dims={i: artifact.geometry.layers[i].head_dim for i in artifact.geometry.compressible},
        plan=artifact.plan(),
        knockouts=knockouts,
        diagnosis=diagnosis(artifact.knockout()) if knockouts else {},
        cuts=cuts,
        errors=errors_of(artifact, cuts),
        spectra=spectra,
        angles=angles,
        parts=parts,
        dense=dense,
        budgets=budgets,
        uniform=uniform,
        exact=exact,
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
        "bytes per coded token": f"{compressed:,.0f} of {dense:,} dense" + (f" ({dense / compressed:.2f}× smaller)" if compressed else ""),
        **_precision(artifact),
        "made with": ", ".join(f"{k} {v}" for k, v in artifact.libraries.items()),
    }
    return {label: text[:LONGEST] for label, value in facts.items() if (text := str(value or ""))}


def _precision(artifact: Artifact) -> dict[str, str]:
    found = sizes(artifact)
    return {"bits per channel": f"{found['key_bits']:.2f} of Keys, {found['value_bits']:.2f} of Values, 16 dense"} if found else {}


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
        levels = ", ".join(level_words(level) for level in method.levels)
        words = f"Sensitivities at {levels} cannot be interpolated; the first must keep no direction, and none more than there are."
        found |= dict.fromkeys(("errors", "budgets"), words)
    return found


def _spectra(artifact: Artifact) -> dict[str, Map]:
    kinds = artifact.method.kinds
    names = [f"{kind}.{side}" for side in SIDES for kind in kinds]
    layers = artifact.geometry.compressible
    return {name: {i: artifact.tensors[f"layers.{i}.{name}_spectrum"].double().numpy() for i in layers} for name in names}


def _cuts(artifact: Artifact) -> dict[str, dict[Slabs, Map]]:
    found = {}
    for side in SIDES:
        table = {i: t.double().clamp_min(0).numpy() for i, t in artifact.sensitivity(side).items()}
        if table and artifact.method.levels:
            found[side] = {level: {i: heads[:, n] for i, heads in table.items()} for n, level in enumerate(artifact.method.levels)}
    return found


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
            frames.append(torch.linalg.qr(artifact.basis(i, kind, "key").decode[..., :rank]).Q)
        cosines = torch.linalg.svdvals(frames[0].mT @ frames[1]).clamp(0, 1)
        found[i] = torch.rad2deg(cosines.acos()).numpy()
    return found


def _bytes(artifact: Artifact) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    layers, tokens = artifact.geometry.layers, IMAGE_TOKENS
    half = {i: 2.0 * tokens * layers[i].kv_heads * layers[i].head_dim for i in artifact.geometry.compressible}
    dense = {"Keys": half, "Values": dict(half)}
    if artifact.method.rival is not None:
        from .runtime.prepared import PreparedArtifact  # the runtime imports the artifact's module

        coder = PreparedArtifact(artifact).coder
        assert coder is not None
        return {"everything kept": {i: float(coder.bytes_of(tokens, i)) for i in half}}, dense
    plan, found = artifact.plan(), {}
    for side, words in zip(SIDES, dense, strict=True):
        slabs = {i: [getattr(head, side) for head in heads] for i, heads in plan.items()}
        found[words] = {i: float(tokens * sum(one.bytes_per_token() for one in heads)) for i, heads in slabs.items()}
    every = {i: [one for head in heads for one in head] for i, heads in plan.items()}
    found["scales"] = {i: float(sum(scale_bytes(one) for one in sides)) for i, sides in every.items()}
    found["means"] = {i: float(sum(mean_bytes(one, layers[i].head_dim) for one in sides)) for i, sides in every.items()}
    return found, dense


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
