"""Define how each command begins and ends: its help, one line for an error, the exit status.

A command returns its exit status. 0 is success and 1 a verdict "failed"; every error is status 2.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import click

from adaattn.system.interrupts import raise_on_signals

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
LONGEST = 500  # characters of a message: a few lines of a terminal
VERBOSE = "adaattn.verbose"
F = TypeVar("F", bound=Callable[..., Any])


def printable(text: str) -> str:
    r"""Return the text with characters that a terminal or an XML file must not get as escapes.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def one_line(text: str) -> str:
    """Return the text on one line, and without its middle where it is long: the end often says what to do."""
    text = printable(" ".join(text[: 100 * LONGEST].split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 200]} … {text[-195:]}"


def complain(name: str, message: str) -> None:
    """Print one line to standard error, in the name of a command."""
    with suppress(OSError, ValueError):  # standard error is full or closed: there is nobody to tell
        click.echo(f"{name}: {one_line(message)}", err=True)


def verbose_option(command: F) -> F:
    """Add the option -v, which shows tracebacks and what the packages underneath say."""

    def keep(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        context.meta[VERBOSE] = value

    text = "Show warnings of the tools underneath, and tracebacks."
    return click.option("--verbose", "-v", is_flag=True, expose_value=False, callback=keep, help=text)(command)


class Command(click.Command):
    """A command that ends every error in one line on standard error and status 2."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"context_settings": SETTINGS} | options)

    def invoke(self, context: click.Context) -> Any:
        """Run the command; its errors become click's, with the line to print."""
        verbose = context.meta.get(VERBOSE, False)
        try:
            with quiet_tools(verbose):
                return super().invoke(context)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except BaseException as error:
            if verbose:
                import traceback

                traceback.print_exc()
            raise click.ClickException(_explain(error)) from error

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and end the process with its status."""
        name = str(self.name)
        completes = f"_{name}_COMPLETE".replace("-", "_").upper() in os.environ  # a shell asks click for words
        if not standalone_mode or completes:
            return super().main(args, name, complete_var, standalone_mode, **extra)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # an ASCII terminal gets \xd7 for ×, not an error
        raise_on_signals()
        try:
            # click's own main would end a broken pipe with status 1, which is a verdict here.
            with self.make_context(name, list(sys.argv[1:] if args is None else args), **extra) as context:
                status = self.invoke(context) or 0
        except click.exceptions.Exit as end:
            status = end.exit_code
        except BaseException as error:
            complain(name, _explain(error))
            status = 2
        try:
            if sys.stdout is not None:  # closed by the shell
                sys.stdout.flush()
        except (OSError, ValueError) as error:
            if status != 2:
                complain(name, _explain(error))
            status = 2
            with suppress(OSError, ValueError):  # or the interpreter would try again to write the rest
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(status)


class Group(Command, click.Group):
    """A command with subcommands."""

    command_class = Command

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"no_args_is_help": False} | options)

    def invoke(self, context: click.Context) -> Any:
        """Run the subcommand, which answers its own errors."""
        return click.Group.invoke(self, context)


def _explain(error: BaseException) -> str:
    from adaattn.errors import AdaAttnError

    if isinstance(error, click.UsageError):
        return f"{error.format_message().rstrip('.')}; see --help"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, AdaAttnError):
        return str(error)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "interrupted"
    if isinstance(error, SystemExit):
        return f"the code of the model or of its data ended the program, with status {error.code}"
    if isinstance(error, OSError):
        return f"{error.filename or 'the output'}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return f"there is too little memory: {str(error) or 'give smaller sizes'}"
    return f"unexpected {type(error).__name__}: {error} (-v shows where)"


@contextmanager
def quiet_tools(verbose: bool) -> Iterator[None]:
    """Keep logs and warnings of other packages from the console: they are about their own code, or repeat errors."""
    import logging
    import warnings

    if verbose:
        yield
        return
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
