"""Rerun what the committed evidence says, as far as it is small enough for a CPU, and compare: what `make evidence` runs.

    python benchmarks/evidence.py                                  # both bundled models, three calibrations each
    python benchmarks/evidence.py --models tiny-qwen3-vl --seeds 0 --documents 9 --only suite --jobs 2

For every model: artifacts are compiled from one seed of the calibration documents each, LeanK and Palu learn from those of the first
(learn_leank.py, learn_palu.py), `rotatek-eval --suite proof` measures every method with all of them; rotation and subspaces are measured
again as they are committed (bench_rotation.py, bench_subspaces.py). Each result is compared with what is committed: rows of the suite as
check_results.py says, figures of the others as check_figures.py does. Then the tables of README and docs are checked against the results.

What does not wait for anything else runs side by side, in --jobs processes of cores / jobs threads each; the suite is divided among them
by batches, which changes no outcome. Every step says how long it may take and took; what it printed is in --work; what is finished is kept
there and not run again. Exit status 1 names what is outside.

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
from collections.abc import Sequence
from pathlib import Path

from check_figures import gone, outside
from check_results import FEWEST
from side_by_side import Command, together, usual_jobs

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
OPTIONS = "options.json"  # in --work: of which run it is
STEPS = ("suite", "rotation", "subspaces", "tables")
BATCH = 4  # documents that rotatek-eval answers at once, by default: a part of the suite is at least one batch
# minutes on a quiet core of 2026, for the sentence before a step: of a calibration document, of a document by one method in one mode, ...
COMPILING, ANSWERING, ENTRIES, CALIBRATED = 2.5 / 60, 0.35 / 60, 73, 46
MEASURING = {"rotation": 8.0, "subspaces": 12.0}  # of one model
LEANK, PALU = 35.0, 3.0  # of training one model


def tool(name: str) -> str:
    """A console command of this environment."""
    return str(Path(sys.executable).with_name(name))


def script(name: str, *words: str) -> list[str]:
    """A script of this folder."""
    return [sys.executable, str(HERE / name), *words]


class Evidence:
    """Runs commands, each in a process of its own, and collects what is outside."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.problems = args, []  # type: argparse.Namespace, list[str]
        self.unchecked: list[str] = []  # what has nothing committed beside it
        self.began = time.monotonic()

    def all(self) -> int:
        """Everything that was asked for."""
        self.args.work.mkdir(parents=True, exist_ok=True)
        self.same_options()
        models, only = self.args.models, self.args.only
        suites = models if "suite" in only else []
        commands = self.all_measuring()
        for model in suites:
            commands += [*self.artifacts(model), *self.learned(model), *self.parts(model)]
        together(commands, self.args.jobs, self.args.work)
        for model in models:
            if model in suites:
                self.suite(model)
            for step in ("rotation", "subspaces"):
                if step in only:
                    self.figures(model, step)
        if "tables" in only and self.show(script("fill_tables.py", "--check")):
            self.problems.append("tables of README and docs are not what the committed results print")
        good = "what could be compared is as committed" if self.unchecked else "all as committed"
        words = "; ".join(self.problems) or good
        words += f" (not compared: {', '.join(self.unchecked)})" if self.unchecked else ""
        print(f"{(time.monotonic() - self.began) / 60:.1f} minutes; {words}")
        return int(bool(self.problems))

    def same_options(self) -> None:
        """What --work keeps is of these options. Raises SystemExit if it is of others, which would be taken for theirs."""
        options, file = {name: getattr(self.args, name) for name in ("data", "num_samples", "documents", "seeds")}, self.args.work / OPTIONS
        if not file.exists():
            file.write_text(json.dumps(options) + "\n", encoding="utf-8")
        for name, kept in json.loads(file.read_text(encoding="utf-8")).items():
            if kept != options.get(name):
                option = name.replace("_", "-")
                raise SystemExit(f"error: {self.args.work} holds a run with --{option} {kept}; give the same, or another --work")

    def show(self, command: Sequence[str]) -> int:
        """One command that is done at once, what it prints shown; returns its status."""
        return subprocess.run(command, check=False).returncode

    def artifacts(self, model: str) -> list[Command]:
        """One for each seed."""
        found, args = [], self.args
        for seed in args.seeds:
            target = args.work / f"{model}-{seed}"
            options = ["--model", model, "--calib", args.data, "--num-samples", str(args.num_samples), "--seed", str(seed)]
            options += ["--kv-budget", "0.0625", "--device", args.device, "-o", str(target), "--overwrite", "--quiet"]
            minutes, made = COMPILING * args.num_samples, target / "rotatek_config.json"
            found.append(Command(f"compile {model}, seed {seed}", [tool("rotatek-compile"), *options], minutes, made))
        return found

    def learned(self, model: str) -> list[Command]:
        """Files of what rivals learn by training, from the documents of the first seed."""
        found, args = [], self.args
        options = ["--model", model, "--calib", args.data, "--num-samples", str(args.num_samples), "--seed", str(args.seeds[0])]
        for name, minutes in (("learn_leank.py", LEANK), ("learn_palu.py", PALU)):
            file = args.work / f"{name.removesuffix('.py')}-{model}.safetensors"
            command = script(name, *options, "--device", args.device, "--quiet", "--output", str(file))
            found.append(Command(f"{name}, {model}", command, minutes, file))
        return found

    def evaluation(self, model: str) -> list[str]:
        """rotatek-eval of every method at every budget, both modes."""
        args = self.args
        first, *others = [str(command.made.parent) for command in self.artifacts(model) if command.made]
        options = ["--data", args.data, "--suite", "proof", "--num-samples", str(args.documents), "--device", args.device, "--quiet"]
        options += ["--batch-size", str(BATCH), "--output", str(self.proof(model))]
        options += [word for other in others for word in ("--also", other)]
        options += [word for command in self.learned(model) for word in ("--learned", str(command.made))]
        return [tool("rotatek-eval"), first, *options]

    def proof(self, model: str) -> Path:
        """Folder of its results."""
        return self.args.work / f"proof-{model}"

    def answering(self) -> float:
        """Minutes that one core takes for the suite of one model."""
        return ANSWERING * 2 * self.args.documents * (ENTRIES + CALIBRATED * len(self.args.seeds))

    def parts(self, model: str) -> list[Command]:
        """The suite in as many parts as an earlier run had, or as there are jobs; none once they are together."""
        target, args = self.proof(model), self.args
        if (target / "documents.jsonl").exists():
            return []
        begun = [int(file.stem.rsplit("-", 1)[1]) for file in target.glob("documents-*-of-*.jsonl")]
        count = begun[0] if begun else min(args.jobs, -(-args.documents // BATCH))
        if count == 1:
            return []  # `suite` measures it
        found, minutes = [], self.answering() / count
        needs = tuple(one.made for one in (*self.artifacts(model), *self.learned(model)) if one.made)
        for number in range(1, count + 1):
            shard = f"{number}/{count}"
            resume = ["--resume"] if (target / f"documents-{number}-of-{count}.jsonl").exists() else []
            command = [*self.evaluation(model), "--shard", shard, *resume]
            found.append(Command(f"{model}, every method, part {shard} of {args.documents} documents", command, minutes, needs=needs))
        return found

    def suite(self, model: str) -> None:
        """The parts put together, or all of it where there are none, and compared."""
        target, words = self.proof(model), f"{model}, every method on {self.args.documents} documents"
        if any(target.glob("documents*.jsonl")):
            together([Command(f"{words}, put together", [*self.evaluation(model), "--resume"], 0.0)], self.args.jobs, self.args.work)
        else:
            together([Command(words, self.evaluation(model), self.answering())], self.args.jobs, self.args.work)
        if self.args.save:
            shutil.copyfile(target / "results.csv", RESULTS / f"evidence-{model}.csv")
        committed = [file for file in (RESULTS / f"evidence-{model}.csv", RESULTS / f"proof-{model}.csv") if file.exists()]
        if not committed:
            print(f"{model}: no committed results to compare with")
            self.unchecked.append(f"{model}: the suite")
        elif self.show(script("check_results.py", str(committed[0]), str(target / "results.csv"), "--some")):
            self.problems.append(f"{model}: rows of the suite")

    def measuring(self, step: str, models: Sequence[str]) -> Command:
        """Rotation on and off at the same count; or explained variance, drift and mixes. By their own defaults, as is committed."""
        file = self.args.work / f"bench_{step}" / "+".join(models) / figures_of(models[0], step)
        options = ["--models", *models, "--data", self.args.data, "--device", self.args.device, "--output", str(file.parent)]
        minutes = MEASURING[step] * len(models)
        return Command(f"bench_{step}.py, {' '.join(models)}", script(f"bench_{step}.py", *options), minutes, file)

    def all_measuring(self) -> list[Command]:
        """Of the steps asked for; subspaces of all models in one, because they are compared with each other's."""
        models, only = self.args.models, self.args.only
        found = [self.measuring("rotation", [model]) for model in models if "rotation" in only]
        return [*found, self.measuring("subspaces", models)] if "subspaces" in only else found

    def figures(self, model: str, step: str) -> None:
        """Compare what a script measured."""
        name, words = figures_of(model, step), f"bench_{step}.py"
        if not (RESULTS / name).exists():
            print(f"no committed results/{name} to compare with")
            self.unchecked.append(f"{model}: {words}")
            return
        made = self.measuring(step, self.args.models if step == "subspaces" else [model]).made
        assert made is not None
        old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS / name, made))
        same = old["documents"] == new["documents"] and old["num_samples"] == new["num_samples"]
        if "models" in new:
            old, new = old["models"].get(model), new["models"][model]
        if old is None:
            print(f"no committed figures of {model} in results/{name} to compare with")
            self.unchecked.append(f"{model}: {words}")
            return
        said, lacking = outside(old, new, same), gone(old, new)
        if lacking:
            print("\n".join(f"{one}: committed, and not in the rerun" for one in lacking))
            self.unchecked.append(f"{model}: {len(lacking)} figures of {words}")
        print("\n".join([*said, f"{words}, {model}: {len(said)} figures outside"]), flush=True)
        self.problems += [f"{model}: {len(said)} figures of {words}"] if said else []


def figures_of(model: str, step: str) -> str:
    """File of its figures, here and in results/."""
    return f"rotation-{model}.json" if step == "rotation" else "subspaces.json"


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-llava-next", "tiny-qwen3-vl"])
    parser.add_argument("--data", default="mixed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibration, an artifact each")
    parser.add_argument("--num-samples", type=int, default=144, help="calibration documents")
    parser.add_argument("--documents", type=int, default=18, help="evaluation documents of the suite")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--jobs", type=int, help="processes at a time, up to 7 GB each; by default as cores and memory allow, on another device 1"
    )
    parser.add_argument("--save", action="store_true", help="commit these results of the suite: write results/evidence-MODEL.csv")
    parser.add_argument("--work", type=Path, default=Path("artifacts/evidence"), help="artifacts and results, kept between runs")
    args = parser.parse_args()
    args.jobs = args.jobs if args.jobs is not None else usual_jobs() if args.device == "cpu" else 1
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} is out of range; it must be at least 1")
    if "suite" in args.only and args.documents < FEWEST:
        parser.error(f"--documents {args.documents} are too few to compare; pass {FEWEST} or more")
    try:
        return Evidence(args).all()
    except KeyboardInterrupt:
        print("interrupted; steps that are finished are kept, run again to go on with the others", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
