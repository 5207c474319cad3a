"""Windows: against the Hugging Face guide's loop and llama.cpp's, written out slowly, and by properties."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qeval.errors import UsageError
from qeval.tasks.protocols import CONVENTIONS, PROTOCOLS, choose_protocol, custom
from qeval.tasks.windows import make_windows, tokens_sha256
from tests.fixtures.tiny import tiny_llama

BOS = 999
PLACEMENTS = [None, "text", "window"]


def guide(ids, max_length, stride):
    """https://huggingface.co/docs/transformers/perplexity, with labels in place of the loss: (tokens, targets)."""
    found, previous_end = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        target_length = end - previous_end
        input_ids = list(ids[begin:end])
        labels = list(input_ids)
        labels[:-target_length] = [-100] * (len(labels) - target_length)
        # The model shifts labels: position 0 has nothing before it.
        found.append((input_ids, [i for i in range(1, len(labels)) if labels[i] != -100]))
        previous_end = end
        if end == len(ids):
            break
    return found


def llama_cpp(ids, n_ctx, bos):
    """tools/perplexity/perplexity.cpp: (tokens, positions of the logits that are scored)."""
    tokens = ([bos] if bos is not None else []) + list(ids)
    found = []
    for i in range(len(tokens) // n_ctx):
        chunk = tokens[i * n_ctx : (i + 1) * n_ctx]
        if bos is not None:
            chunk[0] = bos
        found.append((chunk, list(range(n_ctx // 2, n_ctx - 1))))
    return found


sizes = st.integers(3, 12).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window)))
texts = st.integers(12, 60)


@given(sizes, texts)
def test_overlapping_windows_are_the_guides(size, length):
    window, stride = size
    ids = range(length)
    expected = guide(ids, window, stride)
    made = make_windows(ids, window, stride).windows
    if stride == window and len(expected[-1][0]) < window:
        expected.pop()  # here, and only here, a shorter tail is dropped
    assert [(list(w.tokens), list(w.nll_positions)) for w in made] == expected


@given(texts, st.integers(3, 12), st.sampled_from([None, BOS]))
def test_the_second_half_is_llama_cpps(length, window, bos):
    made = make_windows(range(length), window, window, scoring="second_half", bos=bos, bos_placement="replace")
    expected = llama_cpp(range(length), window, bos)
    assert [(list(w.tokens), list(w.kl_positions)) for w in made.windows] == expected
    for w in made.windows:
        assert w.nll_positions == tuple(position + 1 for position in w.kl_positions)


@given(sizes, texts, st.sampled_from(PLACEMENTS))
def test_positions_and_offsets_say_which_tokens_they_are(size, length, placement):
    made = _make(range(length), *size, placement)
    for w in made.windows:
        assert 2 <= len(w.tokens) <= size[0]
        assert set(w.nll_positions) <= set(range(1, len(w.tokens)))
        assert set(w.kl_positions) <= set(range(len(w.tokens)))
        text = [token for token in w.tokens if token != BOS]
        assert text == list(range(w.offset, w.offset + len(text)))
        assert all(w.tokens[position] != BOS for position in w.nll_positions)


@given(sizes, texts, st.sampled_from(PLACEMENTS))
def test_every_token_is_scored_once(size, length, placement):
    window, stride = size
    made = _make(range(length), window, stride, placement)
    scored = Counter(w.tokens[position] for w in made.windows for position in w.nll_positions)
    after = Counter(w.tokens[position] for w in made.windows for position in w.kl_positions)
    after.pop(BOS, None)
    covered = {token for w in made.windows for token in w.tokens} - {BOS}
    assert set(scored.values()) <= {1}
    assert set(after) == covered
    assert set(after.values()) == {1}
    if stride < window:
        assert covered == set(range(length))  # nothing is dropped where windows overlap
        assert set(scored) == covered - ({0} if placement is None else set())
    else:
        assert length - len(covered) < window
        firsts = {w.tokens[0] for w in made.windows}
        assert set(scored) == covered - firsts


def _make(ids, window, stride, placement):
    bos = None if placement is None else BOS
    return make_windows(ids, window, stride, bos=bos, bos_placement=placement or "window")


def test_bos_counts_inside_the_window_and_skips_no_text():
    made = make_windows(range(9), window=4, stride=4, bos=BOS, bos_placement="window")
    assert [w.tokens for w in made.windows] == [(BOS, 0, 1, 2), (BOS, 3, 4, 5), (BOS, 6, 7, 8)]
    assert [w.offset for w in made.windows] == [0, 3, 6]
    assert made.windows[1].nll_positions == (1, 2, 3)
    assert made.windows[1].kl_positions == (0, 1, 2, 3)


def test_bos_of_the_text_is_in_the_first_window_only():
    made = make_windows(range(9), window=4, stride=2, bos=BOS, bos_placement="text")
    assert [w.tokens for w in made.windows] == [(BOS, 0, 1, 2), (1, 2, 3, 4), (3, 4, 5, 6), (5, 6, 7, 8)]
    assert [w.offset for w in made.windows] == [0, 1, 3, 5]


def test_where_bos_goes_changes_what_a_model_predicts():
    model = tiny_llama(seed=4)

    def nll_of_token_5(placement):
        made = make_windows(range(12), window=4, stride=2, bos=200, bos_placement=placement)
        for w in made.windows:
            if 5 in w.tokens and w.tokens.index(5) in w.nll_positions:
                logits = model(torch.tensor([w.tokens])).logits[0].float()
                position = w.tokens.index(5)
                return -torch.log_softmax(logits[position - 1], -1)[5].item()
        raise AssertionError("token 5 is not scored")

    assert abs(nll_of_token_5("text") - nll_of_token_5("window")) > 1e-3


def test_max_windows_takes_the_first_and_keeps_the_count():
    made = make_windows(range(40), 8, 4, max_windows=3)
    whole = make_windows(range(40), 8, 4)
    assert made.windows == whole.windows[:3]
    assert made.available == whole.available == 9
    assert (made.kl_count, made.nll_count, made.token_count) == (16, 15, 24)
    assert made.tokens_sha256 == whole.tokens_sha256


def test_a_short_corpus_names_both_lengths():
    with pytest.raises(UsageError, match=r"holds 7 tokens, fewer than one window of 8"):
        make_windows(range(7), 8, 8)
    with pytest.raises(UsageError, match=r"holds 6 tokens and a BOS, fewer than one window of 8"):
        make_windows(range(6), 8, 8, bos=BOS)
    assert len(make_windows(range(7), 8, 8, bos=BOS).windows) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 1, "stride": 1}, "2 or more"),
        ({"window": 2, "stride": 2, "bos": BOS}, "3 or more"),
        ({"window": 8, "stride": 9}, "between 1 and the window"),
        ({"window": 8, "stride": 0}, "between 1 and the window"),
        ({"window": 8, "stride": 4, "scoring": "second_half"}, "without overlap"),
        ({"window": 8, "stride": 4, "bos": BOS, "bos_placement": "replace"}, "without overlap"),
        ({"window": 8, "stride": 8, "max_windows": 0}, "1 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(UsageError, match=says):
        make_windows(range(40), **settings)


def test_the_hash_of_tokens_is_pinned():
    # sha256 of the little-endian 64-bit integers 1, 2, 258, by struct.pack("<3q", 1, 2, 258).
    assert tokens_sha256([1, 2, 258]).startswith("87ee1b815523effd")
    assert tokens_sha256([1, 2]) != tokens_sha256([2, 1])


def test_protocols_cut_as_their_names_say():
    ids = range(9000)
    strided = PROTOCOLS["wikitext2-1024/512"].windows(ids, bos=BOS, max_windows=2).windows
    assert [len(w.tokens) for w in strided] == [1024, 1024]
    assert len(strided[1].nll_positions) == 512
    assert strided[0].tokens[0] == BOS != strided[1].tokens[0]
    halves = PROTOCOLS["llamacpp-512"].windows(ids, bos=BOS, max_windows=2).windows
    assert halves[1].tokens[0] == BOS
    assert (halves[1].tokens[1], halves[1].offset) == (512, 512)  # 511 gave way to BOS
    assert (halves[0].kl_positions[0], halves[0].kl_positions[-1]) == (256, 510)
    assert (halves[0].nll_positions[0], halves[0].nll_positions[-1]) == (257, 511)
    whole = PROTOCOLS["wikitext2-4096"].windows(ids, bos=None)
    assert [w.offset for w in whole.windows] == [0, 4096]
    assert all(len(w.kl_positions) == 4096 for w in whole.windows)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_cuts_windows_of_its_size_by_a_convention_that_has_a_name(name):
    protocol = PROTOCOLS[name]
    assert protocol.name == name
    assert CONVENTIONS[protocol.convention.name].reduction == protocol.convention.reduction
    windows = protocol.windows(range(3 * protocol.window), bos=BOS).windows
    assert len(windows) > 2
    assert all(len(window.tokens) <= protocol.window and window.nll_positions for window in windows)
    assert choose_protocol(name=name, convention=protocol.convention.name) is protocol


@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_convention_goes_over_any_corpus(name):
    protocol = choose_protocol(convention=name, corpus="a.txt", context=256)
    convention = CONVENTIONS[name]
    assert protocol.convention is convention
    assert (protocol.corpus, protocol.window) == ("a.txt", convention.window or 256)
    assert protocol.stride == (convention.stride or protocol.window)
    assert (protocol.description, protocol.source) == (convention.description, convention.source)


def test_protocols_are_chosen_by_name_or_by_window():
    assert choose_protocol().name == "pydoc-1024"
    assert choose_protocol(name="llamacpp-512") is PROTOCOLS["llamacpp-512"]
    other = choose_protocol(name="llamacpp-512", corpus="pydoc")
    assert (other.name, other.corpus, other.convention.scoring) == ("llamacpp-512 over pydoc", "pydoc", "second_half")
    own = choose_protocol(corpus="pydoc", window=256)
    assert (own.name, own.window, own.stride, own.convention.bos_placement) == ("pydoc-256/256", 256, 256, "window")
    assert choose_protocol(stride=512).window == 1024
    assert custom("./a/b.txt", 8, 4).name == "b-8/4"
    with pytest.raises(UsageError, match="nearest: wikitext2-4096"):
        choose_protocol(name="wikitext-4096")
    with pytest.raises(UsageError, match="either --protocol or --window"):
        choose_protocol(name="llamacpp-512", window=512)
