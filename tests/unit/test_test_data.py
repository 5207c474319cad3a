"""Where tests find real data, and that a test without it says what is missing."""

import pytest

from tests.fixtures.data import data, needs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    (folder / "wikitext2").mkdir(parents=True)
    (tmp_path / "reference").mkdir()
    monkeypatch.setenv("QEVAL_TEST_DATA", str(folder))
    return folder


def test_the_variable_names_the_folder(folder):
    assert data("wikitext2") == folder / "wikitext2"
    assert data("mmlu") == folder / "mmlu"
    assert data("reference") == folder.parent / "reference"


def test_without_the_variable_it_lies_next_to_the_checkout(monkeypatch, request):
    monkeypatch.delenv("QEVAL_TEST_DATA", raising=False)
    assert data("mmlu") == request.config.rootpath.parent / "shared" / "data" / "mmlu"


def test_what_is_missing_is_the_reason(folder):
    mark = needs("wikitext2", "mmlu").mark
    assert mark.args == (True,)
    assert mark.kwargs["reason"].startswith("QEVAL_TEST_DATA has no mmlu (docs/development/test-data.md")
    assert needs("wikitext2").mark.args == (False,)
