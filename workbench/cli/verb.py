"""From a function to a verb of the command line: it is recorded, and its errors become one line and an exit code."""

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from workbench.errors import WorkbenchError
from workbench.manifest import recording

BAD_INPUT, STOPPED = 2, 130
"""Exit codes beside 0 (done) and 1 (a fault of ours, with its traceback)."""


def verb(name: str, function: Callable[..., Any], *, recorded: bool = True) -> Callable[..., Any]:
    """The function, with what a user can mend said in one line on stderr."""

    @functools.wraps(function)
    def run(**arguments: Any) -> Any:
        try:
            with recording(name, arguments) if recorded else nullcontext():
                return function(**arguments)
        except WorkbenchError as error:
            print(f"workbench: {error}", file=sys.stderr)
            sys.exit(BAD_INPUT)
        except KeyboardInterrupt:
            print("workbench: stopped. Nothing half-written is left; the same command starts again.", file=sys.stderr)
            sys.exit(STOPPED)

    return run
