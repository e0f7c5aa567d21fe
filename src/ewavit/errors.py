"""The exceptions for what a user can correct, and how another library's error is quoted in them."""

MOST_CHARACTERS = 200  # of another library's message


class EwavitError(ValueError):
    """Wrong input, with a message that names the offending value and says what to do.

    The command line prints the message on one line and exits with status 2.
    """


class Refused(EwavitError):
    """The settings of a new run cannot work; found before its first step."""


class Diverged(EwavitError):
    """The loss or the weights of a run are not finite."""


def first_line(problem: BaseException) -> str:
    """The first line of an error's message; the name of its class if there is no message.

    A message of `EwavitError` is kept whole, any other is cut at 200 characters.
    """
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return lines[0] if isinstance(problem, EwavitError) else lines[0][:MOST_CHARACTERS]
