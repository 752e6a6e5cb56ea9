"""Messages about packages that are not installed."""

import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from fp4dit.utils.errors import UserError
from fp4dit.utils.extras import EXTRAS, explain_missing_package, require_extra
from tests.helpers.requirements import normalize_name

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide Optuna from imports, as if it were not installed."""
    for name in [name for name in sys.modules if name.startswith("optuna.")]:
        monkeypatch.delitem(sys.modules, name)  # another test may have imported it
    monkeypatch.setitem(sys.modules, "optuna", None)


def catch_import_error(module: str) -> ImportError:
    with pytest.raises(ImportError) as caught:
        import_module(module)
    return caught.value


def test_modules_are_those_that_the_extras_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distributions = packages_distributions()
    for extra in EXTRAS.keys() - {"launchers"}:  # plugins of Hydra, which install the modules
        names = set(map(normalize_name, project["optional-dependencies"][extra]))
        for module in EXTRAS[extra]:
            assert names & set(map(normalize_name, distributions[module]))


def test_a_missing_package_is_an_error_that_names_the_extra(no_optuna: None):
    message = r"^hydra/sweeper=optuna needs optuna, which is not installed: pip install 'fp4dit\[se"
    with pytest.raises(UserError, match=message):
        require_extra("search", "hydra/sweeper=optuna")


@pytest.mark.parametrize("extra", EXTRAS)
def test_installed_packages_are_no_error(extra: str):
    require_extra(extra, "this")


def test_an_import_error_is_explained_wherever_it_is_in_the_chain(no_optuna: None):
    error = catch_import_error("optuna.samplers")
    expected = "this needs optuna, which is not installed: pip install 'fp4dit[search]'"
    assert explain_missing_package(error) == expected
    outer = RuntimeError("a part of the config cannot be made")
    outer.__cause__ = error
    assert explain_missing_package(outer) == expected


def test_other_errors_are_not_explained(no_optuna: None):
    assert explain_missing_package(ValueError("no")) is None
    assert explain_missing_package(catch_import_error("no_such_package")) is None
    error = ValueError("no")
    error.__context__ = catch_import_error("optuna")
    error.__suppress_context__ = True  # as `raise error from None` sets it
    assert explain_missing_package(error) is None
