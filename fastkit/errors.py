"""The one error type that fastkit raises for what a user can mend."""


class FastkitError(Exception):
    """Bad input or a condition that the user can mend: the message names the value seen and the remedy, in one line.

    The command line prints it without a traceback and exits with code 2.
    """
