"""What differs between two files, in a line."""

import json

import pandas as pd
import pytest

from workbench.file_differences import describe


def test_keys_of_json_are_named(tmp_path):
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    before.write_text(json.dumps({"k": 10, "sides": ["up", "down"], "seconds": 1.5, "same": None}))
    after.write_text(json.dumps({"k": 11, "sides": ["up"], "seconds": 2.5, "same": None}))
    assert describe(before, after) == 'k 10 -> 11, sides.1 "down" -> null'
    after.write_text(before.read_text().replace("1.5", "9.5"))
    assert describe(before, after) == ""  # no two runs take the same time
    after.write_text(json.dumps(dict.fromkeys("abcde", 1)))
    assert describe(before, after).endswith("-> null, 5 more")


def test_rows_and_columns_of_parquet_are_counted(tmp_path):
    table = pd.DataFrame({"neuron": [1, 2, 3], "score": [0.5, float("nan"), 1.5], "side": pd.Categorical(["up", "up", "down"])})
    before, after = tmp_path / "a.parquet", tmp_path / "b.parquet"
    table.to_parquet(before)

    def described(other):
        other.to_parquet(after)
        return describe(before, after)

    assert described(table) == ""
    assert described(table.assign(score=[0.5, float("nan"), 1.25])) == "1 of 3 rows differ, in score"
    assert described(table.assign(neuron=[0, 2, 4], side=["up", "up", "up"])) == "2 of 3 rows differ, in neuron, side"
    assert described(table.head(2)) == "3 rows, now 2"
    assert described(table.drop(columns="side")) == "columns neuron, score, side, now neuron, score"
    table.to_parquet(after, compression="gzip")
    assert describe(before, after) == "the same rows, written as other bytes"


@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.html"])
def test_of_anything_else_and_of_damaged_files_the_sizes(tmp_path, name):
    (tmp_path / "old").mkdir()
    before, after = tmp_path / "old" / name, tmp_path / name
    before.write_bytes(b"\xff{not a table")
    after.write_bytes(b"nor this")
    assert describe(before, after) == "13 bytes, now 8"
