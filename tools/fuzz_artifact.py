"""Feed the reader of artifacts damaged and hostile ones, and count what it does.

    python tools/fuzz_artifact.py --cases 20000 --workers 2
    python tools/fuzz_artifact.py --only 4711            # one case again, in words

A case fails where the reader ends in anything but a refusal of one sentence or a sound artifact; opens a file outside the directory, or
any for writing; reaches for the network or another process; takes more than 30 seconds or 320 MB; or dies. Exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 320 << 20  # the largest JSON that is read (8 MB) takes up to thirty times its text
SILENCE = 90.0  # seconds after which a worker that says nothing is taken for hung


def main() -> None:
    options = arguments()
    if options.worker is not None:
        work(options)
    elif options.only is not None:
        show(options)
    else:
        sys.exit(run(options))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="one case by its number")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


# -- the worker -----------------------------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Cases worker, worker + workers, ... from `start` on, each announced before it runs; what it gave is one line of JSON."""
    import torch
    from artifact_trust.guard import Watch, limit_space
    from artifact_trust.reading import read_and_use, sound_artifacts

    torch.set_num_threads(1)
    bases = sound_artifacts()
    watch = Watch(ROOT)
    with tempfile.TemporaryDirectory(prefix="rotatek-fuzz-") as folder:
        place = Path(folder).resolve()
        (place / "outside.json").write_text('{"format_version": 1}')
        for number, base in enumerate(bases):  # imports what is imported lazily, and shows that the undamaged are accepted
            target = place / f"sound-{number}"
            target.mkdir()
            for name, content in base.items():
                (target / name).write_bytes(content)
            artifact, refusal = read_and_use(target)
            assert artifact is not None, refusal
        limit_space()
        for number in range(options.start, options.cases):
            if number % options.workers == options.worker:
                print(number, flush=True)
                print(json.dumps(one(bases, options.seed, number, place / "case", watch)), flush=True)


def one(bases: list[dict[str, bytes]], seed: int, number: int, directory: Path, watch: Any) -> dict[str, Any]:
    """Run a case: what became of it, and what was wrong (None if nothing)."""
    from artifact_trust.guard import TooSlow, alarm, peak, reset_peak
    from artifact_trust.mutations import make_case
    from artifact_trust.reading import read_and_use, wrong_artifact, wrong_refusal

    case = make_case(bases, seed, number)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    case.write(directory)
    before, started = reset_peak(), time.perf_counter()
    artifact, refusal, wrong = None, None, None
    try:
        with watch.over(directory), alarm():
            artifact, refusal = read_and_use(directory)
    except TooSlow:
        wrong = "too slow"
    except Exception as error:
        wrong = f"{type(error).__name__}: {str(error)[:300]} at {traceback.extract_tb(error.__traceback__)[-1]}"
    seconds, grown = time.perf_counter() - started, peak() - before
    if wrong is None and watch.seen:
        wrong = f"did what a reader may not: {watch.seen[:3]}"
    if wrong is None and grown > MOST_BYTES:
        wrong = f"took {grown >> 20} MB"
    if wrong is None:
        wrong = wrong_refusal(refusal) if refusal is not None else wrong_artifact(artifact, directory)  # type: ignore[arg-type]
    return {"accepted": artifact is not None, "refusal": refusal, "wrong": wrong, "seconds": seconds, "grown": grown, "done": case.done}


# -- the parent -----------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Counts:
    """What all cases gave."""

    accepted: int = 0
    refused: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    grown: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, found: dict[str, Any]) -> None:
        self.seconds, self.grown = max(self.seconds, found["seconds"]), max(self.grown, found["grown"])
        if found["wrong"] is not None:
            self.failed.append(f"case {number} ({'; '.join(found['done'])}): {found['wrong']}")
        elif found["accepted"]:
            self.accepted += 1
        else:
            self.refused += 1
            self.reasons[kind_of(found["refusal"])] += 1


def kind_of(refusal: str) -> str:
    """A refusal without its values, to count kinds."""
    words = refusal.split(":", 1)[-1] if ": " in refusal else refusal
    return " ".join(word for word in words.split()[:7] if word.isalpha())


def run(options: argparse.Namespace) -> int:
    """All cases in worker processes; prints the counts and returns the exit code."""
    import threading

    counts, lock, started = Counts(), threading.Lock(), time.perf_counter()
    threads = [threading.Thread(target=supervise, args=(options, worker, counts, lock)) for worker in range(options.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ran = counts.accepted + counts.refused + len(counts.failed)
    print(f"{ran} cases (seed {options.seed}): {counts.refused} refused, {counts.accepted} accepted and sound, {len(counts.failed)} failed")
    print(f"slowest {counts.seconds:.2f} s, most memory {counts.grown / 2**20:.0f} MB, {time.perf_counter() - started:.0f} s in all")
    print(
        f"{len(counts.reasons)} kinds of refusals; the most frequent: " + ", ".join(f"{w} ({n})" for w, n in counts.reasons.most_common(5))
    )
    for words in counts.failed[:20]:
        print(f"FAILED {words}")
    return 1 if counts.failed or ran != options.cases else 0


def supervise(options: argparse.Namespace, worker: int, counts: Counts, lock: Any) -> None:
    """Run one worker, and another after each death, from the case after the one it died in."""
    start = 0
    while start < options.cases:
        words = [sys.executable, __file__, "--worker", worker, "--start", start, "--cases", options.cases, "--seed", options.seed]
        process = subprocess.Popen([*map(str, words), "--workers", str(options.workers)], stdout=subprocess.PIPE, text=True)
        number, start = None, options.cases
        assert process.stdout is not None
        while line := next_line(process):
            if line.startswith("{"):
                with lock:
                    counts.add(number, json.loads(line))  # type: ignore[arg-type]
                number = None
            else:
                number = int(line)
        process.kill()
        code = process.wait()
        if number is not None:
            with lock:
                counts.failed.append(f"case {number}: the reader hung or died (exit code {code})")
            start = number + 1


def next_line(process: subprocess.Popen[str]) -> str | None:
    """The next line of a worker; None at its end or after SILENCE."""
    import threading

    assert process.stdout is not None
    timer = threading.Timer(SILENCE, process.kill)
    timer.start()
    try:
        return process.stdout.readline() or None
    finally:
        timer.cancel()


def show(options: argparse.Namespace) -> None:
    """One case, with what was done and what the reader said."""
    from artifact_trust.guard import Watch
    from artifact_trust.reading import sound_artifacts

    with tempfile.TemporaryDirectory(prefix="rotatek-fuzz-") as folder:
        place = Path(folder).resolve() / "case"
        print(json.dumps(one(sound_artifacts(), options.seed, options.only, place, Watch(ROOT)), indent=2))


if __name__ == "__main__":
    main()
