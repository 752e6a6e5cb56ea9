"""Build the objects that a part of a config describes, and explain wrong values."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from fp4dit.utils.errors import UserError
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
        cause = error.__cause__
        if not isinstance(cause, (UserError, *CONFIG_ERRORS)):
            raise
        place = str(error).rpartition("full_key: ")[2]
        message = f"{cause}. Is every value of {place} of the right kind?"
        if isinstance(cause, UserError):
            message = str(cause)
        elif type_error := describe_type_error(node):
            message = type_error
        raise UserError(f"{name}: {message}") from error
    except CONFIG_ERRORS as error:
        raise UserError(f"{name}: {error}") from error
