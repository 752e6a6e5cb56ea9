"""Packages that only a part of the project needs: the optional dependencies in pyproject.toml."""

from collections.abc import Iterator
from importlib.util import find_spec

from fp4dit.utils.errors import UserError

# The modules that each extra installs, by the extra's name in pyproject.toml.
EXTRAS: dict[str, tuple[str, ...]] = {
    "pipeline": (
        "open_clip",
        "plotly",
        "scipy",
        "torch_fidelity",
        "torchmetrics",
        "torchvision",
        "wandb",
    ),
    "launchers": ("joblib", "submitit"),
    "search": ("optuna",),
    "dashboards": ("wandb_workspaces",),
}


def require_extra(extra: str, feature: str) -> None:
    """Raise a UserError if a package of an extra is not installed.

    Args:
        extra: Name of the extra, such as `search`.
        feature: What needs it, as the user calls it.

    Raises:
        UserError: if a package is missing. The message says how to install it.

    Example:
        >>> require_extra("search", "hydra/sweeper=optuna")
    """
    for module in EXTRAS[extra]:
        if find_spec(module) is None:
            raise UserError(f"{feature} needs {module}, {_describe_install(extra)}")


def explain_missing_package(error: BaseException) -> str | None:
    """Return how to install the package whose absence caused an error; None for other errors.

    Args:
        error: The error, or one that was raised from it or while it was handled.
    """
    for cause in _list_causes(error):
        if not isinstance(cause, ModuleNotFoundError) or cause.name is None:
            continue
        module = cause.name.partition(".")[0]
        for extra, modules in EXTRAS.items():
            if module in modules:
                return f"this needs {module}, {_describe_install(extra)}"
    return None


def _describe_install(extra: str) -> str:
    return f"which is not installed: pip install 'fp4dit[{extra}]'"


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
