"""The model card of an artifact: what it is, how to use it, what was measured, where it ends.

Body and front matter may be edited by hand: `write_measured` replaces nothing but the evaluations it wrote itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from ._version import __version__
from .artifact import CARD_FILE, IMAGE_TOKENS
from .errors import RotateKError
from .hub import PICTURE_FILE
from .inspection import image_words, sizes

TAGS = ("rotatek", "kv-cache", "kv-cache-compression")
PLACE = "THIS_DIRECTORY"  # becomes the repository's name when the card is pushed
MEASURED = "## Measured"
IMAGE_TASK, TEXT_TASK = "image-text-to-text", "text-generation"  # names of the Hub


def model_card(artifact: Any, picture: bool = False, weights: bool = False) -> str:
    """README.md of an artifact, front matter first.

    `base_model` is written for Hub ids only: a local path would leak and mean nothing elsewhere.

    Args:
        picture: whether `PICTURE_FILE` lies beside it.
        weights: whether the base weights do.
    """
    from huggingface_hub import ModelCardData

    hub_id, name = base_name(artifact)
    method, report = artifact.method, artifact.report
    dense, compressed = report["kv_bytes_per_token"]["dense"], report["kv_bytes_per_token"]["compressed"]
    ours = method.rival is None
    bytes_of = "codes alone" if ours else f"in an image of {IMAGE_TOKENS} tokens"
    smaller = f" ({dense / compressed:.2f}x)" if compressed else ""  # a plan may keep means alone
    visual = bool(artifact.geometry.visual_token_ids)
    dropped = ", of codes alone, without the dropped tokens" if method.token_method is not None else ""
    task = IMAGE_TASK if visual else TEXT_TASK
    checked = checked_on(artifact.calibration.get("kept_aside", 1))
    data = artifact.calibration.get("repository")  # of calibration data on the Hub
    front = ModelCardData(
        library_name="rotatek-compile", pipeline_tag=task, tags=list(TAGS), base_model=hub_id, datasets=[data] if data else None
    )
    return "\n".join(
        [
            "---",
            front.to_yaml().strip(),
            "---",
            "",
            f"# RotateK artifact for {name}",
            "",
            f"{'Bases and head masks' if ours else 'Settings'} that let {artifact.geometry.model_type} decode from a compressed KV cache;",
            "the model itself and transformers stay as they are, and prefill stays exact.",
            f"Made by rotatek-compile {__version__}.",
            "",
            *([weights_sentence(), ""] if weights else []),
            "## Use",
            "",
            "```bash",
            "pip install rotatek-compile",
            f'rotatek-run {PLACE} {"--image page.png " if visual else ""}--prompt "What is the total?" --compare-dense',
            "```",
            "",
            "```python",
            "import rotatek_compile",
            "",
            f'model, processor = rotatek_compile.load("{PLACE}")  # model.generate(**inputs) now uses the compressed cache',
            "```",
            "",
            *([] if hub_id or weights or base_is_bundled(artifact) else [_needs_base(), ""]),
            "## What it keeps",
            "",
            f"- {method.words}",
            f"- span `{method.span}`, window {method.window} text tokens",
            f"- bytes per coded token, all layers: {compressed:.0f} of {dense} dense{smaller}, {bytes_of}",
            *kept_by_codes(artifact),
            f"- calibrated on {artifact.calibration.get('num_samples')} samples of {_data_name(artifact.calibration)}",
            *([f"- KL of the plan on {checked}: {report['plan_kl']:.2e} nats per answer token{dropped}"] if ours else []),
            "",
            *([picture_line(artifact), ""] if picture else []),
            "## Limits",
            "",
            *(["Values are stored raw, so no more than half of the cache can be saved."] if _raw_values(artifact) else []),
            "Accuracy holds for documents like the calibration data's; measure yours with",
            f"`rotatek-eval {PLACE} --data YOUR_DATA`. An artifact is data: it runs no code.",
            "",
        ]
    )


def base_name(artifact: Any) -> tuple[str | None, str]:
    """Hub id of the base model (None for one that is not on the Hub), and what to call it in a text for anyone."""
    base = artifact.base_model.get("id", "")
    hub_id = base if artifact.base_model.get("fingerprint") is None and base.count("/") == 1 else None
    return hub_id, hub_id or (f"{base} (bundled)" if base_is_bundled(artifact) else "a local checkpoint")


def base_is_bundled(artifact: Any) -> bool:
    """Whether the base model comes with this package."""
    from .models import BUNDLED

    return artifact.base_model.get("id") in BUNDLED


def weights_sentence() -> str:
    """Said of an artifact that carries its base weights."""
    return "The weights beside it are the base model's, unchanged; its licence applies to them."


def card_for_hub(card: str, repo: str, weights: bool) -> str:
    """The card as it is pushed: the repository's name in its examples, and a word on weights that are pushed along."""
    if weights and weights_sentence() not in card:
        card = card.replace("\n## Use\n", f"\n{weights_sentence()}\n\n## Use\n", 1).replace(f"{_needs_base()}\n\n", "")
    return card.replace(PLACE, repo)


def require_card(artifact: Any) -> None:
    """Say that there is no card to write into before anything is measured.

    Raises:
        RotateKError: the artifact was fetched from the Hub, or has no card.
    """
    if artifact.remote is not None:
        raise RotateKError(f"--write-card writes into a directory, {artifact.remote.repo} is on the Hub; download it, or push again")
    if not (artifact.path / CARD_FILE).is_file():
        raise RotateKError(f"--write-card: {artifact.path} has no {CARD_FILE}; compile the artifact again")


def write_measured(directory: Path, name: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Put an evaluation into the card: a table in the text, and the artifact's figures in the front matter for the Hub.

    An evaluation of the same data in the same mode is replaced, others stay. Nothing else of the card is changed.

    Args:
        name: what to call the base model (`base_name`).
        rows: of `Measured.to_json`, each with `ask`; dense first.
        facts: `data`, `documents`, `dtype`, `device`, `torch` and `transformers` of `suite.facts_of`.

    Raises:
        RotateKError: the card cannot be read or written.
    """
    from huggingface_hub import ModelCard, ModelCardData
    from yaml import YAMLError  # huggingface_hub reads front matter with it

    file = directory / CARD_FILE
    try:
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except (OSError, ValueError, AttributeError, YAMLError) as error:
        raise RotateKError(f"{file} cannot be read as a model card ({str(error).splitlines()[0]}); compile the artifact again") from error
    text, front = card.text, cast(ModelCardData, card.data)
    kept, task = list(front.eval_results or []), str(front.pipeline_tag or IMAGE_TASK)
    for ask in dict.fromkeys(row["ask"] for row in rows):
        own = [row for row in rows if row["ask"] == ask]
        text = _put(text, f"{facts['data']}, {ask}", _table(own, ask, facts, task))
        kept = [r for r in kept if (r.dataset_name, r.dataset_config) != (facts["data"], _mode(ask))]
        kept += _results(own, ask, facts, task)
    front.eval_results = kept
    front.model_name = front.model_name or f"RotateK artifact for {name}"
    card.text = text
    staged = file.with_name(f".{CARD_FILE}-new")
    try:
        staged.write_text(str(card), encoding="utf-8")
        staged.replace(file)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise RotateKError(f"could not write {file}: {error.strerror or error}") from error


def _put(text: str, key: str, block: str) -> str:
    """The text with the block of this key: in place of the former one, else last under the heading, else before the limits."""
    start, end = f"<!-- rotatek-eval: {key} -->", "<!-- end of rotatek-eval -->"
    whole = f"{start}\n{block}\n{end}"
    if (at := text.find(start)) >= 0 and (stop := text.find(end, at)) >= 0:
        return text[:at] + whole + text[stop + len(end) :]
    if (last := text.rfind(end)) >= 0:
        return f"{text[: last + len(end)]}\n\n{whole}{text[last + len(end) :]}"
    section = f"{MEASURED}\n\n{whole}\n\n"
    limits = re.search(r"^## Limits$", text, re.MULTILINE)
    return text[: limits.start()] + section + text[limits.start() :] if limits else f"{text.rstrip()}\n\n{section}"


def _table(rows: Sequence[dict[str, Any]], ask: str, facts: dict[str, Any], task: str) -> str:
    what, coded = ("older text was", "coded text") if task == TEXT_TASK else ("the images were", "coded images")
    when = f"{'after' if ask == 'after' else 'before'} {what} compressed"
    metric = next((str(row["metric"]) for row in rows if row.get("metric") not in (None, "exact_match")), None)
    heads = ["method", *([metric] if metric else []), "exact match", "KL per answer token", coded, "whole cache"]
    lines = [
        f"`{facts['data']}`, {facts['documents']} documents, question asked {when}. {facts['dtype']} on {facts['device']}, "
        f"torch {facts['torch']}, transformers {facts['transformers']}, rotatek-compile {facts['rotatek']}.",
        "Scores with their 95 % interval over documents, KL to the dense model in nats, bytes over the dense cache's.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for row in rows:
        label = row["method"] if row["method"] == "artifact" or not row.get("setting") else f"{row['method']}, {row['setting']}"
        cells = [label, *([_score(row, "score")] if metric else []), _score(row, "exact_match"), f"{row['kl']:.1e}"]
        cells += [_share(row, "span_bytes"), _share(row, "kv_bytes")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mode(ask: str) -> str:
    return f"question asked {'after' if ask == 'after' else 'before'} compression"


def _score(row: dict[str, Any], key: str) -> str:
    interval = row.get(f"{key}_interval")
    return f"{row[key]:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _share(row: dict[str, Any], key: str) -> str:
    dense = row.get(f"{key}_dense")
    return f"{row[key] / dense:.3f}" if dense else "-"


def _results(rows: Sequence[dict[str, Any]], ask: str, facts: dict[str, Any], task: str) -> list[Any]:
    """The artifact's figures as the Hub's `model-index` wants them."""
    from huggingface_hub import EvalResult

    row = next((row for row in rows if row["method"] == "artifact"), None)
    if row is None:
        return []
    metrics = {"exact_match": row["exact_match"], "kl_divergence": row["kl"]}
    if row.get("metric") not in (None, "exact_match"):
        metrics = {str(row["metric"]): row["score"]} | metrics
    return [
        EvalResult(
            task_type=task,
            dataset_type=str(facts["data"]),
            dataset_name=str(facts["data"]),
            dataset_config=_mode(ask),  # the Hub tells results of one data set apart by it
            dataset_args={"documents": facts["documents"]},
            metric_type=kind,
            metric_name=kind.replace("_", " "),
            metric_value=round(float(value), 6) if kind != "kl_divergence" else float(f"{value:.3e}"),
        )
        for kind, value in metrics.items()
    ]


def _needs_base() -> str:
    return "The base model is a local checkpoint; say where yours is with `--model PATH` (in Python `model=`)."


def kept_by_codes(artifact: Any) -> list[str]:
    """What an image takes with everything it needs, and how precisely Keys and Values are kept; nothing of a rival."""
    found = sizes(artifact)
    if found is None:
        return []
    image = found["image_bytes"]
    unit = image_words(artifact) if artifact.geometry.visual_token_ids else f"a segment of {IMAGE_TOKENS} tokens with its"
    share = image["compressed"] / image["dense"]
    return [
        f"- {unit} scales and means: {share:.4f} of its dense bytes",
        f"- bits per channel: Keys {found['key_bits']:.2f}, Values {found['value_bits']:.2f}, where 16 are dense",
    ]


def _raw_values(artifact: Any) -> bool:
    """Whether every Value is stored as it is."""
    plan, layers = artifact.plan(), artifact.geometry.layers
    return bool(plan) and all(head.value.native == layers[i].head_dim for i, heads in plan.items() for head in heads)


def picture_line(artifact: Any) -> str:
    """The picture of the heads, and what it shows in words."""
    return f"![{_alternative(artifact)}]({PICTURE_FILE})"


def _alternative(artifact: Any) -> str:
    """What the picture shows, for those who do not see it."""
    plan = artifact.plan()
    if not plan:
        return "Knock-out cost of every layer and KV head"
    heads = [head for row in plan.values() for head in row]
    said = [_spread("Key", [head.key.rank for head in heads])]
    if not _raw_values(artifact):
        said.append(_spread("Value", [head.value.rank for head in heads]))
    return (
        f"What each of {len(plan)} layers and {len(heads)} (layer, KV head) pairs keeps: {'; '.join(said)}; "
        "beside it what cutting each pair alone costs"
    )


def _spread(side: str, ranks: list[int]) -> str:
    none = f", {ranks.count(0)} pairs keep none" if 0 in ranks else ""
    return f"{min(ranks)} to {max(ranks)} {side} directions, mean {sum(ranks) / len(ranks):.1f}{none}"


def checked_on(kept_aside: int) -> str:
    """Which documents a plan was checked on: fewer than eight leave none to keep aside (compiler.py)."""
    return "documents kept aside" if kept_aside else "the calibration documents themselves (too few to keep any aside)"


def _data_name(calibration: dict[str, Any]) -> str:
    return "local data" if calibration.get("split") == "local" else f"`{calibration.get('data')}`"
