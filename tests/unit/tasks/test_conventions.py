"""Perplexity by every convention: against the other program's own loop on the same model, and by slow definitions."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from qeval.cli.app import run_program
from qeval.errors import UsageError
from qeval.tasks.documents import pages, rolling
from qeval.tasks.protocols import CONVENTIONS, choose_protocol
from qeval.tasks.windows import rolling_windows
from tests.fixtures.bench import CONTEXT, Bench, text
from tests.fixtures.data import data, needs
from tests.fixtures.tiny import save_tiny

RAW = data("wikitext2/wiki.test.raw")
WIDE, BOS = 32, 1
PAGES = (
    " \n = Birds = \n \n" + text(9) + " = = Boats = = \n" + text(4) + " = Lines = \n \n The 3 @-@ 4 lines .\n" + text(3)
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("conventions"))
    save_tiny(made.model, bos=True, max_position_embeddings=CONTEXT)
    made.corpus.write_text(PAGES, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def peer(bench):
    """The same checkpoint in transformers' own hands, in fp32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(bench.model)


def figures(bench, convention, **flags):
    out = bench.folder / convention
    asked = dict.fromkeys(("window", "stride", "max_windows")) | flags
    code = bench.compare("--quiet", methods="rtn:g32", tasks="ppl", convention=convention, out=str(out), **asked)
    assert code == 0
    found = bench.report(out)
    assert found["protocol"]["convention"] == convention
    return {name: metric["value"] for name, metric in found["baseline"]["metrics"].items()}


def ids_of(peer, bench):
    """The whole text's ids behind one BOS, as all these programs tokenize it."""
    return torch.tensor([peer[1](bench.corpus.read_text())["input_ids"]])


@torch.no_grad()
def the_guides_loop(model, ids, max_length, stride):
    """https://huggingface.co/docs/transformers/perplexity"""
    total, labels, previous = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        targets = ids[:, begin:end].clone()
        targets[:, : -(end - previous)] = -100
        loss = model(ids[:, begin:end], labels=targets).loss
        counted = int((targets != -100).sum()) - 1
        total, labels, previous = total + float(loss) * counted, labels + counted, end
        if end == ids.shape[1]:
            break
    return math.exp(total / labels)


@torch.no_grad()
def gptqs_loop(model, ids, length):
    """opt.py and llama.py of GPTQ: the mean over a window's labels, times the window, over windows times the window."""
    count, total = ids.shape[1] // length, 0.0
    for i in range(count):
        batch = ids[:, i * length : (i + 1) * length]
        logits = model(batch).logits[:, :-1]
        total += (
            float(functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))) * length
        )
    return math.exp(total / (count * length))


@torch.no_grad()
def llama_cpps_loop(model, ids, length):
    total, count = 0.0, 0
    for i in range(ids.shape[1] // length):
        chunk = ids[:, i * length : (i + 1) * length].clone()
        chunk[0, 0] = ids[0, 0]
        log_p = model(chunk).logits.log_softmax(-1)[0]
        for j in range(length // 2, length - 1):
            total, count = total - float(log_p[j, chunk[0, j + 1]]), count + 1
    return math.exp(total / count)


@pytest.mark.parametrize("stride", [WIDE, WIDE // 2, 5])
def test_hf_strided_is_the_guides_loop(bench, peer, stride):
    ids = ids_of(peer, bench)
    ids = ids[:, : ids.shape[1] // WIDE * WIDE] if stride == WIDE else ids  # a tail is dropped where nothing overlaps
    found = figures(bench, "hf-strided", window=str(WIDE), stride=str(stride))
    assert found["ppl_hf_strided"] == pytest.approx(the_guides_loop(peer[0], ids, WIDE, stride), rel=1e-5)
    if stride == 5:  # the guide counts a label less in every window, which moves the figure
        assert found["ppl_hf_strided"] != pytest.approx(found["ppl"], rel=1e-5)


def test_gptq_is_its_loop(bench, peer):
    found = figures(bench, "gptq-2048", window=str(WIDE))
    assert found["ppl_gptq_2048"] == pytest.approx(gptqs_loop(peer[0], ids_of(peer, bench), WIDE), rel=1e-5)


def test_the_conventions_name_stands_beside_every_perplexity_of_report_and_card(bench):
    out = bench.folder / "named"
    asked = {"methods": "rtn:g32", "tasks": "ppl", "convention": "gptq-2048", "window": str(WIDE), "stride": None}
    assert bench.compare("--quiet", **asked, out=str(out)) == 0
    assert run_program(["card", str(out), "--variant", "rtn:g32"]) == 0
    pages = {name: (out / name).read_text(encoding="utf-8") for name in ("report.md", "report.html", "card/README.md")}
    for page in pages.values():
        for figure in ("perplexity ratio (token-mean)", "Perplexity (token-mean)", "Perplexity (gptq-2048)"):
            assert figure in page
    assert "name: Perplexity (gptq-2048), rtn:g32" in pages["card/README.md"]
    assert "### Perplexity (gptq-2048)" in pages["card/README.md"]


def test_llamacpp_is_its_loop(bench, peer):
    found = figures(bench, "llamacpp-512-half", window=str(WIDE))
    expected = llama_cpps_loop(peer[0], ids_of(peer, bench), WIDE)
    assert found["ppl_llamacpp_512_half"] == pytest.approx(expected, rel=1e-5)


def test_lm_eval_word_is_the_harness_on_its_own_model(bench, peer):
    model, tokenizer = peer
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=WIDE, batch_size=1, add_bos_token=False)
    found = figures(bench, "lm-eval-word", window=str(WIDE))
    total, counts = 0.0, {"word_perplexity": 0, "byte_perplexity": 0}
    for page in pages(bench.corpus.read_text()):
        ids = tokenizer(wikitext_detokenizer({"page": page}), add_special_tokens=False)["input_ids"]
        parts = [
            make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, harness.prefix_token_id, WIDE, 1)
        ]
        total += sum(value for value, _ in harness._loglikelihood_tokens([(None, *part) for part in parts]))
        for name, (_, count) in process_results({"page": page}, (0.0,)).items():
            if name in counts:
                counts[name] += count
    words, size = counts["word_perplexity"], counts["byte_perplexity"]
    assert found["word_ppl"] == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert found["byte_ppl"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(3, 9))
def test_rolling_windows_are_the_harnesss(lengths, window):
    documents = [list(range(100 * i, 100 * i + length)) for i, length in enumerate(lengths, 1)]
    made = rolling_windows(documents, window, prefix=BOS, max_windows=None)
    expected = [
        make_disjoint_window(pair) for ids in documents for pair in get_rolling_token_windows(ids, BOS, window, 1)
    ]
    assert [list(w.tokens) for w in made.windows] == [[*context, *targets] for context, targets in expected]
    assert [[w.tokens[p] for p in w.nll_positions] for w in made.windows] == [targets for _, targets in expected]
    assert all(w.run_length <= window for w in made.windows)
    everything = [token for ids in documents for token in ids]
    for w in made.windows:
        own = [token for token in w.tokens if token != BOS]
        assert everything[w.offset : w.offset + len(own)] == own


def test_a_limit_keeps_whole_documents():
    made = rolling_windows([range(10, 15), range(20, 29), range(30, 33)], 3, prefix=BOS, max_windows=6)
    assert (len(made.windows), made.available, made.documents) == (6, 6, 3)
    assert rolling_windows([range(10, 15), range(20, 29)], 3, prefix=BOS, max_windows=4).documents == 1
    with pytest.raises(UsageError, match="no whole document"):
        rolling_windows([range(10, 19)], 3, prefix=BOS, max_windows=2)


def test_pages_hold_all_of_the_text_but_blank_ones():
    found = list(pages(PAGES))
    assert [re.search(r"= (\w+) =", page)[1] for page in found] == ["Birds", "Lines"]
    assert "\n".join(found) == PAGES.removeprefix(" \n")


@needs("wikitext2/wiki.test.raw")
def test_wikitext2_has_the_pages_that_the_harness_counts():
    assert len(list(pages(RAW.read_text(encoding="utf-8")))) == 62


def test_words_are_those_of_the_scored_pages(peer):
    whole, first = rolling(peer[1], PAGES, 100), rolling(peer[1], PAGES, 100, 6)
    assert (whole.windows.documents, first.windows.documents) == (2, 1)
    assert whole.bytes == len(PAGES.removeprefix(" \n").encode()) - 1  # the line end between the two
    assert first.words == len(re.split(r"\s+", next(pages(PAGES)))) < whole.words


def test_flags_choose_a_convention_and_say_what_excludes_what():
    assert choose_protocol(convention="hf-strided", corpus="a.txt").name == "a-1024/512 by hf-strided"
    assert choose_protocol(convention="hf-strided", corpus="a.txt", window=1024).stride == 1024
    assert choose_protocol(convention="lm-eval-word", corpus="wikitext2", context=77).corpus == "wikitext2-raw"
    assert choose_protocol(name="llamacpp-512", convention="llamacpp-512-half").convention.name == "llamacpp-512-half"
    with pytest.raises(UsageError, match="fixes the convention"):
        choose_protocol(name="llamacpp-512", convention="gptq-2048")
    with pytest.raises(UsageError, match="without overlap"):
        choose_protocol(convention="gptq-2048", stride=7)
    with pytest.raises(UsageError, match="give --window"):
        choose_protocol(convention="lm-eval-word")
    with pytest.raises(UsageError, match="gptq-2048"):
        choose_protocol(convention="gptq-2049")
    assert set(CONVENTIONS) == {"token-mean", "hf-strided", "gptq-2048", "llamacpp-512-half", "lm-eval-word"}
