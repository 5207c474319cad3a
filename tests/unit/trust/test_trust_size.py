"""Defended: a small file can't take memory or time without end; a limit says so in a sentence, before the work."""

import json
import resource
import struct
import time

import pytest

from qeval import parsing
from qeval.errors import UsageError
from qeval.gate.policy import load_policy
from qeval.models.checkpoint.weights import read_entries
from qeval.models.gguf.convert import convert_gguf, read_contents
from qeval.models.trust import read_settings
from qeval.models.vocabulary import read_tokenizer
from qeval.parsing import load_json, load_yaml, one_sentence, parse_yaml
from qeval.recipe_files import load_recipes
from tests.fixtures.ggufs import write_gguf
from tests.fixtures.tiny import save_tiny, tiny_llama

SECONDS, BYTES = 10, 500 * 2**20
STRING, ARRAY = 8, 9


@pytest.fixture(autouse=True)
def bounded():
    """Fail a test that takes long or much."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - begin < SECONDS  # the machine may be busy
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def word(text):
    return struct.pack("<Q", len(text)) + text


def header(*pairs, tensors=b"", count=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, count, len(pairs)) + b"".join(pairs) + tensors


def tensor(name=b"t", shape=(8, 8), kind=0, offset=0):
    return word(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def number(key, value, kind=4):
    return word(key) + struct.pack("<I", kind) + struct.pack("<I" if kind == 4 else "<Q", value)


GGUFS = {
    "an array longer than the file": (
        header(word(b"a") + struct.pack("<IIQ", ARRAY, 0, 2**40) + b"x" * 100),
        "lists of",
    ),
    "an array within the limit, and not there": (
        header(word(b"a") + struct.pack("<IIQ", ARRAY, 6, 10**6)),
        "more than the file",
    ),
    "an array of strings": (
        header(word(b"a") + struct.pack("<IIQ", ARRAY, STRING, 10**6) + word(b"x")),
        "more than the file",
    ),
    "a string longer than the file": (header(word(b"a") + struct.pack("<IQ", STRING, 2**63)), "more than the file"),
    "arrays in arrays": (header(word(b"a") + struct.pack("<IIQ", ARRAY, ARRAY, 5)), "lists of lists"),
    "keys without end": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "keys"),
    "tensors without end": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "tensors"),
    "a key that stands twice": (header(number(b"a", 1), number(b"a", 2)), "twice"),
    "a tensor that stands twice": (header(tensors=tensor() * 2 + b"\0" * 999, count=2), "twice"),
    "a tensor beyond the end": (header(tensors=tensor(offset=2**40) + b"\0" * 999, count=1), "outside the file"),
    "a tensor of more elements than there are": (
        header(tensors=tensor(shape=(2**32, 2**32)) + b"\0" * 999, count=1),
        "outside",
    ),
    "no dimensions": (header(tensors=tensor(shape=()) + b"\0" * 999, count=1), "0 dimensions"),
    "a thousand dimensions": (header(tensors=tensor(shape=(1,) * 1000) + b"\0" * 999, count=1), "1000 dimensions"),
    "an unknown type": (header(tensors=tensor(kind=99) + b"\0" * 999, count=1), "type 99"),
    "an alignment of nothing": (
        header(number(b"general.alignment", 0), tensors=tensor() + b"\0" * 999, count=1),
        "alignment",
    ),
    "a value of no type": (header(word(b"a") + struct.pack("<I", 77)), "type 77"),
    "a name longer than any": (header(struct.pack("<Q", 2**20) + b"x" * 2**20), "a name of"),
    "a version of the future": (header(version=9), "version 9"),
    "layers without end": (
        header(number(b"llama.block_count", 2**31), tensors=tensor() + b"\0" * 999, count=1),
        "block_count",
    ),
    "nothing": (b"", "cut short"),
    "the magic alone": (b"GGUF", "cut short"),
}


@pytest.mark.parametrize("name", GGUFS)
def test_a_gguf_that_declares_what_it_lacks_is_refused(tmp_path, name):
    data, why = GGUFS[name]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UsageError, match=rf"x\.gguf' is torn or not a GGUF file \(.*{why}"):
        read_contents(tmp_path / "x.gguf")


def test_a_sound_gguf_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(seed=5, intermediate_size=128, vocab_size=258))
    assert not read_contents(path).quantized
    assert (convert_gguf(path) / "config.json").is_file()


def bomb(levels=9, width=9):
    text = "&b0 [" + ",".join(["lol"] * width) + "]"
    for level in range(1, levels):
        text = f"&b{level} [{text}," + ",".join([f"*b{level - 1}"] * (width - 1)) + "]"
    return text


YAMLS = {
    "aliases of aliases": (f"a: {bomb()}", "once its aliases are spelled out"),
    "itself": ("a: &a [*a, *a]", "holds itself"),
    "brackets": ("[" * 100_000, "nested too deeply"),
    "brackets of a hundred and three": ("[" * 103 + "]" * 103, "nested too deeply"),
    "a number of 5,000 digits": (f"a: {'9' * 5000}", "not valid YAML"),
    "a date that is none": ("a: 2024-99-99", "not valid YAML"),
    "an object of Python's": ("a: !!python/object/apply:os.system [id]", "not valid YAML"),
    "a key twice": ("a: 1\nb: 2\na: 3", r"'a' is given twice \(line 3\)"),
    "a key twice, below": ("a: {b: 1, 'b': 2}", r"'b' is given twice"),
    "a control character": ("a: \x00", "not valid YAML"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_has_limits(name):
    text, why = YAMLS[name]
    with pytest.raises(UsageError, match=why) as caught:
        parse_yaml(text, "'x.yaml'")
    assert str(caught.value).startswith("'x.yaml' ")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["aliases of aliases", "itself", "brackets", "a key twice"])
def test_policies_and_recipes_have_them_too(tmp_path, name):
    (tmp_path / "x.yaml").write_text(YAMLS[name][0])
    for read in (load_policy, load_recipes):
        with pytest.raises(UsageError, match=r"x\.yaml"):
            read(tmp_path / "x.yaml")


def test_a_value_of_a_recipe_is_not_spelled_out(tmp_path):
    (tmp_path / "x.yaml").write_text(f"variants: [{{method: rtn, clip: {bomb(5)}}}]")
    with pytest.raises(UsageError, match="'clip' must be bool, not a list of"):
        load_recipes(tmp_path / "x.yaml")


def test_aliases_and_merges_within_measure_are_taken():
    text = "base: &b {x: 1, y: [1, 2]}\nmore: {<<: *b, x: 2}\nagain: *b"
    assert parse_yaml(text, "x") == {
        "base": {"x": 1, "y": [1, 2]},
        "more": {"x": 2, "y": [1, 2]},
        "again": {"x": 1, "y": [1, 2]},
    }


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 50_000, "nested too deeply"),
        (f'{{"a": {"9" * 5000}}}', "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "no JSON object"),
    ],
)
def test_a_configuration_has_limits(tmp_path, text, why):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=rf"config\.json' .*{why}"):
        read_settings(tmp_path)


def test_files_larger_than_any_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parsing, "LARGEST_YAML_BYTES", 100)
    (tmp_path / "x.yaml").write_text("a: " + "x" * 200)
    with pytest.raises(UsageError, match="more than 100 bytes"):
        load_yaml(tmp_path / "x.yaml")
    with pytest.raises(UsageError, match="more than 10 bytes"):
        load_json(tmp_path / "x.yaml", largest=10)


@pytest.mark.parametrize(
    "more",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"vocab_size": 2**40},
        {"hidden_size": -1},
        {"num_attention_heads": 0},
        {"intermediate_size": 10**30},
        {"rms_norm_eps": -1.0},
        {"rms_norm_eps": 1e400},
        {"layer_norm_epsilon": float("nan")},
    ],
)
def test_sizes_that_no_model_has_are_named(tmp_path, more):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | more))
    with pytest.raises(UsageError, match=f"config.json' has '?{next(iter(more))}"):
        read_settings(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**31, 10**8 + 1, 0])
def test_a_safetensors_header_longer_than_the_file_is_refused(tmp_path, length):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    with pytest.raises(UsageError, match="torn or not safetensors"):
        read_entries([tmp_path / "x.safetensors"])


@pytest.mark.parametrize("text", ["[" * 90, '{"a":' * 90])
def test_a_safetensors_header_that_is_deep_is_refused(tmp_path, text):
    data = (text * 1000).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)
    with pytest.raises(UsageError, match="torn or not safetensors"):
        read_entries([tmp_path / "x.safetensors"])


class PanicException(BaseException):
    """As pyo3's, which is no Exception."""


@pytest.mark.parametrize(
    "error",
    [
        PanicException("index out of bounds\nnote: run"),
        Exception("bare"),
        RecursionError(),
        MemoryError(),
        KeyError("x"),
        OSError(5, "I/O"),
    ],
)
def test_whatever_a_library_raises_is_a_sentence(error):
    with pytest.raises(UsageError) as caught, one_sentence("'f' can't be used"):
        raise error
    assert str(caught.value).startswith("'f' can't be used: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_stays_one(error):
    with pytest.raises(error), one_sentence("x"):
        raise error


def test_a_tokenizer_whose_library_panics_is_a_sentence(tmp_path, capfd):
    folder = save_tiny(tmp_path / "m")
    content = json.loads((folder / "tokenizer.json").read_text())
    for broken in (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}},
        {"added_tokens": [{"id": 2**40, "content": "x"}]},
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {"x": 1}}},
    ):
        (folder / "tokenizer.json").write_text(json.dumps(content | broken))
        with pytest.raises(UsageError, match="tokenizer in"):
            read_tokenizer(folder)
