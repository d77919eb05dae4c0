"""The process that holds the model: it reads requests as lines of JSON, and answers each with a line.

    python -m app.worker_process

Ctrl-C (SIGINT) ends the request at work, not the process. What is printed goes to stderr, which the page reads for progress.
"""

import json
import os
import signal
import sys
import traceback
from typing import Any


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the page never reaches for the network
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints, a library too, does not reach the page's line
    for line in sys.stdin:
        replies.write(json.dumps(_reply(**json.loads(line)), ensure_ascii=False) + "\n")
        replies.flush()


def _reply(task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from workbench.errors import WorkbenchError

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from app.tasks import TASKS, held

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
