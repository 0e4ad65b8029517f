"""What rotating Keys buys, apart from everything else: the same number kept of channels as they are, and of directions.

    python benchmarks/bench_rotation.py --output benchmarks/results            # both bundled models, on a CPU: ten minutes each
    python benchmarks/bench_rotation.py --print benchmarks/results/rotation-tiny-qwen3-vl.json

Bases are made from calibration documents; everything is measured on documents that they have not seen. Three ways to keep R of the D
numbers of a Key, the same R in every head, native precision, Values raw:

- *channels*: those of the largest query-weighted energy diag(C) diag(M), the static mask of ThinK and LeanK. No rotation.
- *pca*: the leading eigenvectors of the Keys' covariance C.
- *two-sided*: the directions of least expected logit error (bases.py).

Figures: expected squared logit error over that of keeping nothing, tr(M (I-P) C (I-P)ᵀ) / tr(M C), mean over heads; measured KL to the
dense model, per answer token, with intervals, and its ratio to that of the channels. Then how far the leading D/4 directions of different
Keys agree: the mean squared cosine of principal angles, 1 for the same subspace, 1/4 for unrelated ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bench_plans import measured_on
from torch import Tensor

from rotatek_compile.allocate import uniform_plan
from rotatek_compile.bases import Basis, calibrated_basis, symmetric_eigen
from rotatek_compile.batches import Encoded, end_ids, rope_index
from rotatek_compile.calibrate import MomentStore, calibrate
from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.cutter import Cutter
from rotatek_compile.documents import Documents, usable
from rotatek_compile.geometry import Geometry
from rotatek_compile.models import checked_geometry, choose_device, choose_dtype, load_config, load_model, load_processor, resolve
from rotatek_compile.moments import Moments
from rotatek_compile.statistics import Bootstrap

WAYS = ("channels", "pca", "two-sided")
RATIOS = (1 / 8, 1 / 4, 1 / 2)
SHARE = 4  # subspaces of D / SHARE directions are compared


def channels(covariance: Tensor, moment: Tensor) -> Basis:
    """No rotation: channels in the order of their query-weighted energy, as a basis [H, D, D] of unit vectors."""
    energy = covariance.diagonal(dim1=-2, dim2=-1) * moment.diagonal(dim1=-2, dim2=-1)
    order = energy.argsort(dim=-1, descending=True, stable=True)
    units = torch.eye(energy.shape[-1], dtype=torch.float64, device=energy.device)[order].mT.contiguous()
    return Basis(units, units, energy.gather(-1, order).double())


def bases_of(moments: Moments, geometry: Geometry, way: str) -> dict[int, Basis]:
    """Of the Keys of images, by layer."""
    made = {}
    for i in geometry.compressible:
        parts = moments.covariance(i, "visual", "key"), moments.query_moment(i)
        made[i] = channels(*parts) if way == "channels" else calibrated_basis(way, *parts)
    return made


def logit_error(basis: Basis, rank: int, covariance: Tensor, moment: Tensor) -> Tensor:
    """Expected squared logit error of keeping the first `rank` directions over that of keeping none: fp64 [H]."""
    covariance, moment = covariance.double(), moment.double()
    eye = torch.eye(covariance.shape[-1], dtype=torch.float64, device=covariance.device)
    lost = eye - basis.decode[..., :rank].double() @ basis.encode[..., :rank].double().mT
    error = (moment @ lost @ covariance @ lost.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
    return error / (moment @ covariance).diagonal(dim1=-2, dim2=-1).sum(-1)


def overlap(one: Tensor, other: Tensor, count: int) -> Tensor:
    """Mean squared cosine of the principal angles between the leading subspaces of two covariances [H, D, D]: fp64 [H]."""
    a, b = (symmetric_eigen(x)[1][..., :count] for x in (one, other))
    return (a.mT @ b).square().sum((-2, -1)) / count


def agreement(seen: Moments, unseen: Moments, single: Sequence[Moments], geometry: Geometry) -> dict[str, float]:
    """Mean over layers and heads of `overlap` between Keys of different origin."""
    found: dict[str, list[float]] = {"calibration and unseen pages": [], "two single pages": [], "image and text": []}
    for i in geometry.compressible:
        count = geometry.layers[i].head_dim // SHARE
        own = seen.covariance(i, "visual", "key")
        found["calibration and unseen pages"] += overlap(own, unseen.covariance(i, "visual", "key"), count).tolist()
        found["image and text"] += overlap(own, seen.covariance(i, "text", "key"), count).tolist()
        for one, other in itertools.combinations(single, 2):
            pages = (one.covariance(i, "visual", "key"), other.covariance(i, "visual", "key"))
            found["two single pages"] += overlap(*pages, count).tolist()
    return {name: float(np.mean(values)) for name, values in found.items()}


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything of one model."""
    source = resolve(name)
    config = load_config(source)
    geometry, device = checked_geometry(config), choose_device(args.device)
    model, processor = load_model(source, choose_dtype("float32", config, device), device), load_processor(source)
    eos, rope, pad_id = end_ids(model)[0], rope_index(model), processor.tokenizer.pad_token_id or 0

    def documents(split: str, count: int) -> Documents:
        data = open_data(args.data, split, args.seed)
        return Documents(data, usable(data, count, False), processor, geometry, eos, rope)

    def moments_of(items: Sequence[Encoded]) -> Moments:
        with tempfile.TemporaryDirectory() as scratch:
            return calibrate(model, items, geometry, MomentStore({}, Path(scratch)), args.batch_size, False, pad_id, quiet=True)

    pages = documents("evaluation", args.documents)
    seen, unseen = moments_of(documents("calibration", args.num_samples)), moments_of(pages)
    single = [moments_of(pages[n : n + 1]) for n in range(args.single)]
    errors: dict[str, list[float]] = {}
    kl: dict[str, np.ndarray] = {}
    for way in WAYS:
        bases = bases_of(seen, geometry, way)
        errors[way] = []
        for ratio in RATIOS:
            heads = []
            for i, basis in bases.items():
                kept = int(ratio * geometry.layers[i].head_dim)
                heads.append(logit_error(basis, kept, unseen.covariance(i, "visual", "key"), unseen.query_moment(i)))
            errors[way].append(float(torch.cat(heads).mean()))
        plans = [uniform_plan(geometry, ratio, "native") for ratio in RATIOS]
        kl[way], tokens = measured_on(Cutter(model, geometry, bases, False), pages, plans, geometry.rows_at_once(args.batch_size))
    resampled = Bootstrap(len(tokens))
    return {
        "model": name,
        "data": args.data,
        "num_samples": args.num_samples,
        "documents": len(tokens),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": [
            {
                "ratio": ratio,
                "way": way,
                "logit_error": errors[way][n],
                "kl": float(kl[way][n].sum() / tokens.sum()),
                "kl_interval": resampled.interval(kl[way][n], tokens),
                "over_channels": float(kl[way][n].sum() / kl["channels"][n].sum()),
                "over_channels_interval": resampled.ratio(kl[way][n], kl["channels"][n]),
            }
            for n, ratio in enumerate(RATIOS)
            for way in WAYS
        ],
        "overlap": agreement(seen, unseen, single, geometry),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Both tables of one model as markdown."""
    words = f"{found['num_samples']} calibration and {found['documents']} other documents of {found['data']}, float32"
    out = [f"{found['model']}, {words}, {found['device']}, torch {found['torch']}, transformers {found['transformers']}", ""]
    out += ["| kept of D | what | expected logit error | KL per token | over the channels' |", "|---|---|---|---|---|"]
    for row in found["rows"]:
        (low, high), (least, most) = row["kl_interval"], row["over_channels_interval"]
        ratio = "1" if row["way"] == WAYS[0] else f"{row['over_channels']:.2g} [{least:.2g}, {most:.2g}]"
        kl = f"{row['kl']:.1e} [{low:.1e}, {high:.1e}]"
        out.append(f"| 1/{round(1 / row['ratio'])} | {row['way']} | {row['logit_error']:.3f} | {kl} | {ratio} |")
    out += ["", "| leading D/4 directions of the Keys of | mean squared cosine |", "|---|---|"]
    return out + [f"| {name} | {value:.2f} |" for name, value in found["overlap"].items()]


def main() -> None:
    """Measure and save, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", type=Path, nargs="+", metavar="JSON", dest="files", help="only print these results")
    parser.add_argument("--models", nargs="+", default=["tiny-llava-next", "tiny-qwen3-vl"], help="aliases, paths or Hub ids")
    parser.add_argument("--data", default="mixed")
    parser.add_argument("--num-samples", type=int, default=96, help="calibration documents")
    parser.add_argument("--documents", type=int, default=120, help="evaluation documents")
    parser.add_argument("--single", type=int, default=8, help="of them, pages that are compared one by one")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    for file in args.files or []:
        print("\n".join([*lines(json.loads(file.read_text())), ""]))
    for name in [] if args.files else args.models:
        found = run(name, args)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"rotation-{Path(name).name}.json").write_text(json.dumps(found, indent=2) + "\n")
        print("\n".join([*lines(found), ""]))


if __name__ == "__main__":
    main()
