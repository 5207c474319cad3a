"""Where BOS stands is in the record, in words, and a warning where a model breaks without it."""

from dataclasses import replace

import pytest

from qeval.compare.settings import CorpusChoice
from qeval.compare.tokens import bos_warnings, token_work
from qeval.errors import UsageError
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.report.formatting import bos
from tests.fixtures.bench import text
from tests.fixtures.tiny import save_tiny


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(resolve(str(save_tiny(tmp_path_factory.mktemp("tokens") / "m", bos=True)), None))


@pytest.fixture
def asked(tmp_path):
    (tmp_path / "text.txt").write_text(text(20), encoding="utf-8")
    return CorpusChoice(str(tmp_path / "text.txt"), window=32)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "<s> in front of each window (--bos auto)"),
        ({"bos": "never"}, "no BOS (--bos never)"),
        ({"bos": "always", "convention": "gptq-2048"}, "<s> once, in front of the text (--bos always)"),
        ({"convention": "llamacpp-512-half"}, "<s> in place of each window's first token (--bos auto)"),
        ({"convention": "lm-eval-word"}, "<s> in front of each page (--bos auto)"),
    ],
)
def test_the_record_says_where_bos_stands(loaded, asked, changed, says):
    record, _ = token_work(replace(asked, **changed), loaded)
    assert bos(record) == says


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, None),
        ({"bos": "never"}, "no window has a BOS (--bos never)"),
        ({"convention": "gptq-2048"}, "20 windows have none"),
        ({"convention": "gptq-2048", "max_windows": 1}, None),
        ({"convention": "llamacpp-512-half"}, None),
    ],
)
def test_gemma_without_bos_is_a_warning_with_the_consequence(loaded, asked, changed, says):
    record, shards = token_work(replace(asked, **changed), loaded)
    gemma = replace(loaded, info=replace(loaded.info, architecture="Gemma2ForCausalLM"))
    assert bos_warnings(record, loaded) == []
    without = sum(window.tokens[0] != loaded.tokenizer.bos_token_id for shard in shards for window in shard.windows)
    found = bos_warnings(record, gemma)
    assert bool(found) == (says is not None) == (without > 0)
    if says:
        assert says in found[0]
        assert "5,909,545,606" in found[0]


def test_the_harnesss_prefix_can_not_be_left_out(loaded, asked):
    with pytest.raises(UsageError, match="leave --bos out"):
        token_work(replace(asked, convention="lm-eval-word", bos="never"), loaded)
