"""Kill compilations at random moments, look at what they left, and resume them.

    python tools/kill_compile.py --kills 50

Each run compiles a tiny random checkpoint in a process that gets SIGKILL: half of them at a random time, half right before a random
change of the file system (so that the few milliseconds of writing are met too); half over an older artifact (`--overwrite`). After every
kill each directory that loads as an artifact must be the old one or the new one to the byte; then the same command with `--resume` must
give the bytes of an undisturbed run (in report.json all but `seconds`, the timings) and leave nothing else behind. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rotatek-kill-") as folder:
        sys.exit(Killer(Path(folder).resolve(), options.seed).all(options.kills))


class Killer:
    """Reference runs once, then trials."""

    def __init__(self, folder: Path, seed: int) -> None:
        from artifact_trust.compiling import Command, apart, contents, prepare_inputs, run

        self.folder, self.rng, self.wrong, self.states, self.phases = (
            folder,
            random.Random(seed),
            list[str](),
            Counter[str](),
            Counter[str](),
        )
        self.command = Command(*apart(prepare_inputs, folder))
        self.new, self.old = self.place("new"), self.place("old")
        first = run(self.command, self.new, resume=False, overwrite=False)
        again = run(self.command, self.place("again"), resume=False, overwrite=False)
        run(Command(self.command.model, self.command.data, 0.5), self.old, resume=False, overwrite=False)
        assert first.code == again.code == 0, first.words or again.words
        self.seconds, self.changes = again.seconds, again.changes
        self.wanted, self.before = contents(self.new / "artifact"), contents(self.old / "artifact")
        assert self.wanted != self.before
        self.moments = saved(self.new)
        if different := difference(self.wanted, contents(folder / "again" / "artifact")):
            self.wrong.append(f"two undisturbed runs differ in {different}")
        if saved(folder / "again") != self.moments:
            self.wrong.append("two undisturbed runs saved different moments")

    def place(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name

    def all(self, kills: int) -> int:
        """So many kills (runs that ended before their moment do not count); prints what was found, returns the exit code."""
        started, done, tries = time.perf_counter(), 0, 0
        while done < kills and tries < 4 * kills + 20:
            tries += 1
            done += self.trial(self.place(f"trial-{tries}"))
            shutil.rmtree(self.folder / f"trial-{tries}")
        seconds = time.perf_counter() - started
        print(f"{done} kills of a run of {self.seconds:.1f} s and {self.changes} changes of files, {seconds:.0f} s in all")
        print("killed while: " + ", ".join(f"{name} {count}" for name, count in self.phases.most_common()))
        print("then in its place: " + ", ".join(f"{name} {count}" for name, count in self.states.most_common()))
        print(f"{len(self.wrong)} wrong; two undisturbed runs and every resumed one compared byte by byte")
        for words in self.wrong[:20]:
            print(f"WRONG {words}")
        return 1 if self.wrong or done < kills else 0

    def trial(self, place: Path) -> bool:
        """One run that is killed and resumed; whether it was killed in time."""
        from artifact_trust.compiling import choose_moment, contents, run

        over = self.rng.random() < 0.5
        if over:
            shutil.copytree(self.old / "artifact", place / "artifact")
        moment = choose_moment(self.rng, self.seconds, self.changes)
        name = f"{'over an old artifact' if over else 'new'}, killed at {moment}"
        ended = run(self.command, place, resume=False, overwrite=over, **moment)
        if ended.code is not None:
            if ended.code != 0:
                self.wrong.append(f"{name}: failed before it was killed: {ended.words}")
            return False
        self.phases[phase(place)] += 1
        self.look(place, name)
        done = (place / "artifact").exists() and contents(place / "artifact") == self.wanted
        ended = run(self.command, place, resume=True, overwrite=over)
        # a new artifact that is whole is not written again without --overwrite: the command says so
        if ended.code != 0 and not (done and not over and "pass --overwrite" in ended.words):
            self.wrong.append(f"{name}: --resume ended with {ended.code}: {ended.words}")
        elif different := difference(self.wanted, contents(place / "artifact")):
            self.wrong.append(f"{name}: after --resume {different} differs")
        elif saved(place) != self.moments:
            self.wrong.append(f"{name}: after --resume the saved moments differ")
        if left := [entry.name for entry in place.iterdir() if entry.name not in ("artifact", "cache") and any_file(entry)]:
            self.wrong.append(f"{name}: --resume left {left}")
        return True

    def look(self, place: Path, name: str) -> None:
        """Everything that loads as an artifact must be the old or the new one; the place of the artifact holds one of them or nothing."""
        from artifact_trust.compiling import apart, contents, readable

        own = ("rotatek_config.json", "rotatek.safetensors")
        known = [[files[n] for n in own] for files in (self.wanted, self.before)]
        for directory in apart(readable, place):
            if [(directory / n).read_bytes() for n in own] not in known:
                self.wrong.append(f"{name}: {directory.relative_to(place)} loads but is wrong")
        target = place / "artifact"
        found = contents(target) if target.exists() else None
        state = next((word for word, files in (("nothing", None), ("new", self.wanted), ("old", self.before)) if found == files), "wrong")
        if state == "wrong":
            self.wrong.append(f"{name}: the artifact is neither the old nor the new one")
        self.states[state] += 1


def phase(place: Path) -> str:
    """What a killed run was at, from what it left."""
    if any(entry.name.startswith(".artifact-") for entry in place.iterdir()):
        return "writing"
    cache = place / "cache"
    if not cache.exists() or not any(cache.glob("*.safetensors")):
        return "loading"
    return "calibrating" if documents(cache) < most_documents() else "measuring"


def documents(cache: Path) -> int:
    from safetensors import safe_open

    with safe_open(next(cache.glob("*.safetensors")), "pt") as stored:
        return int(stored.metadata()["moments"].split()[0])


def most_documents() -> int:
    from artifact_trust.compiling import DOCUMENTS

    return DOCUMENTS - DOCUMENTS // 8  # an eighth is kept aside


def saved(place: Path) -> dict[str, bytes]:
    """The moments that a place holds."""
    return {file.name: file.read_bytes() for file in (place / "cache").glob("*.safetensors")}


def any_file(entry: Path) -> bool:
    return entry.is_file() or any(path.is_file() for path in entry.rglob("*"))


def difference(a: dict[str, bytes], b: dict[str, bytes]) -> str:
    """Names of the files that differ, or nothing."""
    return ", ".join(sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)))


if __name__ == "__main__":
    main()
