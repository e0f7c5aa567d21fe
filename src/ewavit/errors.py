"""The one exception class for input that a user can correct."""


class EwavitError(ValueError):
    """Wrong input, with a message that names the offending value and says what to do.

    The command line prints the message on one line and exits with status 2.
    """
