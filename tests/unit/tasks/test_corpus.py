"""Corpora: files as they are, two halves of the Python reference with nothing in common, hub data sets, and BOS."""

import hashlib

import datasets
import pytest

from qeval.errors import UsageError
from qeval.tasks.corpus import bos_token, encode, load_calibration, load_corpus, pydoc_text
from tests.fixtures.data import data, needs
from tests.fixtures.tiny import tiny_tokenizer

WIKITEXT = data("wikitext2/test.txt")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Texts of the hub are kept there."""
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))


def test_a_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "t.txt"
    data = " a\r\n\n  été 漢字 \n".encode()
    path.write_bytes(data)
    corpus = load_corpus(str(path))
    assert corpus.text.encode() == data
    assert corpus.sha256 == hashlib.sha256(data).hexdigest()
    assert corpus.name == "t.txt"
    assert load_calibration(str(path)) == corpus


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xef\xbb\xbfabc", "byte order mark"),
        (b"ab\ncd\xffe", r"byte 0xff at offset 5 \(line 2\)"),
        (b"a\xe2\x82", r"byte 0xe2 at offset 1 \(line 1\)"),
        (b" \n", "is empty"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(tmp_path, data, says):
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=says):
        load_corpus(str(path))


def test_an_unknown_corpus_lists_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="nearest: wikitext2"):
        load_corpus("wikitext")
    with pytest.raises(UsageError, match="nearest: cnn_dailymail"):
        load_calibration("cnn-dailymail")
    with pytest.raises(UsageError, match="no such file"):
        load_corpus("texts/none.txt")
    with pytest.raises(UsageError, match="is a folder"):
        load_corpus(str(tmp_path))


def test_the_halves_of_pydoc_share_no_paragraph_and_are_long_enough():
    texts = [load_corpus("pydoc").text, load_calibration("pydoc").text]
    halves = [[part.strip() for part in text.split("\n\n") if part.strip()] for text in texts]
    assert set(halves[0]).isdisjoint(halves[1])
    assert all(len(half) == len(set(half)) for half in halves)
    # At most four characters a token: 16 windows of 1024 to score, 16 samples of 512 to calibrate on, and more.
    assert len(texts[0]) > 4 * 2 * 16 * 1024
    assert len(texts[1]) > 4 * 2 * 16 * 512


def test_pydoc_drops_what_another_topic_holds():
    long = "\n\n".join(f"paragraph {i} of the long topic" for i in range(6))
    topics = {"long": long, "part": "\n\n".join(long.split("\n\n")[2:5]), "other": "something of its own"}
    both = pydoc_text("test", topics) + pydoc_text("calibration", topics)
    assert all(both.count(f"paragraph {i} of") == 1 for i in range(6))
    assert both.count("something of its own") == 1
    assert pydoc_text("test", dict(reversed(topics.items()))) == pydoc_text("test", topics)


def test_a_new_topic_moves_no_other():
    topics = {f"topic{i}": f"text of topic {i}" for i in range(20)}
    before = pydoc_text("test", topics)
    after = pydoc_text("test", topics | {"new": "text of a new one"})
    assert before.split() == after.replace("text of a new one", "").split()


def test_wikitext2_is_the_test_split_joined_by_blank_lines(monkeypatch):
    asked = []

    def load_dataset(hub_id, config, *, split, streaming):
        asked.append((hub_id, config, split, streaming))
        return [{"text": "a\n"}, {"text": ""}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_corpus("wikitext2").text == "a\n\n\n\n\nb"
    load_calibration("wikitext2")
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", True),
    ]


@pytest.mark.parametrize("name", ["wikitext2", "pile-val", "cnn_dailymail"])
def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch, name):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach it on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UsageError, match=r"Couldn't reach it on the Hub\. Pass the path of a text file") as caught:
        load_calibration(name)
    assert "\n" not in str(caught.value)


def test_a_text_of_the_hub_is_asked_for_once_and_a_torn_copy_again(tmp_path, monkeypatch):
    asked = []

    def load_dataset(hub_id, *_, **__):
        asked.append(hub_id)
        return [{"text": "é a\n"}, {"text": ""}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    first = load_calibration("pile-val")
    assert load_calibration("pile-val") == first
    assert asked == ["mit-han-lab/pile-val-backup"]
    (copy,) = (tmp_path / "home" / "texts").iterdir()
    record = copy.read_text()
    copy.write_text(record.replace(" a", " b"))
    assert load_calibration("pile-val") == first
    copy.write_text(record[:20])
    assert load_calibration("pile-val") == first
    assert len(asked) == 3
    assert copy.read_text() == record


def test_text_is_encoded_without_special_tokens():
    tokenizer = tiny_tokenizer(bos=True)
    assert tokenizer.bos_token_id not in encode(tokenizer, "ab" * 10)
    assert len(encode(tokenizer, "ab" * 10)) == 20


def test_bos_follows_the_policy_and_is_never_made_up():
    without, having = tiny_tokenizer(), tiny_tokenizer(bos=True)
    assert bos_token(having, "auto") == bos_token(having, "always") == having.bos_token_id
    assert bos_token(having, "never") is None
    assert bos_token(without, "auto") is None
    without.add_special_tokens({"eos_token": "a"})
    assert bos_token(without, "auto") is None
    with pytest.raises(UsageError, match="has no BOS"):
        bos_token(without, "always")


def test_auto_does_not_add_a_bos_that_the_tokenizer_has_but_does_not_use():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "a"})
    assert bos_token(tokenizer, "auto") is None
    assert bos_token(tokenizer, "always") == tokenizer.convert_tokens_to_ids("a")


@needs("wikitext2/test.txt")
def test_the_shared_wikitext_file_loads_whole():
    corpus = load_corpus(str(WIKITEXT))
    assert len(corpus.text.encode()) == WIKITEXT.stat().st_size
