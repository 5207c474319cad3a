"""Endpoints: every server's form of request against a torch session, runs with one, and every refusal."""

import pyarrow.compute as pc
import pytest
import torch

from qeval.backends.endpoint.backend import find_endpoint
from qeval.backends.endpoint.client import Access, Client, connect_endpoint
from qeval.backends.endpoint.predictions import READERS
from qeval.backends.endpoint.token_texts import TokenTexts
from qeval.backends.torch import TorchSession
from qeval.errors import QevalError, UsageError
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.report.explain.build import build_explanation
from qeval.score.choices import score_pairs
from qeval.score.served import compare_predictions, served_scores
from qeval.store.rows import RowStore
from qeval.store.schema import LOWER_BOUND_COLUMNS
from qeval.types import Request
from tests.fixtures.bench import Bench
from tests.fixtures.endpoint import StandIn, logits_of, served
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer

FORMS = [reader.name for reader in READERS]
TOKENS = tuple(range(40, 80))
QUIET = ("--quiet",)


@pytest.fixture(scope="module")
def session():
    return TorchSession(tiny_llama(seed=1, max_position_embeddings=512))


@pytest.fixture
def stand_in(session):
    return StandIn(logits_of(session), tiny_tokenizer())


def find(stand_in, url, *, model=None, top=5, timeout=5.0):
    access = Access(url, "OPENAI_API_KEY", timeout, requests=3)
    return find_endpoint(access, model, top, TokenTexts(stand_in.tokenizer, 256), TOKENS)


@pytest.mark.parametrize("form", [*FORMS, "echo, text"])
def test_predictions_are_the_sessions_log_probabilities_in_order(form, stand_in):
    stand_in.form, _, text = form.partition(", ")
    stand_in.takes_ids = not text
    requests = [Request(TOKENS[start:], (0, 3, len(TOKENS) - start - 1)) for start in range(6)]
    with served(stand_in) as url:
        endpoint = find(stand_in, url)
        found = endpoint.predictions(requests, lambda done: None)
    assert endpoint.reader.name == stand_in.form and endpoint.label == "tiny-awq"
    for request, predictions in zip(requests, found, strict=True):
        expected = torch.log_softmax(stand_in.logits(list(request.tokens)), dim=-1)
        for position, prediction in zip(request.positions, predictions, strict=True):
            if position + 1 < len(request.tokens):
                assert request.tokens[position + 1] in prediction
            likeliest = expected[position].topk(5)
            if -1 not in prediction:
                assert set(likeliest.indices.tolist()) <= set(prediction)
            elif int(likeliest.indices[0]) not in prediction:  # a part of a character, whose text several tokens have
                assert stand_in.form == "echo" and max(prediction, key=prediction.__getitem__) == -1
            for token in (token for token in prediction if token >= 0):
                assert prediction[token] == pytest.approx(float(expected[position, token]), abs=1e-4)


def test_a_token_that_is_not_among_the_likeliest_is_asked_for_again(stand_in):
    stand_in.form = "completion"
    least = int(stand_in.logits(list(TOKENS[:4]))[-1].argmin())
    with served(stand_in) as url:
        found = find(stand_in, url).predictions([Request((*TOKENS[:4], least), (3,))], lambda done: None)
    assert least in found[0][0]
    assert [body["n_probs"] for path, body in stand_in.sent if path == "/completion"][-3:] == [5, 80, 256]


def changed(stand_in, **values):
    for name, value in values.items():
        setattr(stand_in, name, value)


REFUSALS = {
    "no log-probabilities": ({"form": "none"}, {}, "gives no log-probabilities of given tokens"),
    "too many": ({"most": 3}, {}, r"answered 400 at /v1/completions: more than 3 log-probabilities.*--endpoint-top"),
    "a wrong model": ({}, {"model": "tiny-gptq"}, "Unknown model of --backend http.*'tiny-gptq'.*folder/tiny-awq"),
    "several models": ({"models": ("a", "b")}, {}, "serves a, b; choose one by --endpoint-model"),
    "a key that lacks": ({"key": "secret"}, {}, r"wants a key; set the environment variable OPENAI_API_KEY .*401"),
    "tokens that are added": ({"added": (1,)}, {}, "tells of 5 tokens where 4 were sent|tells of 4 tokens where 3"),
    "other tokens": ({"form": "echo", "takes_ids": False, "added": (1,)}, {}, "read other tokens than it was sent: at"),
    "no OpenAI endpoint": ({"trouble": lambda path, count: (404, {})}, {}, "lists no models at /v1/models"),
}


@pytest.mark.parametrize("values,asked,says", REFUSALS.values(), ids=REFUSALS)
def test_each_refusal_is_a_sentence(values, asked, says, stand_in, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    changed(stand_in, **values)
    with served(stand_in) as url, pytest.raises(UsageError, match=says):
        find(stand_in, url, **asked)


def test_a_key_of_the_environment_is_sent_and_not_told(stand_in, monkeypatch):
    stand_in.key = "sk-right"
    with served(stand_in) as url:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
        assert find(stand_in, url).probe
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        with pytest.raises(UsageError, match="refuses the key in the environment variable OPENAI_API_KEY") as error:
            find(stand_in, url)
        assert "sk-wrong" not in str(error.value)
        stand_in.key, stand_in.trouble = "", lambda path, count: (400, {"error": "bad key sk-wrong"})
        with connect_endpoint(Access(url, "OPENAI_API_KEY", 5.0, 1)) as client, pytest.raises(QevalError) as error:
            client.get("/v1/models")
        assert "bad key ***" in str(error.value)


def test_what_fails_for_a_while_is_tried_again_and_in_the_end_told(stand_in):
    waits = []
    stand_in.trouble = lambda path, count: (503, "busy") if count <= 2 else None
    with served(stand_in) as url, connect_endpoint(Access(url, "OPENAI_API_KEY", 5.0, 1)) as client:
        patient = Client(client.access, client._http, waits.append)
        assert patient.get("/v1/models")["data"]
        assert waits == [0.5, 1.0]
        stand_in.trouble = lambda path, count: (503, "busy")
        with pytest.raises(QevalError, match="failed 5 times at /v1/models: it answered 503, busy"):
            patient.get("/v1/models")
    patient = Client(Access("http://127.0.0.1:9", "OPENAI_API_KEY", 5.0, 1), client._http, waits.append)
    with connect_endpoint(patient.access) as other, pytest.raises(QevalError, match="failed 5 times"):
        Client(patient.access, other._http, lambda seconds: None).get("/v1/models")


def test_an_answer_that_takes_too_long_is_told(stand_in):
    stand_in.lock.acquire()  # no request is answered
    try:
        with served(stand_in) as url, connect_endpoint(Access(url, "OPENAI_API_KEY", 0.05, 1)) as client:
            with pytest.raises(QevalError, match=r"no answer within 0\.05 s"):
                Client(client.access, client._http, lambda seconds: None).get("/v1/models")
            stand_in.lock.release()
    finally:
        if stand_in.lock.locked():
            stand_in.lock.release()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def home(bench, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))


def baseline_session(bench):
    return TorchSession(load_model(resolve(str(bench.model), None), device="cpu", dtype=None).model)


WINDOWS = {"window": "64", "stride": "64", "max_windows": "3", "tasks": "kl,ppl,mmlu"}


@pytest.fixture(scope="module")
def run(bench, session, tmp_path_factory):
    """A run of a torch variant and the stand-in's model, which is another one than the baseline."""
    out = tmp_path_factory.mktemp("run") / "out"
    stand_in = StandIn(logits_of(session), tiny_tokenizer())
    with pytest.MonkeyPatch.context() as patch, served(stand_in) as url:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        flags = {"methods": "rtn:g32", "backend": f"torch,{url}/v1", "out": str(out), **WINDOWS}
        assert bench.compare(*QUIET, **flags) == 0
        sent = len(stand_in.sent)
        assert bench.compare(*QUIET, **flags) == 0
        again = len(stand_in.sent) - sent
    return out, again


def test_a_run_names_the_bound_and_ranks_it_nowhere(run, bench):
    out, again = run
    assert again <= 6  # the models and the probes alone: finished rows are found
    found = {variant["name"]: variant for variant in bench.report(out)["variants"]}
    served_report, exact = found["tiny-awq@endpoint"], found["rtn:g32"]
    metrics = served_report["metrics"]
    assert metrics["kl_lower_bound_nats"]["value"] > 0 and 0 < metrics["mass_outside"]["value"] < 1
    assert not [name for name in metrics if name.startswith("kl_nats") or name == "reverse_kl_nats"]
    assert "kl_lower_bound_nats" not in exact["metrics"] and exact["metrics"]["kl_nats"]["value"] > 0
    assert metrics["ppl"]["value"] > 0 and "mmlu_acc" in metrics
    assert served_report["size_bytes"] is None and not served_report["pareto"]
    report = bench.report(out)
    assert all("tiny-awq@endpoint" not in (c["better_name"], c["other_name"]) for c in report["comparisons"])
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "KL at least, nats" in page and "lower bound of KL(baseline ‖ variant)" in page


def test_the_bound_and_the_scores_are_those_of_the_whole_distributions(run, session, bench):
    """The rows of a bound are at most the exact KL of the same models; NLL and choices are exact."""
    out, _ = run
    table = RowStore(out).read(
        "tokens", ["variant", "window", "position", "token", "nll", "kl_nats", *LOWER_BOUND_COLUMNS]
    )
    assert table.filter(pc.equal(table["variant"].cast("string"), "rtn:g32"))[LOWER_BOUND_COLUMNS[0]].null_count > 0
    ours = table.filter(pc.equal(table["variant"].cast("string"), "tiny-awq@endpoint")).to_pandas()
    assert ours["kl_nats"].isna().all()
    baseline = baseline_session(bench)
    for _, window in ours.groupby("window"):
        tokens = window["token"].tolist()
        base, other = (torch.log_softmax(logits_of(each)(tokens).double(), -1) for each in (baseline, session))
        kl = (base.exp() * (base - other)).sum(-1)
        bound = torch.tensor(window[LOWER_BOUND_COLUMNS[0]].to_numpy())
        assert (bound <= kl + 1e-5).all() and (bound > 0).any()
        nll = -other[range(len(tokens) - 1), tokens[1:]]
        assert torch.allclose(torch.tensor(window["nll"].to_numpy()[1:]), nll, atol=1e-4)


def test_all_of_the_vocabulary_gives_the_kl_itself_and_the_baseline_no_bound_above_zero(bench, tmp_path):
    same = baseline_session(bench)
    out = tmp_path / "out"
    stand_in = StandIn(logits_of(same), tiny_tokenizer(), models=("tiny",))
    with served(stand_in) as url:
        flags = {"methods": None, "backend": url, "out": str(out), **WINDOWS, "tasks": "kl"}
        assert bench.compare(*QUIET, "--endpoint-top", "256", **flags) == 0
    (found,) = bench.report(out)["variants"]
    assert found["metrics"]["kl_lower_bound_nats"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["metrics"]["mass_outside"]["value"] == 0


def test_explanations_and_gates_say_that_there_is_no_kl(run, tmp_path):
    out, _ = run
    explained = build_explanation(out, "tiny-awq@endpoint")
    assert explained.tokens is None and any("lower bound of KL alone" in note for note in explained.notes)


RUN_REFUSALS = {
    "variants on nothing": ({}, "--methods or --variant needs a model that qeval opens"),
    "drift": ({"methods": None, "tasks": "drift"}, "--tasks drift needs a model that qeval opens"),
    "workers": ({"methods": None, "workers": "2"}, "--workers needs a model that qeval opens"),
    "no address": ({"methods": None, "backend": "ftp://x"}, "is no address of an endpoint"),
    "a password": ({"methods": None, "backend": "http://u:p@x"}, "holds no user, password or key"),
    "a key in the place of a variable": (
        {"methods": None, "endpoint_key_variable": "sk-1"},
        "takes the name of an",
    ),
    "flags without an endpoint": ({"backend": "torch", "endpoint_top": "3"}, "--endpoint-... flags are for --backend"),
}


@pytest.mark.parametrize("flags,says", RUN_REFUSALS.values(), ids=RUN_REFUSALS)
def test_runs_that_an_endpoint_cannot_do_are_refused(bench, flags, says, capsys):
    assert bench.compare(*QUIET, **{"backend": "http://127.0.0.1:9", **flags}) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_likeliest_token_that_is_not_known_agrees_and_disagrees_with_nothing():
    base = torch.log_softmax(torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0], [0.0, 1.0, 3.0]]), dim=-1)
    predictions = [{-1: -0.1, 1: -3.0}, {1: -0.7, 0: -0.7}, {0: -0.2, 5: -9.0}]  # of equals the lowest id
    found = compare_predictions(lambda states: states, base, predictions, torch.tensor([1, -1, 0]))
    assert torch.equal(found["top1_agreement"].nan_to_num(-1), torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64))
    assert found["log_p"].tolist()[0] == -3.0 and found["log_p"].isnan().tolist() == [False, True, False]
    kl, outside = (found[name] for name in LOWER_BOUND_COLUMNS)
    assert outside[0] == pytest.approx(1 - float(base[0, 1].exp()), abs=1e-6) and (kl > 0).all()


def test_tokens_that_are_no_text_are_not_sent_as_text(stand_in):
    stand_in.form, stand_in.takes_ids = "echo", False
    with served(stand_in) as url:
        endpoint = find(stand_in, url)
        with pytest.raises(UsageError, match="takes no token ids, and as a text these 3 tokens would be others"):
            endpoint.predictions([Request((40, 240, 41), (0, 1))], lambda done: None)


@pytest.mark.parametrize("form", ["prompt_logprobs", "prompt_logprobs, texts", "generate", "completion"])
def test_choices_have_the_sessions_scores_whether_read_off_one_distribution_or_sent_whole(form, stand_in, session):
    stand_in.form, _, names = form.partition(", ")
    stand_in.names_ids = not names
    likeliest = stand_in.logits(list(TOKENS[:9]))[-1].argsort(descending=True).tolist()
    context = TOKENS[:9]
    pairs = [(context, (likeliest[0],)), (context, (likeliest[2],)), (context, (likeliest[-1],)), (context, (50, 51))]
    pairs += [(TOKENS[3:9], (52,)), pairs[1]]
    with served(stand_in) as url:
        endpoint = find(stand_in, url)
        stand_in.sent.clear()
        found = served_scores(endpoint, pairs, lambda done: None)
    expected = score_pairs(session, pairs, 512, lambda done: None)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] and expected[0][1]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    if form == "prompt_logprobs":
        whole = [body for _, body in stand_in.sent if "prompt_logprobs" in body]
        assert len(stand_in.sent) - len(whole) == 2 and len(whole) <= 3  # the least likely, two tokens, perhaps 52
        assert {body["prompt_logprobs"] for body in whole} == {1}
