"""`benchmarks/gpu.py` on the pretended GPU, at a tiny size: it runs where nobody has a GPU, so it can't rot."""

from benchmarks.gpu import measure, parse
from tests.fixtures.pretend_gpu import pretend_gpu

WORDS = (
    "--shape tiny --device cuda:0 --compute float32 --methods rtn:g32 --windows 2 --questions 2 --context 512 "
    "--lm-eval-most 2"
)


def test_the_benchmark_times_phases_and_answers_the_questions_as_lm_eval_does(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    with pretend_gpu() as log:
        report = measure(parse(WORDS.split()), tmp_path / "run")
    assert report["device"] == "Pretended GPU"
    assert report["failed"] == []
    phases = {phase["name"]: phase for phase in report["phases"]}
    for name in ("score baseline: corpus", "score rtn:g32: corpus", "score rtn:g32: questions"):
        assert phases[name]["seconds"] > 0
        assert phases[name]["share"] > 0
    beside = report["questions"]
    assert (beside["count"], beside["lm_eval_batch"] in (1, 2)) == (8, True)
    assert beside["ratio"] == beside["qeval_per_second"] / beside["lm_eval_per_second"]
    assert beside["most_nats"] < 1e-3  # lm-eval's own model is the oracle
    assert sum(log.launches.values()) > 0
