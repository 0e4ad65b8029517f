"""The tools' packages, importable."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="session", autouse=True)
def tools():
    """The folder of the tools, on the module path."""
    sys.path.insert(0, str(TOOLS))
    yield TOOLS
    sys.path.remove(str(TOOLS))
