"""Run a script, or a module with -m, against this checkout without installing it.

    python tools/run_in_checkout.py SCRIPT ARGS...
    python tools/run_in_checkout.py -m pytest tests/kernels -m gpu

The package is spread over four folders (see setup.cfg), and the repository root must stay off `sys.path`: our `kernels/`
would shadow the Hugging Face distribution `kernels`. So the folders are mapped by a finder instead.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "rotatek_compile": ROOT / "rotatek_compile",
    "rotatek_compile.runtime": ROOT / "runtime",
    "rotatek_compile.kernels": ROOT / "kernels",
    "rotatek_compile.calibration_data": ROOT / "calibration_data",
}


class CheckoutFinder(importlib.abc.MetaPathFinder):
    """Finds the four package folders; their submodules follow from the packages' own `__path__`."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        folder = FOLDERS.get(fullname)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def install() -> None:
    """Make `import rotatek_compile` mean this checkout, ahead of an installed copy, and drop the root from `sys.path`."""
    if not any(isinstance(finder, CheckoutFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, CheckoutFinder())
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__, end="")
        sys.exit(0 if argv else 2)
    sys.path.pop(0)  # the folder of this file
    install()
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
