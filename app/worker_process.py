"""The process that holds the model: it reads requests as lines of JSON, and answers each with a line.

    python -m app.worker_process

It says "begun" when it has a request in hand: from then on Ctrl-C (SIGINT) ends that, and never the process. What is printed
goes to stderr, which the page reads for progress.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the page never reaches for the network
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints, a library too, does not reach the page's line

    def say(what: Any) -> None:
        text = json.dumps(what)
        replies.write(text + "\n")
        replies.flush()

    for line in sys.stdin:
        reply = _reply(lambda: say("begun"), **json.loads(line))
        try:
            say(reply)
        except (TypeError, ValueError) as error:  # an answer that JSON does not hold must not take the model along
            say({"error": type(error).__name__, "text": f"{error} (a fault of the workbench: an answer that is no JSON)"})


def _reply(begin: Callable[[], None], task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from workbench.errors import WorkbenchError

    try:
        from app.tasks import TASKS, held  # torch, of which half an import could not be made whole: it is not cancelled

        signal.signal(signal.SIGINT, signal.default_int_handler)
        begin()
        return {"answer": TASKS[task](**arguments), "model": held()}
    except KeyboardInterrupt:
        return {"cancelled": True}
    except WorkbenchError as error:
        return {"error": type(error).__name__, "text": str(error)}
    except MemoryError:
        return {"error": "MemoryError", "text": "Memory ran out. Ask for fewer tokens, or for a smaller model."}
    except Exception as error:  # a fault of ours: the page shows it and goes on
        traceback.print_exc()
        return {"error": type(error).__name__, "text": f"{error} (a fault of the workbench; its traceback is in the log)"}
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
