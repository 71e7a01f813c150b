"""The command line: registers the commands and turns every user's mistake into one sentence.

Exit codes: 0 done, 1 a check failed, 2 wrong use, 3 something missing on this machine, 130 Ctrl-C.
Results go to standard output, everything else to standard error. Commands import what is heavy
when they run, so that help is quick.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence

import typer

from drafter.errors import SlimSpecError
from pipeline.commands import artifacts, corpora, decoding, machine, training, whole
from pipeline.commands import bench as benchmark

INTERRUPTED = 130
_GO_ON = ("run", "fetch", "corpus", "train", "bench")  # where they were, when they are run again

app = typer.Typer(
    name="pipeline",
    help=(
        "Lossless speculative decoding with low-rank drafter heads: from a target checkpoint "
        "to a served endpoint."
    ),
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "run": whole.run,
    "fetch": artifacts.fetch,
    "corpus": corpora.corpus,
    "train": training.train,
    "export": artifacts.export,
    "export-drafter": artifacts.export_drafter,
    "import-drafter": artifacts.import_drafter,
    "build-engine": artifacts.build_engine,
    "calibrate": artifacts.calibrate,
    "check": artifacts.check,
    "generate": decoding.generate,
    "evaluate": decoding.evaluate,
    "bench": benchmark.bench,
    "serve": decoding.serve,
    "doctor": machine.doctor,
    "version": machine.version,
}
for _name, _command in _COMMANDS.items():
    _first_sentence = " ".join((_command.__doc__ or "").split(".")[0].split())
    app.command(_name, short_help=_first_sentence)(_command)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Unexpected exceptions are bugs and pass."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        code = app(args=args, prog_name="pipeline", standalone_mode=False)
        sys.stdout.flush()
    except SlimSpecError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(args)
    except typer.TyperException as error:
        return _wrong_use(error)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(_machine_trouble(error), 3)
    return _interrupted(args) if code == INTERRUPTED else int(code or 0)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code


def _interrupted(args: Sequence[str] | None) -> int:
    command = next(iter(sys.argv[1:] if args is None else args), "")
    how = "; run the same command again to continue" if command in _GO_ON else ""
    sys.stderr.write(f"interrupted{how}\n")
    return INTERRUPTED


def _wrong_use(error: typer.TyperException) -> int:
    message = error.format_message()
    if "\n" in message:  # the help that a bare `pipeline` shows
        sys.stderr.write(message + "\n")
        return error.exit_code
    command = getattr(getattr(error, "ctx", None), "command_path", "pipeline")
    return _fail(f"{message.rstrip('.')}; see `{command} --help`.", error.exit_code)


def _machine_trouble(error: OSError) -> str:
    """A sentence for a full disk or a forbidden file; anything else is a bug."""
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: cannot write{where}; free some space and run the command again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"permission denied:{where} cannot be used; choose another folder or file."
    raise error


if __name__ == "__main__":
    sys.exit(main())
