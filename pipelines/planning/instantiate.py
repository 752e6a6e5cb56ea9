"""Build the objects that a part of a config describes, and explain wrong values."""

import re
from contextlib import suppress
from difflib import get_close_matches
from pkgutil import resolve_name
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from fp4dit.utils.errors import UserError
from fp4dit.utils.extras import explain_missing_package
from pipelines.config.validation import describe_type_error

# The errors that a wrong value in a config causes in the code that receives it.
CONFIG_ERRORS = (ValueError, TypeError, AttributeError, ArithmeticError, LookupError)


def instantiate_node(name: str, node: Any) -> Any:
    """Build what a node describes. This imports the code that the node names.

    Args:
        name: The name of the node, for messages.
        node: A config, or resolved plain values.

    Raises:
        UserError: if the node names something that does not exist, or has a wrong value.
    """
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause, place = error.__cause__, str(error).rpartition("full_key: ")[2]
        located = re.match("Error locating target '(.*?)'", str(error))
        if located and cause and not explain_missing_package(error):
            message = explain_wrong_target(located[1], cause)
            raise UserError(f"{place or name}._target_={located[1]}: {message}") from error
        if not isinstance(cause, (UserError, *CONFIG_ERRORS)):
            raise
        message = f"{cause}. Is every value of {place} of the right kind?"
        if isinstance(cause, UserError):
            message = str(cause)
        elif type_error := describe_type_error(node):
            message = type_error
        raise UserError(f"{name}: {message}") from error
    except CONFIG_ERRORS as error:
        raise UserError(f"{name}: {error}") from error


def explain_wrong_target(target: str, error: BaseException) -> str:
    """Explain why the class that a config names cannot be imported, and what to do.

    Args:
        target: The path of the class.
        error: The error of Hydra, which was raised from that of the import.
    """
    cause = error.__cause__
    if cause is None:
        return "give the path by which Python imports the class, such as my_module.MyClass"
    is_missing = isinstance(cause, ModuleNotFoundError) and target.startswith(cause.name or "")
    if not is_missing and not isinstance(cause, AttributeError):
        return f"it cannot be imported: {type(cause).__name__}: {cause}"
    parts = target.split(".")
    for count in range(len(parts) - 1, 0, -1):
        owner, name = ".".join(parts[:count]), parts[count]
        with suppress(ImportError, AttributeError):
            nearest = get_close_matches(name, dir(resolve_name(owner)), cutoff=0.5)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else "correct the path"
            return f"{owner} has no {name}; {hint}"
    return (
        f"there is no module {parts[0]}: correct the path, or put {parts[0]}.py where Python finds "
        "it, such as in the folder in which the program starts"
    )
