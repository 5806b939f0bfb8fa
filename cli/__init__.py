"""The command line: one small file per verb. Exit codes: 0 done, 1 the work failed, 2 bad input."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any


def main() -> None:
    """Run the `halfweight` command; every expected error is one line on stderr."""
    # The progress bars and warnings of the libraries below would bury our own; users can turn them on again.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import typer

    from ..compress.launch import leads
    from ..serving.errors import HalfweightError
    from .app import app
    from .output import fail

    # typer brings its own copy of click, or uses the one installed, by release.
    click_exception: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    try:
        status = app(prog_name="halfweight", standalone_mode=False)
        if status == 130:  # typer's way of reporting Ctrl-C
            raise KeyboardInterrupt
        sys.exit(status or 0)
    except click_exception as error:
        if not leads():  # torchrun's other processes have read the same command
            sys.exit(2)
        fail(f"{error.format_message().rstrip('.')}; see `halfweight --help`", 2)
    except HalfweightError as error:
        fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience must not tear the last line apart
        fail("interrupted; compress, sweep, --tasks, and eval and compare with --json go on with the same command", 130)
    except BrokenPipeError:
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        from ..compress.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        fail("out of memory; `halfweight plan` shows what a run needs, fewer --samples need less", 1)
