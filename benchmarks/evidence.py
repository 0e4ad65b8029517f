"""Rerun what the committed evidence says, as far as it is small enough for a CPU, and compare: what `make evidence` runs.

    python benchmarks/evidence.py                                  # both bundled models, three calibrations each
    python benchmarks/evidence.py --models tiny-qwen3-vl --seeds 0 --documents 9 --only suite

For every model: artifacts are compiled from one seed of the calibration documents each, LeanK and Palu learn from those of the first
(learn_leank.py, learn_palu.py), `rotatek-eval --suite proof` measures every method with all of them, rotation and subspaces are measured
again (bench_rotation.py, bench_subspaces.py). Each result is compared with what is committed: rows of the suite as check_results.py says,
figures of the others by their intervals. Then the tables of README and docs are checked against the committed results. Every step says
how long it took, long ones beforehand how long they may; finished ones are kept in --work and not run again. Exit status 1 names what is
outside.

Rows are compared with results/evidence-MODEL.csv, which --save writes from such a run of the defaults, so that documents are the same;
where there is none, with the larger run of results/proof-MODEL.csv, whose intervals have to meet.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
OPTIONS = "options.json"  # in --work: of which run it is
STEPS = ("suite", "rotation", "subspaces", "tables")
# minutes on a quiet core of 2026, for the sentence before a step: of a calibration document, of a document by one method in one mode, ...
COMPILING, ANSWERING, ENTRIES, CALIBRATED, ROTATING, SUBSPACES = 2.5 / 60, 0.35 / 60, 73, 46, 0.05, 0.15
LEANK, PALU = 12.0, 2.0  # of training one model
Plain = dict[str, Any] | list[Any] | float | str | None


def figures(found: Plain, path: str = "") -> Iterator[tuple[str, float, float, float]]:
    """Every figure that has an interval: (name, value, low, high). Either `x` beside `x_interval`, or a list of three numbers in order."""
    if isinstance(found, dict):
        about = ", ".join(str(found[key]) for key in ("ratio", "way", "text_share", "words") if key in found)
        here = f"{path} ({about})" if about else path
        for key, value in found.items():
            interval = found.get(f"{key}_interval")
            if isinstance(interval, list) and isinstance(value, int | float):
                yield f"{here}/{key}", float(value), float(interval[0]), float(interval[1])
            else:
                yield from figures(value, f"{here}/{key}")
    elif isinstance(found, list):
        if len(found) == 3 and all(isinstance(x, int | float) for x in found):
            yield path, float(found[0]), float(found[1]), float(found[2])
        else:
            for value in found:
                yield from figures(value, path)


def outside(old: Plain, new: Plain, same: bool, slack: float = 1e-6) -> list[str]:
    """Figures of a rerun that are not within the committed interval (`same` documents), or whose interval does not meet it."""
    committed = {name: values for name, *values in figures(old)}
    said = []
    for name, value, low, high in figures(new):
        if name not in committed:
            continue
        was, least, most = committed[name]
        least, most = min(least, was) - slack - 1e-3 * abs(was), max(most, was) + slack + 1e-3 * abs(was)
        seen = (value, value) if same else (low, high)
        if not (seen[1] >= least and seen[0] <= most):
            said.append(f"{name.lstrip('/')}: {value:.3g} [{low:.3g}, {high:.3g}], committed {was:.3g} [{least:.3g}, {most:.3g}]")
    return said


def gone(old: Plain, new: Plain) -> list[str]:
    """Names of committed figures that a rerun does not have."""
    found = {name for name, *_ in figures(new)}
    return [name.lstrip("/") for name, *_ in figures(old) if name not in found]


class Evidence:
    """Runs steps, each in a process of its own, and collects what is outside."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.problems = args, []  # type: argparse.Namespace, list[str]
        self.unchecked: list[str] = []  # what has nothing committed beside it
        self.began = time.monotonic()

    def run(self, words: str, command: Sequence[str], minutes: float = 0.0, fails: bool = True) -> int:
        """One command; its time is said. Raises SystemExit if it fails and `fails`."""
        expected = f" (about {minutes:.0f} minutes on a quiet core)" if minutes >= 1 else ""
        print(f"{words}{expected} ...", flush=True)
        start = time.monotonic()
        status = subprocess.run(command, check=False).returncode
        print(f"{words}: {time.monotonic() - start:.0f} s", flush=True)
        if status and fails:
            raise SystemExit(f"error: {words} ended with status {status}; what is finished is kept, run again to go on")
        return status

    def tool(self, name: str) -> list[str]:
        """A console command of this environment."""
        return [str(Path(sys.executable).with_name(name))]

    def script(self, name: str, *words: str) -> list[str]:
        """A script of this folder."""
        return [sys.executable, str(HERE / name), *words]

    def artifacts(self, model: str) -> list[str]:
        """One for each seed; those that are there already are used."""
        made = []
        for seed in self.args.seeds:
            target = self.args.work / f"{model}-{seed}"
            options = ["--calib", self.args.data, "--num-samples", str(self.args.num_samples), "--seed", str(seed)]
            if not (target / "rotatek_config.json").exists():
                words = f"compile {model}, seed {seed}"
                compiling = [
                    *self.tool("rotatek-compile"),
                    "--model",
                    model,
                    *options,
                    "--kv-budget",
                    "0.0625",
                    "--device",
                    self.args.device,
                ]
                self.run(words, [*compiling, "-o", str(target), "--overwrite", "--quiet"], COMPILING * self.args.num_samples)
            made.append(str(target))
        return made

    def learned(self, model: str) -> list[str]:
        """Files of what rivals learned by training; those that are there already are used."""
        made = []
        options = [
            "--model",
            model,
            "--calib",
            self.args.data,
            "--num-samples",
            str(self.args.num_samples),
            "--seed",
            str(self.args.seeds[0]),
        ]
        for script, minutes in (("learn_leank.py", LEANK), ("learn_palu.py", PALU)):
            file = self.args.work / f"{script.removesuffix('.py')}-{model}.safetensors"
            if not file.exists():
                command = self.script(script, *options, "--device", self.args.device, "--quiet", "--output", str(file))
                self.run(f"{script}, {model}", command, minutes)
            made.append(str(file))
        return made

    def suite(self, model: str) -> None:
        """Every method at every budget, both modes."""
        first, *others = self.artifacts(model)
        target = self.args.work / f"proof-{model}"
        options = ["--data", self.args.data, "--suite", "proof", "--num-samples", str(self.args.documents), "--device", self.args.device]
        options += [word for other in others for word in ("--also", other)]
        options += [word for file in self.learned(model) for word in ("--learned", file)]
        options += ["--output", str(target), "--quiet", *(["--resume"] if (target / "documents.jsonl").exists() else [])]
        answers = 2 * self.args.documents * (ENTRIES + CALIBRATED * len(self.args.seeds))
        with (self.args.work / f"proof-{model}.txt").open("w") as shown:
            words = f"{model}, every method on {self.args.documents} documents"
            print(f"{words} (about {ANSWERING * answers:.0f} minutes on a quiet core) ...", flush=True)
            start = time.monotonic()
            ended = subprocess.run([*self.tool("rotatek-eval"), first, *options], check=False, stdout=shown)
        print(f"{words}: {time.monotonic() - start:.0f} s", flush=True)
        if ended.returncode:
            raise SystemExit(f"error: rotatek-eval ended with status {ended.returncode}; run again to go on where it stopped")
        if self.args.save:
            shutil.copyfile(target / "results.csv", RESULTS / f"evidence-{model}.csv")
        committed = [file for file in (RESULTS / f"evidence-{model}.csv", RESULTS / f"proof-{model}.csv") if file.exists()]
        if not committed:
            print(f"{model}: no committed results to compare with")
            self.unchecked.append(f"{model}: the suite")
        elif self.run("compare", self.script("check_results.py", str(committed[0]), str(target / "results.csv"), "--some"), fails=False):
            self.problems.append(f"{model}: rows of the suite")

    def rotation(self, model: str) -> None:
        """Rotation on and off at the same count."""
        options = ["--models", model, "--num-samples", "48", "--documents", str(max(self.args.documents, 24)), "--single", "3"]
        self.figures(f"rotation-{model}.json", "bench_rotation.py", options, ROTATING * 3 * max(self.args.documents, 24))

    def subspaces(self, model: str) -> None:
        """Explained variance, drift, mixes."""
        options = ["--models", model, "--num-samples", "24", "--documents", str(self.args.documents), "--single", "6"]
        self.figures("subspaces.json", "bench_subspaces.py", options, SUBSPACES * (24 + 9 * self.args.documents))

    def figures(self, name: str, script: str, options: Sequence[str], minutes: float) -> None:
        """Run a script that writes JSON, and compare it with what is committed."""
        model = options[1]
        target = self.args.work / script.removesuffix(".py") / model
        file = target / name
        if not file.exists():
            self.run(f"{script}, {model}", self.script(script, *options, "--output", str(target)), minutes)
        if not (RESULTS / name).exists():
            print(f"no committed results/{name} to compare with")
            self.unchecked.append(f"{model}: {script}")
            return
        old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS / name, file))
        same = old["documents"] == new["documents"] and old["num_samples"] == new["num_samples"]
        if "models" in new:
            old, new = old["models"].get(model), new["models"][model]
        if old is None:
            print(f"no committed figures of {model} in results/{name} to compare with")
            self.unchecked.append(f"{model}: {script}")
            return
        said, lacking = outside(old, new, same), gone(old, new)
        if lacking:
            print("\n".join(f"{one}: committed, and not in the rerun" for one in lacking))
            self.unchecked.append(f"{model}: {len(lacking)} figures of {script}")
        print("\n".join([*said, f"{script}, {model}: {len(said)} figures outside"]), flush=True)
        self.problems += [f"{model}: {len(said)} figures of {script}"] if said else []

    def all(self) -> int:
        """Everything that was asked for."""
        self.args.work.mkdir(parents=True, exist_ok=True)
        self.same_options()
        for model in self.args.models:
            for step in ("suite", "rotation", "subspaces"):
                if step in self.args.only:
                    getattr(self, step)(model)
        if "tables" in self.args.only and self.run("tables of README and docs", self.script("fill_tables.py", "--check"), fails=False):
            self.problems.append("tables of README and docs are not what the committed results print")
        good = "what could be compared is as committed" if self.unchecked else "all as committed"
        words = "; ".join(self.problems) or good
        words += f" (not compared: {', '.join(self.unchecked)})" if self.unchecked else ""
        print(f"{(time.monotonic() - self.began) / 60:.1f} minutes; {words}")
        return int(bool(self.problems))

    def same_options(self) -> None:
        """What --work keeps is of these options. Raises SystemExit if it is of others, which would be taken for theirs."""
        options, file = {name: getattr(self.args, name) for name in ("data", "num_samples", "documents")}, self.args.work / OPTIONS
        if not file.exists():
            file.write_text(json.dumps(options) + "\n", encoding="utf-8")
        for name, kept in json.loads(file.read_text(encoding="utf-8")).items():
            if kept != options.get(name):
                option = name.replace("_", "-")
                raise SystemExit(f"error: {self.args.work} holds a run with --{option} {kept}; give the same, or another --work")


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-llava-next", "tiny-qwen3-vl"])
    parser.add_argument("--data", default="mixed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibration, an artifact each")
    parser.add_argument("--num-samples", type=int, default=144, help="calibration documents")
    parser.add_argument("--documents", type=int, default=18, help="evaluation documents")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true", help="commit these results of the suite: write results/evidence-MODEL.csv")
    parser.add_argument("--work", type=Path, default=Path("artifacts/evidence"), help="artifacts and results, kept between runs")
    return Evidence(parser.parse_args()).all()


if __name__ == "__main__":
    sys.exit(main())
