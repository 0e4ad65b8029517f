"""Types are checked in folders that `package_dir` places, as what they are imported as."""

from pathlib import Path

import check_types
import pytest
import run_in_checkout

SETTINGS = """[options]
packages =
    shop
    shop.till
package_dir =
    shop.till = till

[mypy]
packages = shop
strict = True
ignore_missing_imports = True
"""


@pytest.fixture
def checkout(tmp_path):
    """`checkout(till)`: a package of two folders; what lies beside it uses its function `price`, and `till` is the text of that file."""

    def make(till):
        for name in ("shop/extra", "till"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "setup.cfg").write_text(SETTINGS)
        (tmp_path / "till" / "__init__.py").write_text(till)
        (tmp_path / "shop" / "__init__.py").write_text("from .till import price\n\nTOTAL: int = price(3)\n")
        (tmp_path / "shop" / "extra" / "__init__.py").write_text("")
        return tmp_path

    return make


def test_an_error_in_a_placed_folder_is_found_and_so_is_its_misuse(checkout, capsys):
    pytest.importorskip("mypy")
    root = checkout("def price(pieces: int) -> str:\n    return pieces\n")
    assert check_types.check(root, ["--no-error-summary"]) == 1
    assert sorted(capsys.readouterr().out.splitlines()) == [
        'shop/__init__.py:3: error: Incompatible types in assignment (expression has type "str", variable has type "int")  [assignment]',
        'till/__init__.py:2: error: Incompatible return value type (got "int", expected "str")  [return-value]',
    ]


def test_a_search_path_of_the_environment_does_not_come_before_the_checkout(checkout, tmp_path_factory, monkeypatch):
    pytest.importorskip("mypy")
    root = checkout("def price(pieces: int) -> str:\n    return pieces\n")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "shop").mkdir()
    (elsewhere / "shop" / "__init__.py").write_text("")
    monkeypatch.setenv("MYPYPATH", str(elsewhere))
    assert check_types.check(root, []) == 1


def test_nothing_is_found_where_types_are_right(checkout, capsys):
    pytest.importorskip("mypy")
    root = checkout("def price(pieces: int) -> int:\n    return 2 * pieces\n")
    before = set(root.rglob("*"))
    assert check_types.check(root, []) == 0
    assert capsys.readouterr().out == "Success: no issues found in 3 source files\n"
    assert {path for path in root.rglob("*") if ".mypy_cache" not in path.parts} == before


def test_folders_are_those_that_scripts_run_with():
    root = Path(check_types.__file__).parent.parent
    assert check_types.package_folders(root) == run_in_checkout.FOLDERS
    assert len(run_in_checkout.FOLDERS) == 4
