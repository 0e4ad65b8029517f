"""The `datasets` library without its own messages: what it logs comes back as the error that it raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars from here on, and no log lines inside the block."""
    from datasets.utils import logging

    logging.disable_progress_bar()
    loudness = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(loudness)


def reason_of(error: BaseException) -> str:
    """The first line of an error, or of what caused it."""
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
