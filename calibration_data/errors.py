"""Errors of data sets, meant for people."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DataError(Exception):
    """The data cannot be used: one sentence with what was seen and what to do. Commands print it and exit with `exit_code`."""

    exit_code = 1


class UnknownDataError(DataError):
    """There is no data set of this name: the request, not the data, is to be mended."""

    exit_code = 2


class EndOfData(Exception):
    """A data set of unknown size has no further sample; never shown to people."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the known one that looks most like it, if any does."""
    close = get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
