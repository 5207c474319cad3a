"""Questions against lm-evaluation-harness's own model on the same tasks, and the csv reader against broken files."""

import csv

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qeval.backends.torch import TorchSession
from qeval.errors import UsageError
from qeval.score.choices import score_pairs, score_questions
from qeval.score.prefix import prefix_tree, tokens_run
from qeval.tasks.harness import load_suite
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer

DEV = [[f"Example {i}?", "None", "NA", "2.50", f"x{i}", "ABCD"[i % 4]] for i in range(5)]
TEST = [
    [" Which one is text? ", "None", "NA", "2.50", "1e3", "A"],
    ["Two, or more?", "two", "2", "more", "none", "B"],
    ["Three?", "a", "b", "c", "d", "D"],
]


def write(folder, subject="anatomy", dev=DEV, test=TEST):
    for part, rows in (("dev", dev), ("test", test)):
        path = folder / part / f"{subject}_{part}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_llama(max_position_embeddings=2048)


def suite(folder, tokenizer=None, **changes):
    arguments = {"max_length": 2048, "bos": "auto", "shots": 5, "limit": None, "folder": folder, "subjects": ()}
    return load_suite("mmlu", tokenizer or tiny_tokenizer(), **(arguments | changes))


def nobody(done):
    del done


@pytest.mark.parametrize("bos", [False, True])
def test_prompts_and_scores_are_the_harnesss_own(model, tmp_path, bos):
    """The ids come from TemplateLM's own encoding; the log-likelihoods from its `hf` model, on every choice."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.eos_token = "~"  # the harness needs one of the two to start from
    made = suite(write(tmp_path), tokenizer)
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    task = made.tasks["anatomy"]
    task.build_all_requests()
    requests = task.instances
    encoded = [reference._encode_pair(*request.args) for request in requests]
    ours = [pair for question in made.questions for pair in question.pairs]
    assert [(tuple(c), tuple(r)) for c, r in encoded] == ours
    expected = reference.loglikelihood(requests, disable_tqdm=True)
    found = [s for scores in score_questions(TorchSession(model), made.questions, 4096, nobody) for s in scores]
    for (ours_ll, ours_greedy), (ll, greedy) in zip(found, expected, strict=True):
        assert ours_ll == pytest.approx(ll, abs=1e-4)
        assert ours_greedy == greedy


def test_scores_do_not_depend_on_batches_or_sharing(model, tmp_path):
    made = suite(write(tmp_path))
    pairs = [pair for question in made.questions for pair in question.pairs]
    session = TorchSession(model)
    alone = [score_pairs(session, [pair], 1, nobody)[0] for pair in pairs]
    for batch_tokens in (1, 300, 10_000):
        together = score_pairs(session, pairs, batch_tokens, nobody)
        assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], abs=1e-4)


def test_continuations_of_several_tokens_are_summed(model):
    context, rests = tuple(range(40, 140)), [(1, 2, 3), (1, 2, 9, 9), (7,)]
    logits = model(torch.tensor([[*context, *rests[1]]])).logits[0].log_softmax(-1)
    expected = sum(float(logits[99 + i, token]) for i, token in enumerate(rests[1]))
    found = score_pairs(TorchSession(model), [(context, rest) for rest in rests], 64, nobody)
    assert found[1][0] == pytest.approx(expected, abs=1e-4)


def test_the_harness_judges(model, tmp_path):
    made = suite(write(tmp_path))
    right = [(0.0 if i == 0 else -1.0, False) for i in range(4)]
    assert made.judge(made.questions[0], right)["acc"] == 1.0
    assert made.judge(made.questions[1], right)["acc"] == 0.0


def test_choices_stay_text_and_categories_come_from_the_harness(tmp_path):
    made = suite(write(tmp_path))
    prompt = made.tasks["anatomy"].fewshot_context(made.tasks["anatomy"].eval_docs[0], 5)
    assert prompt.endswith("Which one is text?\nA. None\nB. NA\nC. 2.50\nD. 1e3\nAnswer:")
    assert made.info.categories == {"anatomy": "stem"}
    assert made.info.title == "MMLU 5-shot (1 of 57 subjects)"


def test_a_prompt_too_long_loses_its_first_examples_and_is_counted(tmp_path):
    whole = suite(write(tmp_path))
    lengths = [len(question.prompt) for question in whole.questions]
    cut = suite(tmp_path, max_length=min(lengths) - 1)
    assert cut.info.items_with_fewer_shots == 3
    assert {question.shots for question in cut.questions} == {4}
    text = bytes(tiny_tokenizer().decode(list(cut.questions[0].prompt)), "utf-8").decode()
    assert "Example 0?" not in text
    assert "Example 4?" in text
    with pytest.raises(UsageError, match="Question 0 of anatomy takes more tokens"):
        suite(tmp_path, max_length=20)


def test_limit_and_subjects(tmp_path):
    write(write(tmp_path), subject="astronomy")
    assert suite(tmp_path, limit=1).info.items == 2
    assert suite(tmp_path, subjects=("astronomy",)).info.subjects == ["astronomy"]
    with pytest.raises(UsageError, match="nearest: astronomy"):
        suite(tmp_path, subjects=("astronmy",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["q", "a", "b", "c", "A"], r"anatomy_test.csv, line 4: a row has 6 cells"),
        (["q", "a", "b", "c", "d", "E"], "line 4: the answer must be one of A, B, C, D"),
        (["q", "a", "", "c", "d", "A"], "line 4: the question or a choice is empty"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, row, message):
    with pytest.raises(UsageError, match=message):
        suite(write(tmp_path, test=[*TEST, row]))


def test_missing_examples_and_folders_are_named(tmp_path):
    with pytest.raises(UsageError, match="holds no MMLU questions"):
        suite(tmp_path)
    with pytest.raises(UsageError, match="holds 2 examples, fewer than --shots 5"):
        suite(write(tmp_path, dev=DEV[:2]))
    with pytest.raises(UsageError, match="Unknown MMLU subject 'anatomyy'; nearest: anatomy"):
        suite(write(tmp_path / "other", subject="anatomyy"))


def test_the_shipped_sample_is_whole():
    made = load_suite(
        "mmlu", tiny_tokenizer(), max_length=10**6, bos="auto", shots=5, limit=None, folder=None, subjects=()
    )
    assert len(made.info.subjects) >= 12
    assert made.info.items == 20 * len(made.info.subjects)
    assert made.info.title == "MMLU-style sample 5-shot"
    assert len({question.prompt for question in made.questions}) == made.info.items


sequences = st.lists(
    st.tuples(
        st.sampled_from([(), (1,) * 70, (1,) * 70 + (2,) * 80]), st.lists(st.integers(0, 2), min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=12,
).map(lambda parts: list(dict.fromkeys((*head, *tail) for head, tail in parts)))


def nodes(tree):
    yield tree
    for inner in tree.inner:
        yield from nodes(inner)


def least(made, limits, base=0):
    """The definition: the cheapest way over every set of sequences that share a prefix, however deep."""
    plain = sum(len(s) - base for s in made)
    if len(made) < 2:
        return plain
    best = plain
    length = max(n for n in range(min(limits) + 1) if len({s[:n] for s in made}) == 1)
    if length > base:  # a shorter one would only leave more to each
        best = min(best, length - base + 64 + least(made, limits, length))
    for cut in range(1, len(made)):
        best = min(best, least(made[:cut], limits[:cut], base) + least(made[cut:], limits[cut:], base))
    return best


@given(made=sequences)
@settings(deadline=None, max_examples=100)
def test_a_tree_covers_every_sequence_once_with_true_prefixes_and_never_costs_tokens(made):
    limits = [len(sequence) - 1 for sequence in made]
    tree = prefix_tree(made, limits)
    assert sorted(tree.every) == list(range(len(made)))
    for node in nodes(tree):
        assert len({made[member][: node.length] for member in node.every}) == 1
        assert all(node.length <= limits[member] for member in node.every)
        assert all(inner.length > node.length for inner in node.inner)
    lengths = [len(sequence) for sequence in made]
    run = tokens_run(tree, lengths)
    assert run == sum(inner.length - node.length for node in nodes(tree) for inner in node.inner) + sum(
        lengths[member] - node.length for node in nodes(tree) for member in node.members
    )
    assert run <= sum(lengths)
    assert tree == prefix_tree(made, limits)


@given(
    made=st.lists(
        st.tuples(st.sampled_from([(), (1,) * 90, (1,) * 90 + (2,) * 80]), st.integers(0, 3)),
        min_size=1,
        max_size=5,
        unique=True,
    )
)
@settings(deadline=None, max_examples=20)
def test_no_other_tree_costs_fewer_tokens(made):
    sequences = sorted((*head, tail + 5) for head, tail in made)
    limits = [len(sequence) - 1 for sequence in sequences]
    tree = prefix_tree(sequences, limits)
    prefixes = sum(1 for _ in nodes(tree)) - 1
    assert tokens_run(tree, [len(s) for s in sequences]) + 64 * prefixes == least(sequences, limits)


def test_a_passage_is_run_once_inside_a_header():
    header, one, two = (5,) * 300, (6,) * 200, (7,) * 200
    made = [header + one + (i,) for i in range(4)] + [header + two + (i,) for i in range(4)]
    tree = prefix_tree(made, [500] * 8)
    (outer,) = tree.inner
    assert (outer.length, outer.members) == (300, ())
    assert sorted((node.length, sorted(node.members)) for node in outer.inner) == [
        (500, [0, 1, 2, 3]),
        (500, [4, 5, 6, 7]),
    ]
    assert tokens_run(tree, [501] * 8) == 300 + 2 * 200 + 8


def test_the_tokens_that_are_run_are_counted_for_the_estimate(tmp_path):
    from qeval.backends.replay import ReplaySession
    from qeval.score.choices import question_tokens, shared_tokens

    made = suite(write(tmp_path))
    session = ReplaySession(256, max_length=2048)
    score_questions(session, made.questions, 4096, nobody)
    assert session.tokens_run == shared_tokens(made.questions) < question_tokens(made.questions)
