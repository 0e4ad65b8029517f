"""Errors of data sets, meant for people."""


class DataError(Exception):
    """The data cannot be used: one sentence with what was seen and what to do. Commands print it and exit with 1."""
