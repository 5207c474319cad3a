"""A benchmark's records read back as they were written, and not at all when they are torn or foreign."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from qeval.errors import BrokenRecordError, UsageError
from qeval.files.records import write_record
from qeval.store.timings import (
    BENCH,
    CellRecord,
    Drift,
    EngineRecord,
    Timing,
    find_timing,
    read_bench_record,
    read_timings,
    write_bench_record,
    write_timing,
)
from tests.fixtures.benchrun import bench_record

TIMING = Timing("replay", "fp32", 2, 16, 0, 3, 0.125, (0.01, 0.02), None)


def filled():
    return bench_record(
        opened=[EngineRecord("replay", "fp32", None, "cpu", "fp64", "none", 1, "1.0", 0.5, 0.0, 10, 20)],
        cells=[CellRecord("replay", "fp32", 2, 16, "oom", "no memory", 1, None, 3)],
        drifts=[Drift("replay", "fp32", 0, 8, 0.875, 3, 0.1, 0.02, True, 4)],
        timings=["a.parquet"],
    )


def test_a_record_reads_back_as_it_was_written(tmp_path):
    write_bench_record(tmp_path, filled())
    assert read_bench_record(tmp_path) == filled()


def test_timings_read_back_in_the_order_in_which_they_were_taken(tmp_path):
    later = replace(TIMING, repeat=1, order=9, energy_joules=2.5)
    names = [write_timing(tmp_path, key, each).name for key, each in (("k1", later), ("k0", TIMING))]
    assert read_timings(tmp_path, names) == [TIMING, later]
    found = find_timing(tmp_path, "k1", pytest.fail)
    assert found is not None
    assert found.name == names[0]
    assert find_timing(tmp_path, "k2", pytest.fail) is None


def test_a_folder_without_a_benchmark_is_wrong_use(tmp_path):
    with pytest.raises(UsageError, match="holds no benchmark"):
        read_bench_record(tmp_path)


@pytest.mark.parametrize("change", [{"bench_version": 2}, {"more": 1}, {"cells": [{"engine": "a", "more": 1}]}])
def test_a_foreign_record_names_the_file(tmp_path, change):
    write_bench_record(tmp_path, filled())
    path = tmp_path / BENCH
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BrokenRecordError, match=BENCH):
        read_bench_record(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(BrokenRecordError, match=BENCH):
        read_bench_record(tmp_path)


def test_a_torn_repeat_names_the_file_and_is_made_again(tmp_path):
    path = write_timing(tmp_path, "k", TIMING)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BrokenRecordError, match=path.name):
        read_timings(tmp_path, [path.name])
    said = []
    assert find_timing(tmp_path, "k", said.append) is None
    assert path.name in said[0]
    with pytest.raises(BrokenRecordError, match="removed"):
        read_timings(tmp_path, [path.name])


def test_a_file_of_other_columns_is_no_repeat(tmp_path):
    table = pq.read_table(write_timing(tmp_path, "k", TIMING)).drop_columns(["order"])
    folder = tmp_path / "rows" / "timings"
    path = write_record(folder, "other", ".parquet", lambda place: pq.write_table(table, place))
    with pytest.raises(BrokenRecordError, match="no repeat"):
        read_timings(tmp_path, [path.name])
