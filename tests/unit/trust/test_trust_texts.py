"""Nothing in front of a text or between its letters is scored: byte order marks, NUL bytes."""

import csv
import io

import pytest

from qeval.errors import UsageError
from qeval.tasks.corpus import read_text
from qeval.tasks.mmlu_csv import read_subjects

ROWS = [["Wie groß?", "ein", "zwei", "drei", "vier", "A"]] * 2


def save_mmlu(folder, encoding):
    out = io.StringIO(newline="")
    csv.writer(out).writerows(ROWS)
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / f"anatomy_{split}.csv").write_bytes(out.getvalue().encode(encoding))
    return folder


def test_a_mark_in_front_of_questions_is_no_part_of_the_first(tmp_path):
    marked = read_subjects(save_mmlu(tmp_path / "marked", "utf-8-sig"), (), 2)
    assert marked == read_subjects(save_mmlu(tmp_path / "plain", "utf-8"), (), 2)
    assert marked[0].dev[0].question == marked[0].test[0].question == "Wie groß?"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32"])
def test_questions_and_texts_in_other_encodings_are_refused(encoding, tmp_path):
    with pytest.raises(UsageError, match=r"anatomy_dev\.csv' (starts with a byte order mark of UTF-16|holds \d+ NUL)"):
        read_subjects(save_mmlu(tmp_path / "mmlu", encoding), (), 2)
    path = tmp_path / "text.txt"
    path.write_bytes("Plain words,\nand more of them.\n".encode(encoding))
    with pytest.raises(UsageError, match=r"text\.txt' (starts with a byte order mark of UTF-16|holds \d+ NUL bytes)"):
        read_text(path)


def test_a_text_with_a_nul_in_it_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"words\0more")
    with pytest.raises(UsageError, match="holds 1 NUL bytes, the first at offset 5"):
        read_text(path)
