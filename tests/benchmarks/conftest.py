"""Puts `benchmarks/` on the import path, whose scripts share helpers, and takes over the tiny model of the evaluation tests."""

import importlib.util
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS.parent / "benchmarks"))

_spec = importlib.util.spec_from_file_location("rotatek_evaluation_conftest", TESTS / "rotatek_compile" / "conftest.py")
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
tiny, tiny_geometry, documents, make_artifact = _shared.tiny, _shared.tiny_geometry, _shared.documents, _shared.make_artifact
fake_processor = _shared.fake_processor
