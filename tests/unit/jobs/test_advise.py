"""`qeval advise`: faults planted in tiny models are named, and what treats them is shown to help."""

import json
from functools import partial

import pytest
import torch

import qeval
from qeval.backends.torch import TorchBackend
from qeval.cli.app import run_program
from qeval.compare.variants import BaselineModel, Calibration, Workshop, check_recipes
from qeval.config import parse_method
from qeval.jobs.loss_causes import find_causes
from qeval.jobs.treatments import propose, recipe_fields
from qeval.metrics.tokens import mean_kl
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.progress import Silent
from qeval.recipe_files import load_recipes
from qeval.types import Request
from tests.fixtures.bench import Bench
from tests.fixtures.tiny import change_weights, tiny_llama


def samples(seed, count=4, length=96):
    draw = torch.Generator().manual_seed(seed)
    return tuple(tuple(torch.randint(1, 256, (length,), generator=draw).tolist()) for _ in range(count))


SEEN, HELD_OUT = samples(1), samples(2)


def loud_norms(model):
    """One channel of every layer's inputs is thirty times the others."""
    for layer in model.model.layers:
        layer.input_layernorm.weight[3] = 30.0
        layer.post_attention_layernorm.weight[7] = 30.0


def loud_hidden(model):
    """One input of each feed-forward's last matrix is sixty times what it was, and its weights a sixtieth."""
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[5] *= 60.0
        layer.mlp.down_proj.weight[:, 5] /= 60.0


def loud_attention_input(model):
    for layer in model.model.layers:
        layer.input_layernorm.weight[3] = 30.0


def loud_keys(model):
    """One pair of channels of keys is twenty times, and that of queries a twentieth: the float model is the same."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for row in (2, 10):
            attention.k_proj.weight[row] *= 20.0
            for head in range(2):
                attention.q_proj.weight[16 * head + row] /= 20.0


def loud_values(model):
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight[3] *= 30.0
        for head in range(2):
            layer.self_attn.o_proj.weight[:, 16 * head + 3] /= 30.0


def spoilt_head(model):
    """The head has a column that nothing reads and that fixes the scale of every row."""
    model.model.norm.weight[5] = 0.0
    model.lm_head.weight[:, 5] = 4.0


def spoilt_queries(model):
    layer = model.model.layers[0]
    layer.input_layernorm.weight[9] = 0.0
    for matrix in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        matrix.weight[:, 9] = 3.0


def spoilt_down(model):
    layer = model.model.layers[1]
    layer.mlp.up_proj.weight[4] = 0.0
    layer.mlp.down_proj.weight[:, 4] = 4.0


def spoilt_gate(model):
    layer = model.model.layers[1]
    layer.post_attention_layernorm.weight[9] = 0.0
    for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
        matrix.weight[:, 9] = 4.0


FAULTS = [
    (loud_norms, "int8-w8a8", "activation outliers", "smoothquant"),
    (loud_hidden, "int8-w8a8", "activation outliers", "smoothquant"),
    (loud_norms, "rtn:int8-channel+a-int4", "activation outliers", "smoothquant"),
    (loud_norms, "rtn:int6-channel+a-int4", "activation outliers", "rtn:int6-channel+a-int4-token+r1r2"),
    (loud_attention_input, "rtn:int4-g32", "salient columns", "awq"),
    (loud_norms, "rtn:int3-g32", "salient columns", "awq"),
    (loud_keys, "fp16+kv-int4", "key outliers", "fp16+k-int4-channel"),
    (loud_values, "rtn:int8-channel+kv-int4", "value outliers", "rtn:int8-channel+k-int4-token+v-int4-channel"),
    (spoilt_head, "rtn:int4-channel-head", "sensitive head", "rtn:int4-channel-head (head int8-channel)"),
    (spoilt_queries, "rtn:int4-channel", "sensitive group", "mixed-rtn"),
    (spoilt_down, "rtn:int4-channel", "sensitive group", "mixed-rtn"),
    (spoilt_gate, "rtn:int4-channel", "sensitive group", "mixed-rtn"),
]


class Place:
    """A model with a fault, and what the job makes of it."""

    def __init__(self, plant):
        self.model = tiny_llama()
        if plant is not None:
            plant(self.model)
        description, head = describe_model(self.model), head_of(self.model)
        self.source = BaselineModel(
            self.model, description, head, str(plant), "c", "tiny", torch.float32, torch.float32, torch.device("cpu")
        )
        self.workshop = Workshop(self.source, lambda: Calibration(SEEN, {"tokens_sha256": "t"}), 0, Silent())
        self.backend = TorchBackend(self.model, description, head, torch.float32)
        self.head = head

    def look(self, method):
        recipe, source = parse_method(method), self.workshop.calibrated_source(parse_method("awq"))
        causes = find_causes(source, recipe, lambda _: None)
        check = partial(self.check, len(SEEN))
        return causes, propose(source, recipe, causes, check)

    def check(self, count, recipe):
        check_recipes([recipe], self.source, count)

    def kl(self, recipe):
        """The recipe's mean KL on text that nothing was measured on."""
        requests = [Request(each, range(len(each))) for each in HELD_OUT]
        entry = self.workshop.entry(recipe)
        assert entry.error is None
        with self.backend.open(None) as session:
            exact = torch.cat(session.states(requests))
        with self.backend.open(entry.target) as session:
            return mean_kl(self.head.logits, exact, session.logits, torch.cat(session.states(requests)))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A run of a model with salient columns."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("advise")
        patch.setenv("QEVAL_HOME", str(folder / "home"))
        bench = Bench(folder)
        change_weights(bench.model, lambda weights: [weights[name].__setitem__(3, 30.0) for name in LOUD])
        assert bench.compare("--quiet", methods="rtn:int4-g32,mixed-rtn:int4-g32,fp16+kv-int8", tasks="kl,ppl") == 0
        yield bench


LOUD = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.mark.parametrize(("plant", "method", "kind", "treated"), FAULTS)
def test_a_planted_fault_is_named_first_and_its_treatment_gains(plant, method, kind, treated):
    place = Place(plant)
    causes, proposals = place.look(method)
    assert causes.findings[0].kind == kind, causes
    assert causes.findings[0].value >= causes.findings[0].threshold
    assert 1 <= len(proposals) <= 3
    first, recipe = proposals[0]
    assert first == kind
    assert recipe.name.startswith(treated), recipe.name
    before, after = place.kl(parse_method(method)), place.kl(recipe)
    assert after < 0.8 * before, (before, after)


@pytest.mark.parametrize("method", ["int8-w8a8", "rtn:int4-g32-head"])
def test_a_model_without_a_fault_has_no_finding(method):
    causes, proposals = Place(None).look(method)
    assert (causes.findings, proposals) == ((), [])


def test_a_run_leaves_findings_and_paired_gains_on_windows_that_it_did_not_score(bench, capfd):
    assert run_program(["advise", str(bench.out), "--json", "--quiet", "--max-windows", "6"]) == 0
    advice = json.loads(capfd.readouterr().out)
    out = bench.out / "advice"
    assert json.loads((out / "advice.json").read_text()) == advice
    assert advice["variant"] == "rtn:int4-g32"
    assert [each["kind"] for each in advice["findings"]] == ["salient columns"]
    (result,) = advice["results"]
    assert (result["name"], result["verdict"], advice["windows"]) == ("awq:int4-g32", "better", 6)

    # the gain is the difference of the KLs, and its interval is around it
    gain = result["gain_nats"]
    assert gain["value"] == pytest.approx(advice["kl_nats"]["value"] - result["kl_nats"]["value"])
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert bench.corpus.read_text().endswith(rest := (out / "held-out.txt").read_text())
    scored = qeval.load(bench.out).record.protocol
    assert len(rest) < len(bench.corpus.read_text()) - scored.windows * (scored.window - 1)  # a byte is a token
    (recipe,) = load_recipes(out / "recipes.yaml")
    assert recipe.identity() == parse_method("awq:int4-g32").identity()
    assert "KL of each part alone" in (out / "advice.html").read_text()


def test_groups_are_not_tried_again_where_a_mix_has_tried_them(bench, monkeypatch, tmp_path):
    tried = []
    monkeypatch.setattr("qeval.quantize.sensitivity.measure", lambda *_: tried.append(1))
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))  # where the run made mixed-rtn:int4-g32
    qeval.advise(bench.out, "rtn:int4-g32", max_windows=4, out=tmp_path / "out")
    assert not tried


def test_treatments_are_read_back_from_their_file(tmp_path):
    for plant, method, *_ in FAULTS[-4:-2]:
        for _, recipe in Place(plant).look(method)[1]:
            path = tmp_path / "recipes.yaml"
            path.write_text(json.dumps({"variants": [recipe_fields(recipe)]}))
            assert load_recipes(path) == [recipe]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["rtn:int4-g64"], "Unknown variant"),
        (["mixed-rtn:int4-g32"], "mixed-rtn is not looked into; name a variant of rtn, awq"),
        (["--corpus", "CORPUS"], "corpus.txt is what the run scored; name another text"),
    ],
)
def test_what_can_not_be_looked_into_is_refused(bench, capfd, tmp_path, flags, says):
    words = [str(bench.corpus) if flag == "CORPUS" else flag for flag in flags]
    assert run_program(["advise", str(bench.out), *words, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert says in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_scored_all_of_its_text_needs_another_one(bench, capfd, tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    assert bench.compare("--quiet", methods="rtn:int4-g32", tasks="kl", max_windows=None, out=out) == 0
    assert run_program(["advise", out, "--quiet"]) == 2
    assert "The run scored its text but for 0 windows" in capfd.readouterr().err
    (tmp_path / "more.txt").write_text("".join(f"{i} geese, {i * i} foxes and {i % 7} hens.\n" for i in range(30)))
    monkeypatch.chdir(tmp_path)  # the text's path starts here, those of the run where it was started
    assert run_program(["advise", out, "--quiet", "--corpus", "more.txt"]) == 0


def test_a_run_of_variants_from_elsewhere_is_refused(bench, capfd, tmp_path):
    assert bench.quantize("rtn:int4-g32", tmp_path / "made") == 0
    out, variant = tmp_path / "run", f"theirs={tmp_path / 'made'}"
    assert bench.compare("--quiet", "--variant", variant, methods=None, tasks="kl", out=str(out)) == 0
    assert run_program(["advise", str(out)]) == 2
    assert "were made elsewhere; qeval advises on those of recipes" in capfd.readouterr().err


def test_an_imported_run_is_refused(capfd, tmp_path):
    (tmp_path / "a.csv").write_text("item,score\n1,1\n2,0\n")
    files = [f"{name}={tmp_path / 'a.csv'}" for name in ("base", "other")]
    assert run_program(["import", *files, "--out", str(tmp_path / "run"), "--quiet", "--higher-is-better"]) == 0
    assert run_program(["advise", str(tmp_path / "run")]) == 2
    assert "was imported, so there is no model to look into" in capfd.readouterr().err
