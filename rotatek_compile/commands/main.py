"""Entry points: parse, call, print. Errors become one sentence on stderr and an exit code (0 done, 1 failed, 2 usage)."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from typing import Any

import click

from .._version import __version__
from ..errors import RotateKError
from ..parallel import is_main, speaks_for_failure


def run(command: click.Command) -> None:
    """Run a command and exit with its code."""
    warnings.showwarning = _print_warning  # type: ignore[assignment]
    try:
        command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing was written")
    except RotateKError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:
        if any(kind.__name__ == "DataError" for kind in type(error).__mro__):  # calibration_data knows nothing of our error types
            _fail(str(error), getattr(error, "exit_code", 1))
        if isinstance(error, OSError) and error.filename is not None:
            _fail(f"{error.filename}: {error.strerror}; check the path and its permissions")
        if isinstance(error, BrokenPipeError):  # the reader of a pipe has seen enough
            _drop_output()
            sys.exit(1)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _drop_output()
            _fail("no space is left to write to; free some and run the command again")
        if type(error).__name__ == "OutOfMemoryError":
            _fail("the GPU ran out of memory; lower --batch-size or use --dtype bfloat16")
        raise
    sys.exit(0)


def _drop_output() -> None:
    # what is still buffered would fail again when the interpreter flushes it at exit
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(sentence: str, code: int = 1) -> None:
    if speaks_for_failure():  # of several processes that fail for one reason, one says it
        click.echo(f"error: {sentence}", err=True)
    sys.exit(code)


def _print_warning(message: Any, category: type[Warning], *rest: Any) -> None:
    # ours change results and are always shown; a library's are for its developers
    if category is UserWarning and is_main() and rest and str(rest[0]).startswith(_our_folders()):
        click.echo(f"warning: {message}", err=True)


def _our_folders() -> tuple[str, ...]:
    # in an editable installation runtime/, kernels/ and calibration_data/ lie outside the package's own folder
    import rotatek_compile

    from .. import calibration_data, kernels, runtime

    return tuple(f"{folder}{os.sep}" for part in (rotatek_compile, runtime, kernels, calibration_data) for folder in part.__path__)


class Group(click.Group):
    """Imports a command's module only when it is asked for, so that --help stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["compile", "run", "eval", "inspect", "push"]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        from importlib import import_module

        return import_module(f".{name}", __package__).command


@click.group(cls=Group, help="Compile a vision-language model's KV cache, and decode from the compact form.")
@click.version_option(__version__, prog_name="rotatek")
def group() -> None:
    """All commands under one name."""


def main() -> None:
    """`rotatek`"""
    run(group)


def compile_main() -> None:
    """`rotatek-compile`"""
    from .compile import command

    run(command)


def run_main() -> None:
    """`rotatek-run`"""
    from .run import command

    run(command)


def eval_main() -> None:
    """`rotatek-eval`"""
    from .eval import command

    run(command)


def inspect_main() -> None:
    """`rotatek-inspect`"""
    from .inspect import command

    run(command)


def push_main() -> None:
    """`rotatek-push`"""
    from .push import command

    run(command)
