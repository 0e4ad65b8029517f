"""Access to `calibration_data/` of this checkout without installing the package.

The training machine has the checkout only. The folder is bound to a package name of its own, without running its `__init__.py`, which may
import more than the trainer needs.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = "tiny_training_bundled_data"

if _PACKAGE not in sys.modules:
    _package = types.ModuleType(_PACKAGE)
    _package.__path__ = [str(ROOT / "calibration_data")]
    sys.modules[_PACKAGE] = _package

bundled = importlib.import_module(f"{_PACKAGE}.bundled")
drawing = importlib.import_module(f"{_PACKAGE}.drawing")
draws = importlib.import_module(f"{_PACKAGE}.draws")
glyphs = importlib.import_module(f"{_PACKAGE}.glyphs")
page = importlib.import_module(f"{_PACKAGE}.page")
