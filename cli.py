"""Thin launcher for a checkout that is installed in editable mode: `python cli.py compile --help` is `rotatek compile --help`."""

import sys
from pathlib import Path

# with the repository root on the path, our kernels/ would shadow the Hugging Face package of that name
here = str(Path(__file__).resolve().parent)
sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]

from rotatek_compile.commands.main import main  # noqa: E402

if __name__ == "__main__":
    main()
