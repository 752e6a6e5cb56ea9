"""What a user can mend: shown as one message, without a traceback."""


class UserError(ValueError):
    """The input cannot be used as it is; the message says what to do."""
