"""Errors of data sets, meant for people."""


class DataError(Exception):
    """The data cannot be used: one sentence with what was seen and what to do. Commands print it and exit with 1."""


class EndOfData(Exception):
    """A data set of unknown size has no further sample; never shown to people."""
