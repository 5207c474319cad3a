"""MMLU's csv files: every cell is text, and what is broken is named by file and line."""

import pytest

from qeval.errors import UsageError
from qeval.tasks.harness import load_suite
from qeval.tasks.mmlu_csv import read_subjects
from tests.fixtures.data import data, needs
from tests.fixtures.tiny import tiny_tokenizer

GOOD = "Which?,None,NA,2.50,1e3,A\n"
REAL = data("mmlu")


def place(folder, test, dev=GOOD * 2, subject="anatomy"):
    for part, text in (("test", test), ("dev", dev)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        if text is not None:
            (folder / part / f"{subject}_{part}.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_cells_stay_as_they_are(tmp_path):
    quoted = '" Two\nlines, ""quoted""? ", a ,nan,0.10,TRUE,D\n'
    (subject,) = read_subjects(place(tmp_path, GOOD + quoted), (), 2)
    assert subject.test[0].choices == ("None", "NA", "2.50", "1e3")
    assert subject.test[1].question == ' Two\nlines, "quoted"? '
    assert subject.test[1].choices == (" a ", "nan", "0.10", "TRUE")
    assert [row.answer for row in subject.test] == [0, 3]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("q,a,b,c,A\n", "line 4: a row has 6 cells .*, not 5"),
        ("\n", "line 4: a row has 6 cells .*, not 0"),
        ("q,a,b,c,d,e,A\n", "line 4: a row has 6 cells .*, not 7"),
        ("q,a,b,c,d,AB\n", "line 4: the answer must be one of A, B, C, D, not 'AB'"),
        ("q,a,b,c,d,\n", "line 4: the answer must be one of A, B, C, D, not ''"),
        ("  ,a,b,c,d,A\n", "line 4: the question or a choice is empty"),
        ('"never closed,a,b,c,d,A\n', "line 4: the row's quotes or commas are broken"),
        ('"q"?,a,b,c,d,A\n', "line 4: the row's quotes or commas are broken"),
    ],
)
def test_a_broken_row_is_named_by_the_line_where_it_starts(tmp_path, row, said):
    two_lines = '"Two\nlines?",a,b,c,d,A\n'
    with pytest.raises(UsageError, match=rf"anatomy_test.csv, {said}"):
        read_subjects(place(tmp_path, GOOD + two_lines + row + GOOD), (), 2)


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"anatomy_test.csv. is not UTF-8: byte 0xff at offset 1"):
        read_subjects(place(tmp_path, b"q\xff,a,b,c,d,A\n"), (), 2)


def test_examples_are_needed_for_shots_alone(tmp_path):
    place(tmp_path, GOOD, dev=None)
    with pytest.raises(UsageError, match=r"anatomy_dev.csv is missing: .* --shots 5"):
        read_subjects(tmp_path, (), 5)
    suite = load_suite(
        "mmlu", tiny_tokenizer(), max_length=4096, bos="auto", shots=0, limit=None, folder=tmp_path, subjects=()
    )
    assert suite.questions[0].shots == 0
    text = tiny_tokenizer().decode(list(suite.questions[0].prompt))
    assert text.endswith("about anatomy.\n\nWhich?\nA. None\nB. NA\nC. 2.50\nD. 1e3\nAnswer:")


def test_empty_files_and_unknown_subjects_are_named(tmp_path):
    place(tmp_path, GOOD)
    with pytest.raises(UsageError, match="nearest: anatomy"):
        read_subjects(tmp_path, ("anatmy",), 2)
    place(tmp_path, "", subject="virology")
    with pytest.raises(UsageError, match=r"virology_test.csv holds no questions"):
        read_subjects(tmp_path, (), 2)


@needs("mmlu")
def test_real_files_read_whole():
    subjects = read_subjects(REAL, (), 5)
    assert len(subjects) == 16
    assert all(len(subject.dev) == 5 for subject in subjects)
    assert sum(len(subject.test) for subject in subjects) == 3546
