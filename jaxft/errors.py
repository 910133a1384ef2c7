"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """A mistake in a configuration, a data set or a file; its text names it and the remedy.

    The programs print it without a traceback and exit with code 2.
    """
