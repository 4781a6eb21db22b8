"""What all commands share: mistakes are one line on stderr, options may take several values."""

from __future__ import annotations

import errno
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from scanlm.errors import ScanLMError

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
_STEP = re.compile(r"\d+|all|best|latest")
# typer exports only this one of the parser's exceptions; its base is what they all are
_UsageError: Any = typer.BadParameter.__base__


def fail(message: str, code: int = FAILED) -> NoReturn:
    """End the command: one line on stderr and an exit code."""
    typer.echo(f"scanlm: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user or the machine did wrong into one line; a bug keeps its traceback."""
    from scanlm.batch import NotebookFailed

    try:
        yield
    except typer.Exit:  # a RuntimeError that needs no torch to be told from others
        raise
    except (ScanLMError, NotebookFailed) as error:
        fail(str(error))
    except KeyboardInterrupt as error:
        # a notebook's event loop may have been about to
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        fail(f"interrupted{': ' if error.args else ''}{error}", INTERRUPTED)
    except OSError as error:
        if error.errno in (None, errno.EPIPE):
            raise
        what = f"{error.filename}: " if error.filename else ""
        fail(f"{what}{error.strerror}")
    except (MemoryError, RuntimeError) as error:
        from scanlm.benchmark.failures import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        of_gpu = type(error) is not MemoryError and "CPUAllocator" not in str(error)
        fail(
            f"out of {'GPU ' if of_gpu else ''}memory: lower the batch size (or raise "
            "gradient_accumulation) or the sequence length; what was saved is kept"
        )


class Commands(TyperGroup):
    """A group whose commands end with one line when something is wrong."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with one_line_errors():
                return super().invoke(ctx)
        except _UsageError as error:
            name = ctx.invoked_subcommand
            command = name and self.get_command(ctx, name)
            if error.ctx is None and command:  # so of an option that lacks its value
                error.ctx = typer.Context(command, parent=ctx, info_name=name)
            raise

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, **options: Any
    ) -> Any:
        """Parse, run and exit; the parser's own complaints become one line too."""
        if not options.pop("standalone_mode", True):
            return super().main(args, standalone_mode=False, **options)
        try:
            code = super().main(args, standalone_mode=False, **options)
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(error.format_message(), err=True)
            else:
                where = error.ctx.command_path if error.ctx else "scanlm"
                _name_value(error)
                line = f"{error.format_message().rstrip('.')}; see {where} --help"
                typer.echo(f"{where}: {' '.join(line.split())}", err=True)
            code = WRONG_USAGE
        sys.exit(code if isinstance(code, int) else 0)


def _name_value(error: Any) -> None:
    """Put the wrong value into the parser's complaint, where pydantic's message leaves it out."""
    cause: Any = error.__cause__
    if isinstance(error, typer.BadParameter) and hasattr(cause, "errors"):
        error.message = f"{cause.errors()[0]['input']!r}: {error.message}"


class SeveralSteps(TyperCommand):
    """``--steps 5000 10000`` is ``--steps 5000 --steps 10000``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further value that looks like a step."""
        spread: list[str] = []
        following = False
        for place, arg in enumerate(args):
            if arg == "--":
                spread += args[place:]
                break
            if following and _STEP.fullmatch(arg):
                if spread[-1] != "--steps":
                    spread.append("--steps")
            else:
                following = arg == "--steps" or arg.startswith("--steps=")
            spread.append(arg)
        return super().parse_args(ctx, spread)


class NamedValues(TyperCommand):
    """``-p name value`` is ``-p name=value``."""

    options = ("-p", "--parameter")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join a name and the value behind it."""
        joined: list[str] = []
        rest = iter(args)
        for arg in rest:
            if arg == "--":
                joined += [arg, *rest]
            elif arg in self.options:
                name = next(rest, None)
                if name is not None and "=" not in name:
                    value = next(rest, None)
                    if value is not None and value.startswith("--"):
                        raise typer.BadParameter(
                            f"{name!r} has no value before {value}; give one, or "
                            f"{arg} {name}={value} if that is the value",
                            ctx=ctx,
                            param_hint=repr(arg),
                        )
                    name = name if value is None else f"{name}={value}"
                joined += [arg] if name is None else [arg, name]
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)
