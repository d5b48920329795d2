"""Errors a user can cause. Each carries the exit code the command line returns for it."""


class BagcertError(Exception):
    """Something went wrong that is worth one clear sentence, not a traceback."""

    exit_code = 1


class UsageError(BagcertError, ValueError):
    """An argument, option, recipe or model name that makes no sense as given."""

    exit_code = 2


class UnsoundError(BagcertError):
    """A certificate was broken, or a network reaches beyond its declared receptive field."""

    exit_code = 4


class UnreadableError(BagcertError):
    """A file that is missing, truncated, of the wrong kind, or too large to be opened safely."""

    exit_code = 5
