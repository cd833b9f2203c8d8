"""How fastkit speaks of what went wrong: its one error type for what a user can mend, and its warnings."""

import warnings


class FastkitError(Exception):
    """Bad input or a condition that the user can mend: the message names the value seen and the remedy, in one line.

    The command line prints it without a traceback and exits with code 2.
    """


def show_plain_warnings() -> None:
    """Show warnings in this process without the source line that raised them: for the command line and notebooks."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
