"""What is defended: a gate believes nothing of a run's folder that its record does not vouch for.

Each way is a folder of a run that passes, changed as an accident or a careless hand would change it; none may pass.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from qeval.cli.app import run_program as program
from qeval.gate.judge import judge
from qeval.gate.policy import Policy
from qeval.identity import digest_file
from qeval.report import build_report
from qeval.store.attempts import UNFINISHED
from qeval.store.rows import RowStore
from qeval.store.seal import seal
from tests.fixtures.gate import INT4, INT8, RELEASE, told
from tests.fixtures.runs import Shape, make_run, reseal

RULES = [
    {"metric": "kl_nats", "at_most": "0.05 nats"},
    {"metric": "top1_agreement", "at_least": "90 %"},
    {"metric": "size_ratio", "at_least": "1.5 times"},
]
SHAPE = Shape(variants=(INT8,), windows=24, questions=4)
BAD = Shape(variants=(INT4,), windows=24, questions=4)


def policy(*rules, **more):
    return Policy.model_validate({"name": "p", "rules": list(rules or RULES), **more})


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run that passes."""
    return make_run(tmp_path_factory.mktemp("sound") / "run", SHAPE)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A run of another variant that fails."""
    return make_run(tmp_path_factory.mktemp("bad") / "run", BAD)


@pytest.fixture
def out(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "run")


@pytest.fixture
def gated(tmp_path, capfd):
    """The exit code of `qeval gate` on a folder, and all that it said."""
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps(policy().model_dump(exclude_none=True)))

    def gate(folder, *more):
        code, heard, err = told(capfd, folder, "--policy", path, *more)
        return code, " ".join((heard + err).split())

    return gate


def record(folder):
    return json.loads((folder / "run.json").read_text())


def put(folder, content):
    (folder / "run.json").write_text(json.dumps(content))


def index(folder):
    return json.loads((folder / "rows/index.json").read_text())


def put_index(folder, content):
    (folder / "rows/index.json").write_text(json.dumps(content))


def shard(folder, kind="tokens", place=-1):
    return folder / "rows" / kind / index(folder)[kind][place]


def a_smaller_size(out, _):
    content = record(out)
    content["variants"][0]["size_bytes"] = 1
    put(out, content)


def a_larger_baseline(out, _):
    content = record(out)
    content["baseline_size_bytes"] *= 10
    put(out, content)


def a_failed_variant_that_is_done(out, _):
    content = record(out)
    content["variants"].append(dict(content["variants"][0], name="other", status="failed", error="no memory"))
    reseal(out, content)
    content = record(out)
    content["variants"][1].update(status="done", error=None)
    put(out, content)


def a_variant_called_the_noise_floor(out, _):
    content = record(out)
    content["variants"][0]["role"] = "floor"
    put(out, content)


def a_key_said_twice(out, _):
    path = out / "run.json"
    text = path.read_text()
    path.write_text(text.replace('"size_bytes": ', '"size_bytes": 1, "size_bytes": ', 1))


def a_record_called_older(out, _):
    content = record(out) | {"run_version": 1, "chain": None, "sha256": None}
    put(out, content)


def a_record_of_two_versions(out, _):
    put(out, record(out) | {"run_version": 1})


def a_record_without_its_chain(out, _):
    put(out, record(out) | {"chain": None})


def other_settings(out, _):
    content = record(out) | {"settings": {"folder": "/", "settings": {"seed": 1}}}
    content["sha256"] = None
    put(out, seal(content))


def the_record_of_another_run(out, bad):
    shutil.copy(bad / "run.json", out / "run.json")


def the_rows_of_another_run(out, bad):
    shutil.rmtree(out / "rows")
    shutil.copytree(bad / "rows", out / "rows")


def a_link_to_the_rows_of_another_run(out, bad):
    shutil.rmtree(out / "rows")
    (out / "rows").symlink_to(bad / "rows")


def a_link_to_the_record_of_another_run(out, bad):
    (out / "run.json").unlink()
    (out / "run.json").symlink_to(bad / "run.json")


def an_index_that_lacks_a_shard(out, _):
    put_index(out, {**index(out), "tokens": index(out)["tokens"][1:]})


def an_index_that_names_a_shard_twice(out, _):
    put_index(out, {**index(out), "tokens": [*index(out)["tokens"], index(out)["tokens"][0]]})


def an_index_that_leaves_the_folder(out, bad):
    put_index(out, {**index(out), "tokens": [os.path.relpath(shard(bad), out / "rows/tokens")]})


def an_index_of_another_kind(out, _):
    put_index(out, {**index(out), "..": ["run.json"]})


def a_shard_swapped_for_another_runs(out, bad):
    shutil.copy(shard(bad), shard(out))


def a_shard_of_another_run_under_its_own_digest(out, bad):
    name = shard(bad).name
    shutil.copy(shard(bad), out / "rows/tokens" / name)
    put_index(out, {**index(out), "tokens": [index(out)["tokens"][0], name]})


def another_shard_of_the_same_job(out, _):
    changed = make_run(out.parent / "again", Shape(variants=(INT8,), windows=24, questions=4, edits={"tokens": no_kl}))
    name = shard(changed).name
    shutil.copy(shard(changed), out / "rows/tokens" / name)
    put_index(out, {**index(out), "tokens": [index(out)["tokens"][0], name]})


def no_kl(name, columns):
    return columns if name == "baseline" else columns | {"kl_nats": np.zeros(len(columns["window"])) + 1e-9}


def a_shard_cut_short(out, _):
    path = shard(out)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_shard_removed(out, _):
    shard(out, "items").unlink()


def a_byte_of_a_shard_that_no_rule_reads(out, _):
    path = shard(out, "items")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def a_shard_changed_with_its_times_put_back(out, bad):
    path = shard(out)
    status = path.stat()
    shutil.copy(shard(bad), path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def texts_of_another_run(out, bad):
    changed = make_run(bad.parent / "texts", Shape(variants=(INT4,), windows=23, questions=4))
    shutil.copy(changed / "texts/windows.parquet", out / "texts/windows.parquet")


def texts_removed(out, _):
    (out / "texts/questions.parquet").unlink()


def two_variants_of_one_name(out, _):
    content = record(out)
    content["variants"].append(content["variants"][0])
    reseal(out, content)


def a_command_that_did_not_finish(out, _):
    (out / UNFINISHED).mkdir()
    (out / UNFINISHED / "00000000-1-1.json").write_text('{"command": "qeval compare", "started": "2026"}')


def a_torn_mark_of_a_command_that_did_not_finish(out, _):
    (out / UNFINISHED).mkdir()
    (out / UNFINISHED / "00000000-1-1.json").write_text("")


WAYS = [
    a_smaller_size, a_larger_baseline, a_failed_variant_that_is_done, a_variant_called_the_noise_floor,
    a_key_said_twice, a_record_called_older, a_record_of_two_versions, a_record_without_its_chain, other_settings,
    the_record_of_another_run, the_rows_of_another_run, a_link_to_the_rows_of_another_run,
    a_link_to_the_record_of_another_run, an_index_that_lacks_a_shard, an_index_that_names_a_shard_twice,
    an_index_that_leaves_the_folder, an_index_of_another_kind, a_shard_swapped_for_another_runs,
    a_shard_of_another_run_under_its_own_digest, another_shard_of_the_same_job, a_shard_cut_short, a_shard_removed,
    a_byte_of_a_shard_that_no_rule_reads, a_shard_changed_with_its_times_put_back, texts_of_another_run, texts_removed,
    two_variants_of_one_name, a_command_that_did_not_finish, a_torn_mark_of_a_command_that_did_not_finish,
]  # fmt: skip


def test_the_sound_run_passes_and_the_bad_one_fails(sound, bad, gated):
    assert gated(sound)[0] == 0
    assert gated(bad)[0] == 1


def test_a_run_that_was_moved_linked_or_had_its_clock_set_still_passes(out, gated, tmp_path):
    for path in [*out.rglob("*"), out]:
        os.utime(path, (1, 1))
    assert gated(out)[0] == 0
    moved = out.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    assert gated(tmp_path / "link")[0] == 0


@pytest.mark.parametrize("change", WAYS, ids=lambda way: way.__name__)
def test_nothing_that_the_record_does_not_vouch_for_passes(out, bad, gated, change):
    change(out, bad)
    code, said = gated(out)
    assert code == 3, said
    assert "Traceback" not in said
    assert said.startswith("error: ")


@pytest.mark.parametrize("change", WAYS, ids=lambda way: way.__name__)
def test_nor_do_card_report_and_diff_show_it(out, bad, sound, change, capfd):
    change(out, bad)
    older = change is a_record_called_older
    for words in (["card", out], ["diff", sound, out], ["explain", out, INT8.name]):
        code = program([str(word) for word in words])
        heard = capfd.readouterr()
        if older:  # it can be read, and every page says that nothing vouches for it
            shown = Path(out / "card/README.md").read_text() if words[0] == "card" else heard.out
            assert code == 0
            assert "Nothing vouches for the run" in " ".join(shown.split())
        else:
            assert code == 3, (words, heard.out)


def test_no_file_of_an_earlier_verdict_stays_beside_a_broken_run(out, gated, tmp_path):
    junit, markdown = tmp_path / "gate.xml", tmp_path / "gate.md"
    asked = ("--junit", junit, "--markdown", markdown)
    assert gated(out, *asked)[0] == 0
    assert "<error" not in junit.read_text()
    assert "pass" in markdown.read_text()
    a_smaller_size(out, None)
    assert gated(out, *asked)[0] == 3
    assert "<error" in junit.read_text()
    assert "pass" not in markdown.read_text()
    assert "broken" in markdown.read_text()


def test_an_older_run_says_what_to_do(out, gated):
    a_record_called_older(out, None)
    code, said = gated(out)
    assert code == 3
    assert "run the same compare again into it: what is scored already is not scored again" in said
    assert any("Nothing vouches for the run" in warning for warning in build_report(out).warnings)


def test_a_shard_that_the_run_no_longer_names_does_no_harm(out, bad, gated):
    shutil.copy(shard(bad), out / "rows/tokens" / shard(bad).name)
    assert gated(out)[0] == 0


def test_the_record_names_every_file_by_its_sha256(out):
    chain = record(out)["chain"]
    assert chain["index"] == digest_file(out / "rows/index.json")
    names = {f"{kind}/{name}" for kind, names in index(out).items() for name in names}
    assert {name: digest_file(out / "rows" / name) for name in names} == chain["shards"]
    assert set(chain["texts"]) == {"windows.parquet", "questions.parquet"}
    assert RowStore(out).read("tokens").num_rows == 2 * 24 * 64


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rules: [{metric: kl_nats, at_least: 0.05 nats}]", "is limited by at_most"),
        ("rules: [{metric: top1_agreement, at_most: 90 %}]", "is limited by at_least"),
        ("rules: [{metric: kl_nats, at_most: .inf nats}]", "must be a number"),
        ("rules: [{metric: kl_nats, at_most: nan nats}]", "must be a number"),
        ("rules: [{metric: kl_nats, at_most: 1 nats, at_most: 9 nats}]", "given twice"),
        ("rules: []", "rules"),
        ("confidence: 0.1\nrules: [{metric: kl_nats, at_most: 1 nats}]", "confidence"),
        ("require: [every, any]\nrules: [{metric: kl_nats, at_most: 1 nats}]", "both every and any"),
        ("require: quantised\nrules: [{metric: kl_nats, at_most: 1 nats}]", "require"),
    ],
)
def test_a_policy_that_limits_nothing_is_wrong_use(sound, tmp_path, capfd, text, said):
    path = tmp_path / "p.yaml"
    path.write_text(f"name: p\n{text}\n")
    code, _, err = told(capfd, sound, "--policy", path)
    assert code == 2
    assert said in err


def test_rules_that_are_about_nothing_gated_do_not_pass(sound):
    verdict = judge(sound, policy({"metric": "kl_nats", "at_most": "1 nats", "variants": ["rtn-*"]}))
    assert verdict.outcome == "broken"


def test_the_shipped_release_policy_requires_quantized():
    assert "require: quantized" in Path(RELEASE).read_text()
