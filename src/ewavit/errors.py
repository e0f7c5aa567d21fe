"""The exceptions for what a user can correct."""


class EwavitError(ValueError):
    """Wrong input, with a message that names the offending value and says what to do.

    The command line prints the message on one line and exits with status 2.
    """


class Diverged(EwavitError):
    """The loss or the weights of a training are not finite any more."""
