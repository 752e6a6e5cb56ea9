"""The error for mistakes that a user can mend. It is shown as one message, without a traceback."""


class UserError(ValueError):
    """Raised if an input cannot be used as it is. The message says what to do."""
