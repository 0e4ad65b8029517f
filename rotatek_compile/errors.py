"""Errors that are meant for people: one sentence that says what was seen and what to do."""


class RotateKError(Exception):
    """Something the user can act on went wrong; the commands print it without a traceback and exit with 1."""

    exit_code = 1


class UsageError(RotateKError):
    """The request itself makes no sense (contradicting or out-of-range options, unknown name); exit code 2."""

    exit_code = 2


class ArtifactError(RotateKError):
    """An artifact that must not be used: it names the file, the tensor or key, the value seen and the remedy."""
