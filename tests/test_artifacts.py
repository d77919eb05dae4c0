import errno
import os

import pytest

from workbench.artifacts import output_folder, read_json, staged, write_json
from workbench.errors import BadArtifact, CannotWrite


def write_and_stop(file):
    with staged(file) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt


def test_what_was_there_stays_when_writing_fails(tmp_path):
    file = tmp_path / "run.json"
    write_json(file, {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(file)
    assert read_json(file) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_full_disk_is_named(tmp_path):
    text = r"run.json' could not be written \(No space left on device\).*run it again"
    with pytest.raises(CannotWrite, match=text), staged(tmp_path / "run.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=r"Output folder '.*file' cannot be written .*Name another with --out"):
        output_folder(tmp_path / "file")


def test_json_that_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(BadArtifact, match=r"run.json' does not exist. Is this the folder"):
        read_json(tmp_path / "run.json")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(BadArtifact, match="cannot be read as JSON"):
        read_json(tmp_path / "run.json")
