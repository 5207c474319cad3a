"""Several texts in one run: each as it is alone, and their macro average, in which each counts as one."""

import math

import numpy as np
import pytest

from qeval.errors import UsageError
from qeval.stats.bootstrap import Clusters
from qeval.stats.estimates import mean, mean_of_means
from qeval.tasks.corpus import code_text, corpus_names, load_corpus
from tests.fixtures.bench import Bench, other_text


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("corpora"))
    (made.folder / "short.txt").write_text(other_text(60)[1000:1500], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(made.folder / "home"))
        yield made


def compared(bench, *names, **changed):
    out = bench.folder / "out" / "-".join(name.replace("/", "-") for name in names)
    corpus = ",".join(str(bench.folder / name) for name in names)
    flags = {"methods": "rtn:g32", "tasks": "kl,ppl", "corpus": corpus, "out": str(out), "max_windows": "5"}
    return bench.compare("--quiet", **(flags | changed)), out


def test_each_text_stands_apart_as_it_would_alone_and_counts_as_one(bench):
    code, out = compared(bench, "corpus.txt", "short.txt", max_windows="5")
    assert code == 0
    both = bench.report(out)
    parts = both["protocol"]["parts"]
    assert [(part["corpus"], part["first"], part["windows"]) for part in parts] == [
        ("corpus.txt", 0, 5), ("short.txt", 5, 5),
    ]  # fmt: skip
    (variant,) = both["variants"]
    assert list(variant["by_corpus"]) == ["corpus.txt", "short.txt", "macro"]
    alone = {}
    for name in ("corpus.txt", "short.txt"):
        (alone[name],) = (v["metrics"] for v in bench.report(compared(bench, name)[1])["variants"])
        for metric in ("kl_nats", "top1_agreement", "ppl_ratio"):
            found = variant["by_corpus"][name][metric]
            assert found["value"] == pytest.approx(alone[name][metric]["value"], rel=1e-9)
            assert found["low"] < found["value"] < found["high"]
    macro = {metric: found["value"] for metric, found in variant["by_corpus"]["macro"].items()}
    values = {metric: [own[metric]["value"] for own in alone.values()] for metric in macro}
    assert macro["kl_nats"] == pytest.approx(sum(values["kl_nats"]) / 2)
    assert macro["ppl_ratio"] == pytest.approx(math.sqrt(math.prod(values["ppl_ratio"])))
    page = (out / "report.md").read_text()
    assert "all, each as one" in page
    assert "corpus.txt + short.txt" in page


def test_what_can_not_be_joined_is_refused(bench, capfd):
    assert compared(bench, "corpus.txt", "short.txt", convention="lm-eval-word", bos="never")[0] == 2
    twin = bench.folder / "twin"
    twin.mkdir()
    (twin / "short.txt").write_text(other_text(20), encoding="utf-8")
    assert compared(bench, "short.txt", "twin/short.txt")[0] == 2
    assert "Two of the corpora are called short.txt" in capfd.readouterr().err


def test_a_mean_of_means_counts_each_part_as_one():
    generator = np.random.default_rng(0)
    parts = [
        (generator.normal(place, 1, size), Clusters.of(np.arange(size) // 10)) for place, size in ((0, 400), (5, 100))
    ]
    found = mean_of_means(parts, unit="nats", better="lower", seed=1)
    assert found.value == pytest.approx(np.mean([values.mean() for values, _ in parts]))
    widths = [(e.high - e.low) / 2 for e in (mean(v, c, unit="nats", better="lower", seed=1) for v, c in parts)]
    assert (found.high - found.low) / 2 == pytest.approx(math.hypot(*widths) / 2, rel=0.15)
    single = mean_of_means([parts[0], (parts[1][0], Clusters.of(np.zeros(100)))], unit="nats", better="lower", seed=1)
    assert (single.value, single.low) == (pytest.approx(found.value), None)
    assert mean_of_means([parts[0], ([], Clusters.of([]))], unit="nats", better="lower", seed=1).value is None


def test_names_are_told_apart_by_commas_unless_a_file_has_one(tmp_path):
    assert corpus_names(" pydoc, code,,pydoc") == ["pydoc", "code"]
    (tmp_path / "a,b.txt").write_text("x")
    assert corpus_names(str(tmp_path / "a,b.txt")) == [str(tmp_path / "a,b.txt")]


def test_code_is_pythons_own_source_and_long_enough():
    assert load_corpus("code").text == code_text()
    assert code_text().count("\n    def ") > 100
    with pytest.raises(UsageError, match="code"):
        load_corpus("cod")
