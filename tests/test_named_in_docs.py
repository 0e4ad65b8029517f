"""What sentences of README, CONTRIBUTING and docs name is there: files, functions with their arguments, extras of the installation."""

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("rotatek_named_commands", ROOT / "tests" / "example_commands.py")
running = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = running
_spec.loader.exec_module(running)
reading = running.reading


@pytest.mark.parametrize("page", reading.pages())
def test_named_files_are_there(page):
    for name in set(reading.named_paths(page)):
        places = [ROOT / name, *ROOT.glob(f"*/{name}"), *ROOT.glob(f"tools/*/{name}")]
        assert any(place.exists() for place in places), f"{page} names {name}, which does not exist"


@pytest.mark.parametrize("page", reading.pages())
def test_named_functions_and_extras(page):
    """`rotatek_compile.NAME(...)` in a sentence has such a function and arguments; `[EXTRA]` of an installation is declared."""
    import rotatek_compile

    for span in reading.spans(page):
        if span.startswith("rotatek_compile."):
            for node in ast.walk(ast.parse(span, mode="eval")):
                if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "rotatek_compile":
                    assert hasattr(rotatek_compile, node.attr), (page, span)
                if isinstance(node, ast.Call) and getattr(getattr(node.func, "value", None), "id", "") == "rotatek_compile":
                    taken = inspect.signature(getattr(rotatek_compile, node.func.attr)).parameters
                    assert {keyword.arg for keyword in node.keywords} <= taken.keys(), (page, span)
        for names in re.findall(r"'[\w.-]+\[([\w,]+)\]'", span):
            declared = (ROOT / "setup.cfg").read_text(encoding="utf-8").split("[options.extras_require]")[1]
            assert all(re.search(rf"^{name} = |^{name} =$", declared, re.MULTILINE) for name in names.split(",")), (page, span)
