"""The one error that is written for the person who runs the program."""


class UserError(SystemExit):
    """Python prints its message without a traceback and ends the process with status 1."""
