"""Starting the server: on this machine alone, with the app's look, and what was asked on the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from app import places
from app.look import THEME
from workbench.errors import WorkbenchError


def serve(model: str, maps: Sequence[Path], runs: Path, port: int, *, browser: bool) -> None:
    """Until it is stopped.

    Raises:
        WorkbenchError: if Streamlit is not installed, or the port is taken.
    """
    try:
        from streamlit.web import bootstrap
    except ImportError:
        raise WorkbenchError(
            "The explorer needs Streamlit, which is not installed. Install it: pip install -e '.[app]'"
        ) from None
    require_free(port)
    os.environ |= {
        places.MODEL: model, places.RUNS: str(runs.expanduser().resolve()),
        places.MAPS: os.pathsep.join(str(one.expanduser().resolve()) for one in maps),
    }  # fmt: skip
    options = THEME | {
        "server.address": "127.0.0.1", "server.port": port, "server.headless": not browser, "browser.gatherUsageStats": False,
        "server.fileWatcherType": "none", "client.toolbarMode": "minimal", "client.showErrorDetails": "full",
        "server.maxUploadSize": 64, "runner.fastReruns": True,
        "logger.hideWelcomeMessage": True,  # with it go Streamlit's advertisements, on the page too
        "runner.postScriptGC": False,  # a tenth of a second after every click, in which no page is answered
    }  # fmt: skip
    flags = {name.replace(".", "_"): value for name, value in options.items()}
    bootstrap.load_config_options(flag_options=flags)
    print(f"The explorer is on http://127.0.0.1:{port}, and Ctrl-C ends it.", flush=True)
    bootstrap.run(str(Path(__file__).parent / "main.py"), False, [], flags)


def require_free(port: int) -> None:
    """
    Raises:
        WorkbenchError: if something else listens there.
    """
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise WorkbenchError(f"Port {port} cannot be had ({error.strerror}). Name another with --port.") from None
