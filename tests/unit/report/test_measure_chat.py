"""Groups of the baseline's answers, against sums over rows one by one."""

import math

import numpy as np
import pytest

from qeval.report.align import TokenRows
from qeval.report.independent import window_clusters
from qeval.report.measure_chat import OVER_LANGUAGES, answer_groups, chat_metrics
from qeval.store.run import AnswerRecord, ChatRecord, CorpusPart, ProtocolRecord

LENGTH = 40
ANSWERS = [(0, "code", "en", 5, 5), (1, "code", "de", 9, 12), (1, "code", "de", 20, 20), (2, "maths", "de", 3, 30)]
"""Prompt, kind, language, first token, first token after thinking; windows 2 to 5."""


PARTS = (("text", 0), ("chat", 2))
"""The texts, and the first window of each."""


class Run:
    metrics = ("kl", "ppl")
    seed = 0


@pytest.fixture(scope="module")
def chat():
    answers = [
        AnswerRecord(window=window, prompt=prompt, kind=kind, language=language, first=first, final=final, ended=True)
        for window, (prompt, kind, language, first, final) in enumerate(ANSWERS, 2)
    ]
    return ChatRecord(
        source="shipped", template=None, template_sha256="0", prompts=3, prompts_with_tools_left_out=0,
        longest_answer=64, temperature=0.0, in_bytes={}, answers=answers,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    """Two windows of a text, then the answers: KL one position before each token's NLL."""
    generator, parts = np.random.default_rng(5), []
    for window, first in [(0, 1), (1, 1), *((place, answer[3]) for place, answer in enumerate(ANSWERS, 2))]:
        parts += [(window, position, position >= first, position < LENGTH - 1) for position in range(first - 1, LENGTH)]
    windows, positions, has_nll, has_kl = (np.array(column) for column in zip(*parts, strict=True))
    values = {name: generator.exponential(size=len(parts)) for name in ("kl_nats", "nll")}
    values["top1_agreement"] = generator.integers(0, 2, size=len(parts)).astype(float)
    scored = {"kl_nats": has_kl, "top1_agreement": has_kl, "nll": has_nll}
    tokens = generator.integers(0, 10**6, size=len(parts))
    return TokenRows(windows, positions, tokens, values, scored, stretches=np.maximum(windows, 0))


def mean_where(rows, column, wanted):
    """The mean over the scored rows for which `wanted(window, position)`."""
    found = [
        rows.values[column][row]
        for row in range(len(rows.windows))
        if rows.scored[column][row] and wanted(int(rows.windows[row]), int(rows.positions[row]))
    ]
    return sum(found) / len(found)


def test_groups_hold_the_rows_that_their_names_say(rows, chat):
    base = TokenRows(rows.windows, rows.positions, rows.tokens, {"nll": rows.values["nll"] * 0.5}, rows.scored)
    groups = {(g.by, g.name): g.metrics for g in answer_groups(rows, base, chat, Run)}
    answer = dict(enumerate(ANSWERS, 2))
    wanted = {
        ("kind", "code"): lambda window, place: answer[window][1] == "code",
        ("language", "de"): lambda window, place: answer[window][2] == "de",
        ("part", "thinking"): lambda window, place: place < answer[window][4],
        ("part", "final"): lambda window, place: place >= answer[window][4],
        ("token", "1 to 16"): lambda window, place: place - answer[window][3] < 16,
        ("token", "17 to 64"): lambda window, place: place - answer[window][3] >= 16,
    }
    for key, holds in wanted.items():
        kl = mean_where(rows, "kl_nats", lambda window, place, holds=holds: window > 1 and holds(window, place + 1))
        nll = mean_where(rows, "nll", lambda window, place, holds=holds: window > 1 and holds(window, place))
        assert groups[key]["kl_nats"].value == pytest.approx(kl)
        assert groups[key]["ppl_ratio"].value == pytest.approx(math.exp(nll / 2))


def test_the_mean_over_languages_counts_each_as_one(rows, chat):
    groups = {g.name: g.metrics["kl_nats"] for g in answer_groups(rows, rows, chat, Run) if g.by == "language"}
    assert groups[OVER_LANGUAGES].value == pytest.approx((groups["en"].value + groups["de"].value) / 2)
    assert groups[OVER_LANGUAGES].clusters == 2


def test_the_answers_metrics_leave_the_text_out(rows, chat):
    metrics = chat_metrics(rows, rows, chat, Run)
    expected = mean_where(rows, "kl_nats", lambda window, place: window > 1)
    assert metrics["chat_kl_nats"].value == pytest.approx(expected)
    assert metrics["chat_ppl_ratio"].value == 1
    kl = rows.values["kl_nats"][(rows.windows > 1) & rows.scored["kl_nats"]]
    assert metrics["chat_kl_nats_p99"].value == np.quantile(kl, 0.99, method="inverted_cdf")


def test_answers_of_one_conversation_are_one_cluster(rows, chat):
    part = {"corpus_sha256": "0", "tokens_sha256": "0", "windows_available": 2}
    protocol = ProtocolRecord(
        name="both", corpus="text + chat", corpus_sha256="0", tokens_sha256="0", window=40, stride=40, windows=6,
        windows_available=6, bos=False, kl_positions=1, nll_positions=1, chat=chat,
        parts=[CorpusPart(corpus=name, first=first, windows=2 + first, **part) for name, first in PARTS],
    )  # fmt: skip
    clusters = window_clusters(rows.windows, rows.tokens, protocol)
    assert dict(zip(rows.windows.tolist(), clusters.tolist(), strict=True)) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 3, 5: 5}
