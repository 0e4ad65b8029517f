"""Which subspace the Keys lie in, how far it drifts, and what the mix of text and images does to it.

    python benchmarks/bench_subspaces.py --output benchmarks/results            # both bundled models, on a CPU: a quarter of an hour
    python benchmarks/bench_subspaces.py --print benchmarks/results/subspaces.json

Bases are made from calibration documents and measured on pages that they have not seen. Four questions:

- *explained variance*: of the Keys' variance within a page, and of the expected squared logits, what the first R of D directions hold, for
  channels as they are and for two rotations (bench_rotation.py says which);
- *drift*: the mean squared cosine of the principal angles between the leading D/4 directions of different Keys; 1/4 for unrelated ones.
  Between models, every head beside the head of the same layer that it agrees with most;
- *calibration mix*: the basis of a covariance that is to a share text, the rest images, keeping D/4 in every head;
- *prompt mix*: that of images alone, where other text stands between the pages and the question.

Intervals are 95 % bootstrap intervals: over heads for the first two, over documents for KL.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bench_plans import measured_on
from bench_rotation import RATIOS, SHARE, WAYS, bases_of, logit_error, overlap
from print_subspaces import lines
from torch import Tensor

from rotatek_compile.allocate import uniform_plan
from rotatek_compile.bases import Basis, calibrated_basis
from rotatek_compile.batches import Encoded, encode, end_ids, pad, rope_index
from rotatek_compile.calibrate import MomentStore, calibrate
from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.cutter import Cutter
from rotatek_compile.documents import Documents, usable
from rotatek_compile.models import checked_geometry, choose_device, choose_dtype, load_config, load_model, load_processor, resolve
from rotatek_compile.moments import Moments
from rotatek_compile.statistics import Bootstrap

TEXT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPT_WORDS = (0, 50, 200, 800)  # as many as the model has positions for
Spread = tuple[float, float, float]  # mean and its interval


class Subject:
    """A model, its documents, and the moments that are taken of them."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        source = resolve(name)
        config = load_config(source)
        self.args, self.geometry, self.device = args, checked_geometry(config), choose_device(args.device)
        self.model = load_model(source, choose_dtype("float32", config, self.device), self.device)
        self.positions = int(config.get_text_config(decoder=True).max_position_embeddings)
        self.processor, self.rope, self.eos = load_processor(source), rope_index(self.model), end_ids(self.model)[0]

    def documents(self, split: str, count: int) -> Documents:
        data = open_data(self.args.data, split, self.args.seed)
        return Documents(data, usable(data, count, False), self.processor, self.geometry, self.eos, self.rope)

    def moments(self, items: Sequence[Encoded]) -> Moments:
        pad_id = self.processor.tokenizer.pad_token_id or 0
        with tempfile.TemporaryDirectory() as scratch:
            store = MomentStore({}, Path(scratch))
            return calibrate(self.model, items, self.geometry, store, self.args.batch_size, False, pad_id, quiet=True)

    def kl(self, bases: dict[int, Basis], items: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
        """Of keeping D / SHARE native directions of the Keys in every head, summed over each document's answer tokens, and their number."""
        cutter = Cutter(self.model, self.geometry, bases, False)
        plans = [uniform_plan(self.geometry, 1 / SHARE, "native")]
        kl, tokens = measured_on(cutter, items, plans, self.geometry.rows_at_once(self.args.batch_size))
        return kl[0], tokens

    def with_text(self, items: Documents, words: int) -> list[Encoded]:
        """Documents whose question follows so many words of other documents' questions and answers."""
        samples = [items.data.sample(place) for place in items.places]
        other = list(itertools.chain.from_iterable(f"{s.question} {s.answers[0]}".split() for s in samples))
        made = []
        for n, sample in enumerate(samples):
            start = 1 + 37 * n  # another piece for every document
            text = [other[(start + k) % len(other)] for k in range(words)]
            longer = replace(sample, question=" ".join([*text, sample.question]))
            made.append(encode(self.processor, longer, self.geometry, self.eos, self.rope))
        return made

    def surprise(self, items: Sequence[Encoded]) -> float:
        """What the dense model thinks of the true answers: nats per answer token."""
        cutter, nats, tokens = Cutter(self.model, self.geometry, {}, False), 0.0, 0
        for start in range(0, len(items), self.args.batch_size):
            doc = cutter.prefill(*items[start : start + self.args.batch_size])
            ids = pad([item.answer for item in doc.items], 0).ids.to(doc.reference.device)
            nats -= float((doc.reference.gather(-1, ids.unsqueeze(-1)).squeeze(-1) * doc.scored).sum())
            tokens += int(doc.scored.sum())
        return nats / tokens


def spread(values: Iterable[float]) -> Spread:
    """Mean over heads and its interval."""
    found = list(values)
    return (float(np.mean(found)), *Bootstrap(len(found)).interval(found))


def variance_kept(basis: Basis, rank: int, covariance: Tensor) -> Tensor:
    """Share of the Keys' variance that the first `rank` directions hold: 1 - E|x - x̂|² / E|x|², fp64 [H]."""
    eye = torch.eye(covariance.shape[-1], dtype=torch.float64, device=covariance.device).expand_as(covariance)
    return 1 - logit_error(basis, rank, covariance, eye)


def explained(seen: dict[str, dict[int, Basis]], unseen: Moments, subject: Subject) -> list[dict[str, Any]]:
    """Rows of the table of explained variance."""
    rows = []
    for ratio, way in itertools.product(RATIOS, WAYS):
        keys: list[float] = []
        logits: list[float] = []
        for i, basis in seen[way].items():
            kept, covariance = int(ratio * subject.geometry.layers[i].head_dim), unseen.covariance(i, "visual", "key")
            keys += variance_kept(basis, kept, covariance).tolist()
            logits += (1 - logit_error(basis, kept, covariance, unseen.query_moment(i))).tolist()
        rows.append({"ratio": ratio, "way": way, "keys": spread(keys), "logits": spread(logits)})
    return rows


def drift(seen: Moments, unseen: Moments, single: Sequence[Moments], subject: Subject) -> dict[str, Spread]:
    """Agreement of leading subspaces of one model, mean and interval over its heads."""
    found: dict[str, list[float]] = {}
    for i in subject.geometry.compressible:
        count = subject.geometry.layers[i].head_dim // SHARE
        own, pages = seen.covariance(i, "visual", "key"), [one.covariance(i, "visual", "key") for one in single]
        pairs = [overlap(a, b, count) for a, b in itertools.combinations(pages, 2)]
        for name, values in (
            ("calibration and unseen pages", overlap(own, unseen.covariance(i, "visual", "key"), count)),
            ("calibration and a single page", torch.stack([overlap(own, page, count) for page in pages]).mean(0)),
            ("two single pages", torch.stack(pairs).mean(0)),
            ("image and text", overlap(own, seen.covariance(i, "text", "key"), count)),
            ("text of calibration and of unseen documents", overlap(*(m.covariance(i, "text", "key") for m in (seen, unseen)), count)),
        ):
            found.setdefault(name, []).extend(values.tolist())
    return {name: spread(values) for name, values in found.items()}


def between(one: list[Tensor], other: list[Tensor]) -> Spread:
    """Agreement of the heads of one model with the most like head of the same layer of another: covariances [H, D, D] by layer."""
    found: list[float] = []
    for a, b in zip(one, other, strict=False):
        count = a.shape[-1] // SHARE
        beside = [overlap(a, b[h].expand_as(a), count) for h in range(b.shape[0])]
        found += torch.stack(beside).amax(0).tolist()
    return spread(found)


def mixed(seen: Moments, unseen: Moments, pages: Documents, subject: Subject) -> list[dict[str, Any]]:
    """What bases of a mixed covariance lose, of images and of text."""
    rows, first = [], np.empty(0)
    for share in TEXT_SHARES:
        bases, errors = {}, {"visual": [], "text": []}  # type: dict[int, Basis], dict[str, list[float]]
        for i in subject.geometry.compressible:
            covariances = (seen.covariance(i, kind, "key") for kind in ("visual", "text"))
            mix = (1 - share) * next(covariances) + share * next(covariances)
            bases[i] = calibrated_basis("two-sided", mix, seen.query_moment(i))
            kept = subject.geometry.layers[i].head_dim // SHARE
            for kind, values in errors.items():
                values += logit_error(bases[i], kept, unseen.covariance(i, kind, "key"), unseen.query_moment(i)).tolist()
        kl, tokens = subject.kl(bases, pages)
        first = first if len(first) else kl
        rows.append({"text_share": share, "images": spread(errors["visual"]), "text": spread(errors["text"]), **_kl(kl, tokens, first)})
    return rows


def prompted(seen: dict[str, dict[int, Basis]], pages: Documents, subject: Subject) -> list[dict[str, Any]]:
    """What bases of images alone lose where more text stands before the question."""
    rows, visual = [], set(subject.geometry.visual_token_ids)
    first = np.empty(0)
    for words in PROMPT_WORDS:
        items = subject.with_text(pages, words)
        if max(len(item.prompt) + len(item.answer) for item in items) > subject.positions:
            break
        images = sum(token in visual for item in items for token in item.prompt)
        text = sum(len(item.prompt) for item in items) - images
        kl, tokens = subject.kl(seen["two-sided"], items)
        plain = subject.kl(seen["channels"], items)[0]
        first = first if len(first) else kl
        row = {"words": words, "text_share": text / (text + images), "surprise": subject.surprise(items), **_kl(kl, tokens, first)}
        resampled = Bootstrap(len(tokens))
        rows.append(row | {"over_channels": [float(kl.sum() / plain.sum()), *resampled.ratio(kl, plain)]})
    return rows


def _kl(kl: np.ndarray, tokens: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    resampled = Bootstrap(len(tokens))
    over = [float(kl.sum() / first.sum()), *resampled.ratio(kl, first)] if first.sum() > 0 else None
    return {"kl": [float(kl.sum() / tokens.sum()), *resampled.interval(kl, tokens)], "over_first": over}


def run(name: str, args: argparse.Namespace) -> tuple[dict[str, Any], list[Tensor]]:
    """Everything of one model, and the covariances of its Keys [H, D, D] by layer."""
    subject = Subject(name, args)
    pages = subject.documents("evaluation", args.documents)
    seen, unseen = subject.moments(subject.documents("calibration", args.num_samples)), subject.moments(pages)
    single = [subject.moments(pages[n : n + 1]) for n in range(args.single)]
    bases = {way: bases_of(seen, subject.geometry, way) for way in WAYS}
    found = {
        "explained": explained(bases, unseen, subject),
        "drift": drift(seen, unseen, single, subject),
        "calibration_mix": mixed(seen, unseen, pages, subject),
        "prompt_mix": prompted(bases, pages, subject),
    }
    return found, [seen.covariance(i, "visual", "key").cpu() for i in subject.geometry.compressible]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All models, and each beside the others."""
    models: dict[str, Any] = {}
    covariances: dict[str, list[Tensor]] = {}
    for name in args.models:
        short = Path(name).name
        models[short], covariances[short] = run(name, args)
    for name, own in covariances.items():
        generator = torch.Generator().manual_seed(args.seed)  # the same draws whichever models are measured together
        for other, beside in covariances.items():
            if other != name and own[0].shape[-1] == beside[0].shape[-1]:
                models[name]["drift"][f"the most like head of {other}"] = between(own, beside)
        drawn = [torch.linalg.qr(torch.randn(x.shape, generator=generator, dtype=torch.float64)).Q for x in own]
        levels = torch.linspace(1, 0, own[0].shape[-1], dtype=torch.float64)
        models[name]["drift"]["the most like of as many random subspaces"] = between(own, [(q * levels) @ q.mT for q in drawn])
    device = choose_device(args.device)
    return {
        "data": args.data,
        "num_samples": args.num_samples,
        "documents": args.documents,
        "single": args.single,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "models": models,
    }


def main() -> None:
    """Measure and save, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", type=Path, metavar="JSON", dest="file", help="only print these results")
    parser.add_argument("--models", nargs="+", default=["tiny-llava-next", "tiny-qwen3-vl"], help="aliases, paths or Hub ids")
    parser.add_argument("--data", default="mixed")
    parser.add_argument("--num-samples", type=int, default=48, help="calibration documents")
    parser.add_argument("--documents", type=int, default=36, help="evaluation documents")
    parser.add_argument("--single", type=int, default=8, help="of them, documents that are compared one by one")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    found = json.loads(args.file.read_text()) if args.file else measure(args)
    if not args.file:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "subspaces.json").write_text(json.dumps(found, indent=2) + "\n")
    for name in found["models"]:
        print("\n".join(lines(found, name)))


if __name__ == "__main__":
    main()
