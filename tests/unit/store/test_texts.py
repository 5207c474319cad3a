"""What a run keeps of its texts: every token's letters and every question, read back without a tokenizer."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from huggingface_hub import metadata_load
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from qeval.cli.app import run_program as program
from qeval.errors import BrokenRecordError
from qeval.score.texts import decoder, token_texts
from qeval.store.rows import RowStore
from qeval.store.texts import QuestionText, WindowText, read_texts, write_texts
from tests.fixtures.bench import SUBJECTS, Bench
from tests.fixtures.tiny import tiny_tokenizer

WINDOW = WindowText(3, (5, 6, 7), (" a", "", "é"))
QUESTION = QuestionText("mmlu", "anatomy", 4, "What?\nA. x", ("A", "B"))


def spaced():
    """A tokenizer of words whose spaces are part of them, and which drops the space of a first word."""
    letters = ["▁", "a", "b", "▁a", "▁b"]
    backend = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, [("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_texts_are_read_as_they_were_written(tmp_path):
    write_texts(tmp_path, [WINDOW], [QUESTION])
    texts = read_texts(tmp_path)
    assert texts.window(3) == WINDOW
    assert texts.window(0) is None
    assert texts.task("mmlu") == {("anatomy", 4): QUESTION}
    assert texts.task("hellaswag") == {}


def test_the_last_run_replaces_what_was_kept(tmp_path):
    write_texts(tmp_path, [WINDOW], [QUESTION])
    write_texts(tmp_path, [], [])
    assert read_texts(tmp_path).window(3) is None
    assert len(list((tmp_path / "texts").iterdir())) == 2


def test_a_run_without_texts_is_told_from_a_torn_one(tmp_path):
    assert read_texts(tmp_path) is None
    write_texts(tmp_path, [WINDOW], [QUESTION])
    path = tmp_path / "texts" / "windows.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    with pytest.raises(BrokenRecordError, match=r"windows\.parquet is missing or torn; run the same command again"):
        read_texts(tmp_path)
    path.unlink()
    with pytest.raises(BrokenRecordError, match="missing or torn"):
        read_texts(tmp_path)
    pq.write_table(pq.read_table(tmp_path / "texts" / "questions.parquet"), path)
    with pytest.raises(BrokenRecordError, match="has other columns"):
        read_texts(tmp_path)


def test_a_window_has_one_text_a_token():
    with pytest.raises(ValueError, match="Window 0 has 2 tokens and 1 texts"):
        WindowText(0, (1, 2), ("a",))


@pytest.mark.parametrize("text", ["plain words", "naïve é — 漢字 🎉.", "🎉🎉", "", "a\nb\tc  d"])
def test_joined_the_texts_of_tokens_are_the_text(text):
    tokenizer = tiny_tokenizer()
    ids = ids_of(tokenizer, text)
    (found,) = token_texts(decoder(tokenizer), [ids])
    assert len(found) == len(ids)
    assert "".join(found) == text


def test_a_character_of_several_tokens_stands_at_the_last():
    tokenizer = tiny_tokenizer()
    (found,) = token_texts(decoder(tokenizer), [ids_of(tokenizer, "aéb")])
    assert found == ("a", "", "é", "b")


def test_half_a_character_at_a_windows_end_is_shown_as_torn():
    tokenizer = tiny_tokenizer()
    (found,) = token_texts(decoder(tokenizer), [ids_of(tokenizer, "aé")[:2]])
    assert found == ("a", "\N{REPLACEMENT CHARACTER}")


def test_a_leading_space_is_kept_where_the_tokenizer_would_drop_it():
    tokenizer = spaced()
    ids = ids_of(tokenizer, "a b a")
    assert tokenizer.decode([ids[0]]) == "a"
    (found,) = token_texts(decoder(tokenizer), [ids])
    assert found == (" a", " b", " a")


def test_compare_keeps_what_its_rows_stand_for(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    bench = Bench(tmp_path)
    assert bench.compare("--quiet", methods="rtn:g32") == 0
    texts = read_texts(bench.out)
    corpus = bench.corpus.read_text(encoding="utf-8")
    for window in range(4):
        assert "".join(texts.window(window).texts) == corpus[64 * window : 64 * window + 64]
    for row in RowStore(bench.out).read("tokens").to_pylist():
        assert texts.window(row["window"]).tokens[row["position"]] == row["token"]
    found = texts.task("mmlu")
    assert set(found) == {(subject, item) for subject in SUBJECTS for item in range(4)}
    question = found["astronomy", 2]
    assert question.question.startswith("What is 2 in physics?\nA. None\nB. 2.50\nC. x2\nD. NA\nAnswer:")
    assert question.choices == ("A", "B", "C", "D")
    _explained(bench, capfd)


def _explained(bench, capfd):
    """What reads a finished run takes what a real one leaves."""
    capfd.readouterr()
    assert program(["explain", str(bench.out), "rtn:g32", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    corpus = bench.corpus.read_text(encoding="utf-8")
    for token in told["tokens"]["worst"]:
        place = 64 * token["window"] + token["position"] + 1
        assert corpus[:place].endswith(token["before"])
        assert corpus[place:].startswith(token["next"] + token["after"])
    for one in told["tasks"][0]["changed"]:
        assert one["question"].startswith(f"What is {one['item']} in {SUBJECTS[one['subject']]}?")
    assert program(["card", str(bench.out)]) == 0
    assert metadata_load(bench.out / "card" / "README.md")["model-index"]
    assert program(["diff", str(bench.out), str(bench.out)]) == 0
    assert "rtn:g32: no row differs." in capfd.readouterr().out
    assert "qeval compare --model" in (bench.out / "card" / "README.md").read_text(encoding="utf-8")


def test_texts_need_no_torch():
    code = (
        "import sys, qeval.store.texts; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'lm_eval')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
