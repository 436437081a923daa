"""The one exception for mistakes a user can make; the command line prints it as one line and exits 2."""


class UserError(ValueError):
    """Something the caller can put right. The message is one line: what is wrong, the numbers, what to do."""
