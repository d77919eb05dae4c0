"""How the explorer is built: its page imports no torch, and nothing beneath it knows it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_structure import ROOT, imports, modules

import app
from app import lines
from app.job_forms import FIRST, VERBS
from app.screens import SCREENS
from app.screens.home import SCREEN_OF
from app.url import PARAMS

APP = Path(app.__file__).parent
WORKERS = {"tasks", "plain", "kinds", "worker_process"}
"""Of the process that holds the model."""


def names():
    for path in sorted(APP.rglob("*.py")):
        yield ".".join(path.relative_to(APP.parent).with_suffix("").parts).removesuffix(".__init__")


def test_the_page_imports_no_torch():
    page = [name for name in names() if name.removeprefix("app.") not in WORKERS and name != "app.main"]
    code = (
        f"import sys, importlib\nsys.path.insert(0, {str(APP.parent)!r})\nheavy = ('torch', 'transformers', 'sklearn')\n"
        f"for name in {page!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert not [one for one in heavy if one in sys.modules], name\n"
        f"print(len({page!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(SCREENS) + 15


def test_the_first_screen_is_drawn_without_torch(explorer):
    code = (
        f"import sys\nfrom streamlit.testing.v1 import AppTest\nopened = AppTest.from_file({str(APP / 'main.py')!r}).run()\n"
        "assert not opened.exception\n"
        "print(opened.title[0].value, [one for one in ('torch', 'transformers') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip().splitlines()[-1:] == ["Home []"], done.stderr


def test_only_the_apps_verb_knows_the_app():
    for package in ("workbench", "probes"):
        for path, _ in modules(package):
            if not re.search(r"import app\b|from app\b", text := path.read_text()):
                continue
            tree = ast.parse(text)
            top = {id(node) for node in tree.body}
            for name, node in imports(tree):
                if name.split(".")[0] == "app":
                    assert path == ROOT / "workbench" / "cli" / "app_verb.py", f"{path} imports {name}"
                    assert id(node) not in top, f"{path} imports {name} before it is asked to"


def test_the_page_unpickles_nothing_and_makes_no_network_calls():
    for path in sorted(APP.rglob("*.py")):
        tree = ast.parse(path.read_text())
        imported = {name.split(".")[0] for name, _ in imports(tree)}
        assert not imported & {"pickle", "joblib", "dill", "shelve", "marshal", "requests", "urllib3", "httpx", "http"}, path
        called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not called & {"eval", "exec"}, path


def test_only_the_workers_modules_import_what_it_computes_with():
    """The page asks and shows: a module that imports an analysis at its top would compute in the page."""
    for path in sorted(APP.rglob("*.py")):
        tree = ast.parse(path.read_text())
        top = {id(node) for node in tree.body}
        if path.stem not in WORKERS:
            at_once = [name for name, node in imports(tree) if id(node) in top]
            assert not [name for name in at_once if name.startswith(("workbench.analyses", "probes", "torch"))], path


def test_every_screen_is_a_file_and_every_file_a_screen():
    assert {one.path for one in SCREENS} == {path.stem for path in (APP / "screens").glob("*.py")} - {"__init__"}
    assert len({one.title for one in SCREENS}) == len(SCREENS)
    assert {path for path, _ in SCREEN_OF.values()} <= {one.path for one in SCREENS}
    assert {name for _, name in SCREEN_OF.values()} <= set(PARAMS)


def test_every_form_is_of_a_verb_and_every_line_too():
    import typer

    from workbench.cli import app as cli

    commands = typer.main.get_command(cli).commands
    assert set(VERBS) == set(FIRST)
    assert set(VERBS) <= set(commands)
    for verb, first in FIRST.items():
        assert set(first) <= {one.name for one in commands[verb].params}, verb
    made = {name.removesuffix("_cli") for name in vars(lines) if name.startswith("_") and name.endswith("_cli")}
    assert made == {name.removesuffix("_python") for name in vars(lines) if name.startswith("_") and name.endswith("_python")}


@pytest.mark.parametrize("name", sorted(PARAMS))
def test_every_part_of_the_view_is_used(name):
    """A part that nothing reads would be a promise of the link that the page does not keep."""
    files = [path for path in APP.rglob("*.py") if path.name != "url.py"]
    assert any(f'"{name}"' in path.read_text() for path in files)


def test_what_the_page_is_made_of_beside_python_is_packed():
    import tomllib

    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["app"]
    others = {path.suffix for path in APP.iterdir() if path.is_file()} - {".py"}
    assert {one.removeprefix("*") for one in packed} == others


def test_streamlit_advertises_nothing_to_the_user(tmp_path):
    """On the page it offers to install things for programming assistants, where it finds one. Streamlit itself is asked whether
    it may, when it has the app's options."""
    code = (
        "from streamlit.web import bootstrap, skills\n"
        "bootstrap.run = lambda *_: print(skills.nudge_suppression_reason())\n"
        "from app.launch import serve\nimport socket\n"
        "with socket.socket() as free:\n    free.bind(('127.0.0.1', 0))\n    port = free.getsockname()[1]\n"
        f"from pathlib import Path\nserve('x', [], Path({str(tmp_path)!r}), port, browser=True)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    expected = r"The explorer is on http://127.0.0.1:\d+, and Ctrl-C ends it.\nwelcome_hidden\n"
    assert re.fullmatch(expected, done.stdout), done.stderr
