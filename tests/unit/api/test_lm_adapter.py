"""A session inside lm-evaluation-harness, against the harness's own `hf` model and against qeval's own path."""

import logging

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from qeval.backends.replay import ReplaySession
from qeval.backends.torch import TorchSession
from qeval.errors import QevalError, UsageError
from qeval.score.choices import score_questions
from qeval.score.lm import QevalLM
from qeval.tasks.harness import load_suite
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer

CONTEXT = 64


def tokenizer(bos=True):
    made = tiny_tokenizer(bos=bos)
    made.eos_token = "~"
    return made


def requests(kind, *arguments):
    return [Instance(kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def both():
    """The harness's model and qeval's over the same weights, with a short context."""
    model = tiny_llama(max_position_embeddings=CONTEXT, bos_token_id=0)
    reference = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=1, max_length=CONTEXT)
    return reference, QevalLM(TorchSession(model), tokenizer(), batch_tokens=100)


PAIRS = [
    ("A short context", " and more"),
    ("A short context", " or"),
    ("It ends with spaces  ", "which move"),
    ("", "nothing before"),
    ("<s>spelt", " out"),
    ("x" * 70, " cut from the left"),
    ("x" * (CONTEXT - 4), " fits"),
]


def test_continuations_score_as_in_the_harnesss_own_model(both):
    expected, found = (lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True) for lm in both)
    for (ours, ours_greedy), (theirs, theirs_greedy) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert ours_greedy == theirs_greedy


def test_whole_texts_score_as_in_the_harnesss_own_model(both):
    texts = [
        ("short",),
        ("longer than one window of sixty-four tokens " * 5,),
        ("y" * CONTEXT,),
        ("z" * (CONTEXT + 1),),
    ]
    expected, found = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), True) for lm in both)
    assert found == pytest.approx(expected, abs=1e-3)


def test_texts_are_encoded_as_in_the_harnesss_own_model(both):
    for text in ("plain", "<s>spelt", " "):
        for special in (None, True, False):
            assert both[1].tok_encode(text, special) == both[0].tok_encode(text, special)
    assert both[1].prefix_token_id == both[0].prefix_token_id
    assert both[1].eot_token_id == both[0].eot_token_id


def test_a_cut_context_is_told_of(both, caplog):
    with caplog.at_level(logging.WARNING, logger="qeval"):
        both[1].loglikelihood(requests("loglikelihood", PAIRS[5]), disable_tqdm=True)
    assert "A context of 71 tokens is cut to its last 47." in caplog.text
    with pytest.raises(QevalError, match="A continuation of 65 tokens after 2 can't be scored in a context of 64"):
        both[1].loglikelihood(requests("loglikelihood", ("a", "b" * 65)), disable_tqdm=True)


class Heard(list):
    """A cache hook of the harness's that remembers."""

    def add_partial(self, kind, arguments, answer):
        self.append((kind, arguments, answer))


def test_the_harnesss_cache_hears_every_answer():
    lm = QevalLM(ReplaySession(256), tokenizer())
    heard = Heard()
    lm.set_cache_hook(heard)
    found = lm.loglikelihood(requests("loglikelihood", *PAIRS[:2]), disable_tqdm=True)
    total = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("whole",)))
    assert heard == [
        ("loglikelihood", PAIRS[0], found[0]),
        ("loglikelihood", PAIRS[1], found[1]),
        ("loglikelihood_rolling", ("whole",), total[0]),
    ]


@pytest.mark.parametrize(("bos", "leading"), [("auto", 1), ("always", 1), ("never", 0)])
def test_bos_follows_the_policy(bos, leading):
    lm = QevalLM(ReplaySession(256), tokenizer(), bos=bos)
    assert lm.tok_encode("text").count(lm.prefix_token_id) == leading


def test_a_session_that_scores_generates_nothing_and_a_tokenizer_needs_a_start():
    asked = requests("generate_until", ("a", {"until": ["."], "max_gen_toks": 3}))
    with pytest.raises(QevalError, match="scores and can't generate answers"):
        QevalLM(ReplaySession(256), tokenizer()).generate_until(asked)
    with pytest.raises(UsageError, match="samples its answers"):
        QevalLM(ReplaySession(256), tokenizer()).generate_until(
            requests("generate_until", ("a", {"do_sample": True, "temperature": 0.5}))
        )
    with pytest.raises(UsageError, match="neither a BOS nor an EOS"):
        QevalLM(ReplaySession(256), tiny_tokenizer()).tok_encode("a")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_simple_evaluate_gives_the_numbers_of_qevals_own_path():
    """The shipped questions, by the harness's whole evaluation and by qeval's: every log-likelihood and accuracy."""
    session = ReplaySession(256, max_length=10**5)
    suite = load_suite("mmlu", tokenizer(), max_length=10**5, bos="auto", shots=2, limit=2, folder=None, subjects=())
    lm = QevalLM(session, tokenizer())
    results = simple_evaluate(model=lm, tasks=list(suite.tasks.values()), limit=2, bootstrap_iters=0)
    scores = dict(zip(suite.questions, score_questions(session, suite.questions, 4096, lambda done: None), strict=True))
    for subject, task in suite.tasks.items():
        samples = {sample["doc_id"]: sample for sample in results["samples"][task.config.task]}
        own = {question: found for question, found in scores.items() if question.subject == subject}
        assert len(samples) == len(own) == 2
        for question, found in own.items():
            theirs = [ll for ll, _ in samples[question.item]["filtered_resps"]]
            assert [ll for ll, _ in found] == pytest.approx(theirs, abs=1e-4)
            assert suite.judge(question, found)["acc"] == samples[question.item]["acc"]
        accuracy = sum(suite.judge(question, found)["acc"] for question, found in own.items()) / 2
        assert results["results"][task.config.task]["acc,none"] == pytest.approx(accuracy)
