"""`shoestring COMMAND`: dispatch, exit codes, and every failure as one line."""

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from shoestring.cli.chat import chat
from shoestring.cli.compare import compare
from shoestring.cli.doctor import doctor
from shoestring.cli.evaluate import evaluate
from shoestring.cli.generate import generate
from shoestring.cli.models import models
from shoestring.cli.parse import parse
from shoestring.cli.pull import pull
from shoestring.cli.quantize import quantize
from shoestring.cli.terminal import complain
from shoestring.cli.train import train
from shoestring.cli.translate import translate
from shoestring.errors import RequestError, ShoestringError

__all__ = ["app", "main", "run"]

_INTERRUPTED = 130
# Older typers raise click's exceptions, newer ones their own copies of them.
_UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="shoestring",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (generate, chat, compare, train, evaluate, translate, parse, pull, quantize, models, doctor):
    app.command()(_command)


def _version(wanted: bool) -> None:
    if wanted:
        from shoestring import __version__

        print(f"shoestring {__version__}")
        raise typer.Exit


@app.callback()
def _shoestring(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Run, train and trust open language models on a shoestring.

    Exit codes: 0 done, 1 the work failed, 2 the request was wrong.
    """


def main() -> None:
    """The entry point of the `shoestring` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code. Failures are one line on stderr, with `--debug` a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _invoke(arguments)
    except KeyboardInterrupt:
        complain("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`): nothing more to say, not even at interpreter shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        complain(_one_line(error))
        return getattr(error, "exit_code", 1)


def _invoke(arguments: Sequence[str]) -> int:
    command: Any = typer.main.get_command(app)
    try:
        result = command.main(list(arguments), prog_name="shoestring", standalone_mode=False)
    except typer.Abort:
        result = _INTERRUPTED
    except Exception as error:
        if not isinstance(error, _UsageError):
            raise
        usage: Any = error
        if type(usage).__name__ == "NoArgsIsHelpError":
            usage.show()
            return 2
        where = f" (see {usage.ctx.command_path} --help)" if getattr(usage, "ctx", None) else ""
        raise RequestError(usage.format_message().rstrip(".") + where) from error
    if result == _INTERRUPTED:  # typer has caught the interrupt
        raise KeyboardInterrupt
    sys.stdout.flush()
    return result if isinstance(result, int) else 0


def _one_line(error: Exception) -> str:
    if isinstance(error, ShoestringError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "out of memory: take a smaller model, a shorter text or fewer prompts at a time"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk{f' for {error.filename}' if error.filename else ''}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"unexpected {type(error).__name__}: {first} (--debug shows where)"
