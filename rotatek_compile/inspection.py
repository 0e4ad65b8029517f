"""An artifact in words and tables, from its files alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from . import rap_inspection
from .artifact import IMAGE_TOKENS, Artifact
from .cost_curves import plan_bytes
from .errors import RotateKError
from .knockout import diagnosis
from .plan import SIDES, HeadPlan, Plan
from .plan_words import level_words, mean_bits, slab_words
from .rap_artifact import pruned_part

BIT_KEYS = {"Keys": "key_bits", "Values": "value_bits"}  # of `sizes`


def summary(artifact: Artifact) -> dict[str, Any]:
    """Everything `rotatek-inspect --json` prints; `plan` has native, 8-bit and 4-bit directions, `ranks` the Key directions in all."""
    if not artifact.coded:
        return rap_inspection.summary(artifact)
    pruned = rap_inspection.summary(pruned_part(artifact)) if artifact.rap is not None else {}
    return {
        "artifact": str(artifact.path),
        "base_model": artifact.base_model,
        "method": asdict(artifact.method),
        "calibration": artifact.calibration,
        "ranks": {str(i): [head.key.rank for head in heads] for i, heads in artifact.plan().items()},
        "plan": {str(i): [{side: list(getattr(head, side)) for side in SIDES} for head in heads] for i, heads in artifact.plan().items()},
        "sizes": sizes(artifact),
        "kv_bytes_per_token": {"dense": artifact.geometry.dense_bytes_per_token(), "compressed": artifact.bytes_per_token()},
        "knockout": knockout_summary(artifact),
        "report": artifact.report,
    } | ({"rap": {name: pruned[name] for name in ("method", "pairs", "kv_bytes_per_token")}} if pruned else {})


def knockout_summary(artifact: Artifact) -> dict[str, Any] | None:
    """Knock-out KL by layer and head, and what it says of the model; None for artifacts that have none."""
    table = artifact.knockout()
    return {"kl": {str(i): [float(x) for x in heads] for i, heads in table.items()}, **diagnosis(table)} if table else None


def describe(artifact: Artifact) -> str:
    """Header, one line per layer and head (what is kept at which precision, energy kept), what cuts cost, and the map of knock-outs."""
    if not artifact.coded:
        return rap_inspection.describe(artifact)
    before = [rap_inspection.describe(pruned_part(artifact)), "", "coded for this smaller model:"] if artifact.rap is not None else []
    return "\n".join([*before, *_header(artifact), *_heads(artifact), *_cuts(artifact), *_knockout_map(artifact)])


def sizes(artifact: Artifact) -> dict[str, Any] | None:
    """Bits per channel of Keys and of Values, and bytes of an image with all it needs; None for a rival."""
    plan, layers = artifact.plan(), artifact.geometry.layers
    if not plan:
        return None
    sides = {side: [(getattr(head, side), layers[i].head_dim) for (i, _), head in _places(plan)] for side in SIDES}
    return {f"{side}_bits": mean_bits(every) for side, every in sides.items()} | {
        "image_bytes": {
            "dense": artifact.geometry.dense_bytes_per_token() * IMAGE_TOKENS,
            "compressed": plan_bytes(artifact.geometry, plan, IMAGE_TOKENS, artifact.method.escape_ratio),
        }
    }


def _header(artifact: Artifact) -> list[str]:
    method, dense, compressed = artifact.method, artifact.geometry.dense_bytes_per_token(), artifact.bytes_per_token()
    smaller = f"{dense / compressed:.2f}x smaller" if compressed else "means alone"
    lines = [
        f"base model {artifact.base_model.get('id')} ({artifact.geometry.model_type}), "
        f"{len(artifact.geometry.compressible)} layers compressed",
        f"{method.words}, span {method.span}, window {method.window}",
        f"calibrated on {artifact.calibration.get('num_samples')} samples of {artifact.calibration.get('data')}",
        f"bytes per coded token, all layers: {dense} dense, {compressed:.0f} compressed ({smaller})",
    ]
    if (found := sizes(artifact)) is not None:
        whole = found["image_bytes"]
        lines.append(
            f"bits per channel: Keys {found['key_bits']:.2f}, Values {found['value_bits']:.2f}; {image_words(artifact)} "
            f"scales and means: {whole['compressed']:,} bytes of {whole['dense']:,} ({whole['compressed'] / whole['dense']:.4f})"
        )
    return lines


def _heads(artifact: Artifact) -> list[str]:
    plan, layers = artifact.plan(), artifact.geometry.layers
    if not plan:
        return []
    names = {place: [slab_words(getattr(head, side), layers[place[0]].head_dim) for side in SIDES] for place, head in _places(plan)}
    wide = [max(len(title), *(len(words[n]) for words in names.values())) for n, title in enumerate(("Keys", "Values"))]
    # only this basis's spectrum is in squared logits (bases.py)
    cut_name = "logit error²" if artifact.method.basis == "two-sided" else "  energy cut"
    lines = [
        "",
        "directions × bits, bytes per token, share of the energy that they hold, and what the directions left out hold of the Keys'",
        f"layer head  {'Keys':{wide[0]}}  {'Values':{wide[1]}}  bytes  Key energy  {cut_name}  Value energy",
    ]
    for (i, h), head in _places(plan):
        words = "  ".join(f"{text:{size}}" for text, size in zip(names[i, h], wide, strict=True))
        (kept, error), (values, _) = (_energy(artifact, i, h, side, getattr(head, side).rank) for side in SIDES)
        lines.append(f"{i:5} {h:4}  {words}  {head.bytes_per_token:5} {kept:11.4f} {error:13.3e} {values:13.4f}")
    return lines


def _energy(artifact: Artifact, layer: int, head: int, side: str, rank: int) -> tuple[float, float]:
    """Share of the energy in the first `rank` directions, and what is left out."""
    spectrum = artifact.tensors[f"layers.{layer}.{artifact.method.kinds[0]}.{side}_spectrum"][head]
    total = float(spectrum.sum())
    return float(spectrum[:rank].sum()) / total if total > 0 else 1.0, float(spectrum[rank:].sum())


def _cuts(artifact: Artifact) -> list[str]:
    lines = []
    for side, words in zip(SIDES, ("Keys", "Values"), strict=True):
        found = artifact.sensitivity(side) if artifact.method.levels else {}
        if not found:
            continue
        labels = [f"{level_words(level):>9}" for level in artifact.method.levels]
        lines += ["", f"KL when the {words} of one head alone are cut (nats per answer token)", f"layer head  {' '.join(labels)}"]
        for i, table in found.items():
            for h, row in enumerate(table.tolist()):
                cut = " ".join(f"{x:{len(label)}.2e}" for x, label in zip(row, labels, strict=True))
                lines.append(f"{i:5} {h:4}  {cut}")
    return lines


def _places(plan: Plan) -> list[tuple[tuple[int, int], HeadPlan]]:
    return [((i, h), head) for i, heads in plan.items() for h, head in enumerate(heads)]


def _knockout_map(artifact: Artifact) -> list[str]:
    """KL per answer token, layers down and heads across, and one line of diagnosis; nothing without knock-outs."""
    table = artifact.knockout()
    if not table:
        return []
    found = diagnosis(table)
    heads = max(len(row) for row in table.values())
    return [
        "",
        "KL when the image Keys and Values of one head alone become their means (nats per answer token)",
        "layer " + " ".join(f"{f'head {h}':>8}" for h in range(heads)),
        *(f"{i:<5} " + " ".join(f"{float(x):8.3f}" for x in row) for i, row in table.items()),
        f"{found['share_above']:.0%} of {found['pairs']} (layer, head) pairs cost at least {found['threshold']} alone; "
        f"{found['pairs_for_90_percent']} of them carry 90 % of the sum",
    ]


def image_words(artifact: Artifact) -> str:
    """Of which image tokens sizes are given, with whose scales and means."""
    if artifact.method.token_method is None:
        return f"an image of {IMAGE_TOKENS} tokens with its"
    return f"{IMAGE_TOKENS} kept tokens of images with their"


def compare(first: Artifact, second: Artifact) -> str:
    """Two artifacts of one geometry side by side: what differs in method, bytes and ranks.

    Raises:
        RotateKError: different geometries.
    """
    if first.rap is not None or second.rap is not None:
        beside = rap_inspection.compare(pruned_part(first), pruned_part(second))
        return "\n".join([beside, "coded for them:", _compare_codes(first, second)]) if first.coded and second.coded else beside
    return _compare_codes(first, second)


def _compare_codes(first: Artifact, second: Artifact) -> str:
    """What differs in how the cache is coded."""
    if reason := first.geometry.difference(second.geometry):
        raise RotateKError(f"the artifacts are of different models: {reason}; --html FILE shows them side by side")
    lines = []
    other = asdict(second.method)
    for name, value in asdict(first.method).items():
        if value != other[name]:
            lines.append(f"{name}: {value} | {other[name]}")
    a, b = first.bytes_per_token(), second.bytes_per_token()
    lines.append(f"bytes per coded token: {a:.0f} | {b:.0f}")
    one, two = sizes(first), sizes(second)
    if one and two:
        lines += [f"bits per channel, {words}: {one[key]:.2f} | {two[key]:.2f}" for words, key in BIT_KEYS.items()]
        lines += _plans_beside(first, second)
    return "\n".join(lines)


def _plans_beside(first: Artifact, second: Artifact) -> list[str]:
    """Heads whose plans differ."""
    plans, layers = (first.plan(), second.plan()), first.geometry.layers
    rows = []
    for (i, h), head in _places(plans[0]):
        other = plans[1][i][h]
        if head != other:
            cells = (slab_words(getattr(one, side), layers[i].head_dim) for side in SIDES for one in (head, other))
            rows.append([f"{i:5} {h:4}", *cells])
    heads = sum(map(len, plans[0].values()))
    if not rows:
        return [f"plan: the same in all {heads} heads"]
    titles = ["layer head", "Keys", "Keys", "Values", "Values"]
    wide = [max(len(row[n]) for row in [titles, *rows]) for n in range(len(titles))]
    table = []
    for row in [titles, *rows]:
        place, key, other_key, value, other_value = (f"{text:{size}}" for text, size in zip(row, wide, strict=True))
        table.append(f"{place}  {key} | {other_key}  {value} | {other_value}".rstrip())
    return [f"plan: {len(rows)} of {heads} heads differ (directions × bits)", *table]
