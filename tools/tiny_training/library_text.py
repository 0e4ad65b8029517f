"""English text that every installation has: docstrings of the Python standard library and of the libraries that this project depends on.

Paragraphs are kept once, wherever they come first (libraries repeat themselves a lot), and a file as a whole is held out or not, so that
no held-out paragraph stands in a training file. Which text it is depends on the installed versions: `Corpus.facts` says them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "sympy", "pandas", "networkx", "numpy", "huggingface_hub", "datasets", "accelerate")
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "testing"}
SHORTEST = 40  # characters of a docstring that says something
HELD_OUT = 20  # one file of so many


@dataclass(frozen=True, slots=True)
class Corpus:
    """`training` and `held_out`: one text per source file, in order of the files' names. `facts`: what it was made of."""

    training: list[str]
    held_out: list[str]
    facts: dict[str, Any]


def docstrings(file: Path) -> list[str]:
    """Docstrings of a Python file in the order of its text; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in other people's files
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = sorted((n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0))
    return [text for owner in owners if (text := ast.get_docstring(owner)) and len(text) >= SHORTEST]


def is_held_out(name: str) -> bool:
    """Whether a file is kept for evaluation, by a hash of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % HELD_OUT == 0


def collect(packages: tuple[str, ...] = PACKAGES, workers: int = 1) -> Corpus:
    """Read the installed sources; a package that is not installed is left out."""
    files = list(_files(packages))
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            found = list(pool.map(docstrings, (file for _, file in files), chunksize=64))
    else:
        found = [docstrings(file) for _, file in files]
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for (name, _), texts in zip(files, found, strict=True):
        kept = []
        for paragraph in (p for text in texts for p in text.split("\n\n")):
            if paragraph.strip() and paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
        if kept:
            parts[is_held_out(name)].append("\n\n".join(kept))
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    facts = {
        "python": platform.python_version(),
        "packages": versions,
        "files": [len(part) for part in parts],
        "characters": [sum(map(len, part)) for part in parts],
        "sha256": hashlib.sha256("\0".join([*parts[0], "", *parts[1]]).encode()).hexdigest()[:16],
    }
    return Corpus(*parts, facts)


def _files(packages: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Source files with a name that is the same in every installation."""
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            roots.append((package, Path(spec.origin).parent))
    for name, root in roots:
        for file in sorted(root.rglob("*.py")):
            inside = file.relative_to(root)
            if not LEFT_OUT & set(inside.parts):
                yield f"{name}/{inside.as_posix()}", file
