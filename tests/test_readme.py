"""What the README shows is what happens."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import workbench.cli

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_the_python_programs_print_what_they_say(smollm):
    """Lines that begin with `# ` are the output of the lines above them; later programs go on from the earlier ones."""
    program = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    promised = [line[2:].split() for line in program.splitlines() if line.startswith("# ")]
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(program, {})
    found = [line.split() for line in printed.getvalue().splitlines()]
    assert len(found) == len(promised)
    for line, expected in zip(found, promised, strict=True):
        # Scores are printed to six places, of which a machine with another matrix product may change the last two.
        assert [word[:5] for word in line] == [word[:5] for word in expected]


def test_every_verb_is_named():
    for command in workbench.cli.app.registered_commands:
        assert f"workbench {command.name}" in README
