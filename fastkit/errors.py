"""How fastkit speaks of what went wrong: its one error type for what a user can mend, and its warnings."""

import warnings


class FastkitError(Exception):
    """Bad input or a condition that the user can mend: the message names the value seen and the remedy, in one line.

    The command line prints it without a traceback and exits with code 2.
    """


def show_plain_warnings() -> None:
    """Show warnings in this process without the source line that raised them: for the command line and notebooks.

    Two say nothing that a user could mend: torch's, that a backward began with a product of cuBLAS's, and the
    compiler's about the escapes in a package's source, which is parsed under no name.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA context")
    for module in (r"<unknown>", r".*site-packages"):
        warnings.filterwarnings("ignore", message="invalid escape sequence", module=module)
