"""Check the types of the whole package with mypy and the settings in setup.cfg.

    python tools/check_types.py

Some subpackages are imported from elsewhere than they lie (`package_dir` in setup.cfg), which mypy does not read: run from the checkout it
takes them for missing, so for `Any`, and finds nothing in them and no misuse of them. It is shown links to the files, placed as they are
imported. The exit status is mypy's.
"""

from __future__ import annotations

import argparse
import configparser
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def package_folders(root: Path) -> dict[str, Path]:
    """Where packages lie, by name, from setup.cfg: those without a dot and those that `package_dir` places; others lie within these."""
    config = configparser.ConfigParser(interpolation=None)
    config.read_string((root / "setup.cfg").read_text(encoding="utf-8"))
    options = config["options"]
    folders = {name: root / name for name in options["packages"].split() if "." not in name}
    placed = (line.partition("=") for line in options["package_dir"].split("\n") if line.strip())
    return folders | {name.strip(): root / folder.strip() for name, _, folder in placed}


def lay_out(root: Path, site: Path) -> None:
    """Fill the empty folder `site` with links to what the packages of the checkout `root` hold, each where it is imported from."""
    folders = {site.joinpath(*name.split(".")): folder for name, folder in package_folders(root).items()}
    for place in folders:  # all of them before any link, through which a folder would be made in the checkout
        place.mkdir(parents=True, exist_ok=True)
    for place, folder in folders.items():
        for entry in folder.iterdir():
            (place / entry.name).symlink_to(entry)


def in_checkout(line: str, site: Path, root: Path) -> str:
    """A line of mypy's, which begins with a path within `site`, with the path of the file in the checkout instead."""
    path, colon, rest = line.partition(":")
    real = (site / path).resolve()
    return f"{real.relative_to(root).as_posix()}{colon}{rest}" if colon and real.is_file() and real.is_relative_to(root) else line


def check(root: Path, args: list[str]) -> int:
    """Print what mypy, called with `args` besides, has to say of the packages of the checkout `root`; return its exit status."""
    root = root.resolve()
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder).resolve()
        lay_out(root, site)
        command = [sys.executable, "-m", "mypy", "--config-file", str(root / "setup.cfg"), "--cache-dir", str(root / ".mypy_cache"), *args]
        done = subprocess.run(command, cwd=site, env=os.environ | {"MYPYPATH": str(site)}, stdout=subprocess.PIPE, encoding="utf-8")
        for line in done.stdout.splitlines():
            print(in_checkout(line, site, root))
    return done.returncode


def main() -> int:
    """Parse and check."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    return check(ROOT, [])


if __name__ == "__main__":
    sys.exit(main())
