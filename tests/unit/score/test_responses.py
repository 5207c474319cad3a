"""Tasks of lm-evaluation-harness without choices: rendered, answered and judged as its own `hf` model does."""

import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qeval.backends.decoding import Greedy
from qeval.backends.torch import TorchSession
from qeval.errors import UsageError
from qeval.score.choices import score_pairs
from qeval.score.generate import Generator, Prompt
from qeval.score.jobs import ignore
from qeval.score.lm import QevalLM
from qeval.score.responses import response_columns, response_tokens, summed_responses
from qeval.tasks import harness_tasks
from qeval.tasks.harness import load_task
from qeval.tasks.harness_text import HarnessText
from qeval.tasks.prompt_form import PLAIN, PromptForm
from qeval.tasks.responses import encode_responses
from tests.fixtures.sums import LAST_WORDS, SUMS, TEXTS, write_task
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer

CONTEXT = 192
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DRAWN = {"num_fewshot": 1, "fewshot_split": "test", "fewshot_config": {"sampler": "default"}}


def tokenizer(template=TEMPLATE):
    made = tiny_tokenizer()
    made.eos_token = "~"
    made.pad_token = "~"
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def model():
    return tiny_llama(max_position_embeddings=CONTEXT, initializer_range=0.4)


@pytest.fixture(scope="module")
def reference(model):
    return HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=1, max_length=CONTEXT)


def suite_of(path, limit=None, form=PLAIN, template=TEMPLATE):
    data = load_task(str(path), shots=5, folder=None, subjects=())
    return encode_responses(data, HarnessText(tokenizer(template), "auto", CONTEXT), limit=limit, form=form)


def expected_of(reference, path, form=PLAIN):
    """The harness's task after its own evaluation, and the metrics of each item by filter."""
    (task,) = TaskManager(include_defaults=False).load([str(path)])["tasks"].values()
    task.set_fewshot_seed(1234)
    task.build_all_requests(
        system_instruction=form.system,
        apply_chat_template=form.chat,
        fewshot_as_multiturn=form.multiturn,
        chat_template=reference.apply_chat_template if form.chat else None,
    )
    found = getattr(reference, task.OUTPUT_TYPE)(task.instances, disable_tqdm=True)
    for instance, response in zip(task.instances, found, strict=True):
        instance.resps.append(response)
    task.apply_filters()
    return task, [
        {name: task.process_results(each.doc, [left]) for name, left in each.filtered_resps.items()}
        for each in task.instances
    ]


@pytest.mark.parametrize(
    ("config", "form"),
    [
        (SUMS, PLAIN),
        (SUMS | DRAWN, PLAIN),
        (SUMS, PromptForm(chat=True, system="Be brief.")),
        (SUMS | {"gen_prefix": "So", "num_fewshot": 1}, PromptForm(chat=True, multiturn=False)),
    ],
)
def test_answers_and_their_scores_are_the_harnesss_own(model, reference, tmp_path, config, form):
    path = write_task(tmp_path, "tiny_sums", config)
    task, judged = expected_of(reference, path, form)
    suite = suite_of(path, form=form)
    for item, instance in zip(suite.items, task.instances, strict=True):
        prompt = tuple(reference.tok_encode(instance.args[0]))
        assert item.prompt == prompt[-(CONTEXT - 24) :]
        assert item.cut == max(0, len(prompt) - (CONTEXT - 24))

    prompts = [Prompt(item.prompt, item.ending) for item in suite.items]
    answers = Generator(TorchSession(model), tokenizer(), frozenset(), 100).answers(prompts, ignore)
    assert [answer.text for answer in answers] == [instance.resps[0] for instance in task.instances]
    columns = response_columns(suite, suite.items, answers, "baseline", "torch")
    assert columns["task"][:2] == ["tiny_sums_exact_match_strict_match", "tiny_sums_exact_match_flexible_extract"]
    assert columns["score"] == [each[name]["exact_match"] for each in judged for name in each]
    kept = [instance.filtered_resps[name] for instance in task.instances for name in instance.filtered_resps]
    assert columns["answer"] == kept
    assert columns["response"][::2] == [answer.text for answer in answers]


def test_long_prompts_are_cut_and_the_adapter_generates_as_the_harness_does(model, reference, tmp_path):
    path = write_task(tmp_path, "tiny_long", SUMS | {"num_fewshot": 2, "description": "Think. " * 12})
    task, _ = expected_of(reference, path)
    suite = suite_of(path)
    assert suite.info.cut_prompts == len(suite.items)
    assert {len(item.prompt) for item in suite.items} == {CONTEXT - 24}
    found = QevalLM(TorchSession(model), tokenizer()).generate_until(task.instances)
    assert found == [instance.resps[0] for instance in task.instances]


def test_stop_strings_and_the_limit_of_length_end_answers_and_are_told_apart(model, tmp_path):
    free = suite_of(write_task(tmp_path, "tiny_free", SUMS | {"generation_kwargs": {"until": [], "max_gen_toks": 9}}))
    prompts = [Prompt(item.prompt, item.ending) for item in free.items]
    generator = Generator(TorchSession(model), tokenizer(), frozenset(), 100)
    cut = generator.answers(prompts, ignore)
    assert all(answer.is_cut and answer.tokens == 9 for answer in cut)
    whole = tokenizer().decode(generator.session.generate([prompts[0].tokens], 9, Greedy(), ())[0])
    stop = whole[3:5]
    (ended,) = generator.answers([Prompt(prompts[0].tokens, prompts[0].ending._replace(until=(stop,)))], ignore)
    assert (ended.text, ended.is_cut) == (whole.split(stop)[0], False)
    assert ended.tokens < 9


def test_continuations_and_whole_texts_score_as_in_the_harnesss_own_model(model, reference, tmp_path):
    session = TorchSession(model)
    for name, config in (("tiny_words", LAST_WORDS), ("tiny_texts", TEXTS)):
        path = write_task(tmp_path, name, config)
        task, judged = expected_of(reference, path)
        suite = suite_of(path)
        scores = score_pairs(session, [pair for item in suite.items for pair in item.pairs], 100, ignore)
        responses = summed_responses(suite, suite.items, scores)
        columns = response_columns(suite, suite.items, responses, "baseline", "torch")
        values = {
            metric.name: [s for s, name in zip(columns["score"], columns["task"], strict=True) if name == metric.name]
            for metric in suite.scores
        }
        aggregation = task.aggregation()
        for score in suite.scores:
            own = [each["none"][score.metric] for each in judged]
            mean = float(np.mean(values[score.name]))
            expected = aggregation[score.metric](own)
            back = {"acc": mean, "bits_per_byte": mean / np.log(2)}.get(score.metric, np.exp(mean))
            assert back == pytest.approx(expected, rel=1e-4)
        assert response_tokens(suite.items) > 0
        assert columns["response"] == [None] * len(columns["score"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"generation_kwargs": {"until": ["."], "do_sample": True, "temperature": 0.7}}, "samples its answers"),
        ({"generation_kwargs": {"until": ["."], "num_beams": 4}}, "sets num_beams, which"),
        ({"generation_kwargs": {"until": ["."], "max_gen_toks": 500}}, "leave no room for a prompt in the model's"),
        ({"metric_list": [{"metric": "bleu"}]}, "has no metric with a value and a direction for each item .bleu."),
        ({"unsafe_code": True}, "runs the programs that a model writes.*`qeval import`"),
        ({"metric_list": [{"metric": "code_eval", "hf_evaluate": True}]}, "none of lm-eval's own.*`qeval import`"),
        ({"dataset_path": "pandas"}, "may run code that lies in it"),
        ({"task": ["a", "b"]}, "no single task"),
        ({"doc_to_target": "{{question.__class__.__base__.__subclasses__()}}"}, "is unsafe"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, change, words):
    path = write_task(tmp_path, "tiny_bad", SUMS | change)
    with pytest.raises(UsageError, match=words):
        suite_of(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: a\nprocess_docs: !function utils.docs\n", "runs code .!function utils.docs."),
        ("task: a\nfewshot_config:\n  samples: !function utils.docs\n", "runs code"),
        ("task: a\nclass: !function task.Own\n", "runs code"),
        ("task: a\nx: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
        ("- a\n", "holds no task"),
        ("include: other.yaml\ntask: a\n", "runs code .!function utils.more."),
    ],
)
def test_a_file_that_runs_code_is_refused_before_any_of_it_runs(tmp_path, text, words):
    (tmp_path / "utils.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "other.yaml").write_text("doc_to_text: !function utils.more\n")
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        suite_of(tmp_path / "task.yaml")
    assert not (tmp_path / "ran").exists()


def test_names_are_looked_up_before_any_program_of_a_task_is_loaded(tmp_path, monkeypatch):
    write_task(tmp_path, "tiny_programs", SUMS | {"unsafe_code": True})
    (tmp_path / "group.yaml").write_text("group: tiny_group\ntask: [tiny_programs]")
    index = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(harness_tasks, "task_index", lambda: index)
    for name in ("tiny_programs", "tiny_group"):
        with pytest.raises(UsageError, match="'tiny_programs' runs the programs that a model writes"):
            suite_of(name)
    with pytest.raises(UsageError, match="Unknown task 'tiny_program'; nearest: tiny_programs"):
        suite_of("tiny_program")


def test_a_model_without_a_chat_template_is_told_so(tmp_path):
    with pytest.raises(UsageError, match="has no chat template; leave --apply-chat-template out"):
        suite_of(write_task(tmp_path, "tiny_sums", SUMS), form=PromptForm(chat=True), template=None)
    with pytest.raises(UsageError, match="can't be used for a task's prompt: No systems"):
        suite_of(
            write_task(tmp_path, "tiny_sums", SUMS),
            form=PromptForm(chat=True, system="x"),
            template="{{ raise_exception('No systems') }}",
        )


def test_what_a_task_is_judged_by_is_part_of_its_identity(tmp_path):
    one = suite_of(write_task(tmp_path, "tiny_sums", SUMS))
    other = suite_of(write_task(tmp_path, "tiny_sums", SUMS | {"filter_list": SUMS["filter_list"][:1]}))
    longer = suite_of(
        write_task(
            tmp_path, "tiny_sums", SUMS | {"generation_kwargs": SUMS["generation_kwargs"] | {"max_gen_toks": 25}}
        )
    )
    assert one.judged_by != other.judged_by
    assert [item.sha256 for item in one.items] == [item.sha256 for item in other.items]
    assert not {item.sha256 for item in one.items} & {item.sha256 for item in longer.items}
