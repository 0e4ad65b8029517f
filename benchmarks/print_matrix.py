"""Run the matrix of families and generation modes (tests/families/test_modes.py) and print it as a Markdown table.

    python benchmarks/print_matrix.py [--write docs/generation.md]

With `--write` the table replaces what stands in the file between the markers `<!-- matrix -->` and `<!-- /matrix -->`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEST = "tests/families/test_modes.py"
MARKERS = ("<!-- matrix -->", "<!-- /matrix -->")
LEGEND = (
    "yes: at keep ratio 1.0 the tokens and logits of the stock cache (float32, logits within 1e-4), below it those of the `reconstruct` "
    "backend. Anything else says why there is nothing to compare."
)


def run() -> dict[tuple[str, str], str]:
    """(family, mode) -> yes, FAILED, or why the cell was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", TEST, "-n", "0", f"--junitxml={report}"], cwd=ROOT, stdout=subprocess.DEVNULL)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return dict(filter(None, map(_cell, cases)))


def _cell(case: ElementTree.Element) -> tuple[tuple[str, str], str] | None:
    named = re.fullmatch(r"test_cell\[(.+)\]", case.get("name", ""))
    if named is None:
        return None
    family, mode = named[1].rsplit("-", 1)
    if case.find("failure") is not None or case.find("error") is not None:
        return (family, mode), "FAILED"
    skipped = case.find("skipped")
    if skipped is None:
        return (family, mode), "yes"
    return (family, mode), skipped.get("message", "").removeprefix("Skipped: ")


def table(cells: dict[tuple[str, str], str]) -> str:
    """Families down, modes across; long reasons stand below, numbered."""
    import torch
    import transformers

    families, modes = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    notes: list[str] = []
    lines = [f"| | {' | '.join(modes)} |", f"|---{'|---' * len(modes)}|"]
    for family in families:
        row = []
        for mode in modes:
            words = cells.get((family, mode), "")
            if len(words) > 20:
                if words not in notes:
                    notes.append(words)
                words = f"({notes.index(words) + 1})"
            row.append(words)
        lines.append(f"| {family} | {' | '.join(row)} |")
    lines += ["", *(f"({number}) {note}" for number, note in enumerate(notes, 1)), ""] if notes else [""]
    passed = sum(words == "yes" for words in cells.values())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    return "\n".join([*lines, LEGEND, f"{passed} of {len(cells)} cells, {versions}, CPU; tiny random models of each family."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of this file")
    options = parser.parse_args()
    cells = run()
    printed = table(cells)
    print(printed)
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        start, end = (text.index(marker) for marker in MARKERS)
        options.write.write_text(f"{text[: start + len(MARKERS[0])]}\n{printed}\n{text[end:]}", encoding="utf-8")
    if "FAILED" in cells.values() or not cells:
        sys.exit("some cells failed: run the test file by itself to see why")


if __name__ == "__main__":
    main()
