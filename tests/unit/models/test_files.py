"""What of a repository is meant, by the names of its files alone."""

import pytest

from qeval.errors import UsageError
from qeval.models.hub.files import find_part, repository_parts

GGUFS = [
    "README.md",
    "m-Q2_K.gguf",
    "m-IQ4_XS.gguf",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m.Q8_0.gguf",
    "mmproj-F16.gguf",
]
ONNX = [f"cpu/{kind}/{name}" for kind in ("int4-block-32", "int8") for name in
        ("genai_config.json", "m.onnx", "m.onnx.data", "tokenizer.json")]  # fmt: skip
AWQ = ["awq/config.json", "awq/model.safetensors", "awq/tokenizer.json"]
FLOAT = ["config.json", "model.safetensors", "original/model.safetensors"]
SPLIT = [f"BF16/m-BF16-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
SAME = ["a/m-Q4_0.gguf", "b/m-Q4_0.gguf", "c/UD-Q4_0.gguf"]
GRAPHS = ["onnx/model.onnx", "onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "onnx/model_q4f16.onnx"]
AROUND = ["config.json", "tokenizer.json"]


def found(names, what, onnx=True):
    part = find_part("org/repo", names, what, onnx=onnx)
    return part.form, part.path


@pytest.mark.parametrize(
    ("names", "what", "form", "path"),
    [
        (GGUFS, "Q4_K_M", "gguf", "m-Q4_K_M.gguf"),
        (GGUFS, "q8_0", "gguf", "m.Q8_0.gguf"),
        (GGUFS, "m-Q2_K.gguf", "gguf", "m-Q2_K.gguf"),
        ([*SPLIT, "x/m-0.5B-q4_0-00001-of-00001.gguf"], "q4_0", "gguf", "x/m-0.5B-q4_0-00001-of-00001.gguf"),
        (SAME, "b/m-Q4_0.gguf", "gguf", "b/m-Q4_0.gguf"),
        (SAME, "ud-q4_0", "gguf", "c/UD-Q4_0.gguf"),
        (SAME, "a", "gguf", "a/m-Q4_0.gguf"),
        (ONNX, "cpu/int8", "onnx", "cpu/int8"),
        (FLOAT + AWQ + GGUFS, "awq", "checkpoint", "awq"),
        (FLOAT + AWQ + GGUFS, None, "checkpoint", ""),
        (["m-Q4_0.gguf", "m-imatrix.gguf", "m-mmproj-f16.gguf"], None, "gguf", "m-Q4_0.gguf"),
        (ONNX[:4], None, "onnx", "cpu/int4-block-32"),
        (GRAPHS + AROUND, "Q4", "onnx", "onnx/model_q4.onnx"),
        (GRAPHS + AROUND, "onnx/model.onnx", "onnx", "onnx/model.onnx"),
        (["m.onnx", "m_fp16.onnx", *AROUND], "fp16", "onnx", "m_fp16.onnx"),
        (["m.onnx", *AROUND], "m.onnx", "onnx", ""),
        (ONNX, "cpu/int8/m.onnx", "onnx", "cpu/int8"),
        ([name.rpartition("/")[2] for name in ONNX[:4]], None, "onnx", ""),
    ],
)
def test_one_part_is_meant(names, what, form, path):
    assert found(names, what) == (form, path)


@pytest.mark.parametrize(
    ("names", "what", "says"),
    [
        (GGUFS, None, r"'org/repo' holds 5 GGUF files; say which after a colon, as 'org/repo:IQ4_XS': IQ4_XS, .* 1"),
        (ONNX, None, r"holds 2 ONNX models; .* as 'org/repo:cpu/int4-block-32': cpu/int4-block-32, cpu/int8\."),
        (GGUFS + ONNX, None, r"holds 5 GGUF files and 2 ONNX models; say which"),
        (["m-Q4_0.gguf", "pytorch_model.bin"], None, r"holds 1 GGUF file; say which"),
        (GGUFS, "Q4_K_L", r"has no 'Q4_K_L' that qeval could take \(nearest: Q4_K_(S, Q4_K_M|M, Q4_K_S)\b.*it holds 5"),
        (GGUFS, "n.Q8_0.gguf", r"no 'n.Q8_0.gguf' that .* \(nearest: Q8_0"),
        (ONNX, "int4-blok-32", r"\(nearest: cpu/int4-block-32\); it holds 2 ONNX models: cpu/int4-"),
        (FLOAT, "Q4_0", r"has no 'Q4_0' that qeval could take; it holds 1 checkpoint\."),
        (["README.md"], "Q4_0", r"has no 'Q4_0' that qeval could take; it holds nothing of use\."),
        (["README.md"], None, r"'org/repo' has no weights: neither model\.safetensors"),
        (GGUFS, "K_S.gguf", r"has no 'K_S.gguf'"),
        (SAME, "Q4_0", r"'Q4_0' may be any of 3 GGUF files of 'org/repo'; give one: a/m-Q4_0.gguf, b/m-Q4_0.gguf, "),
        (ONNX, "cpu", r"'cpu' may be any of 2 ONNX models of 'org/repo'; give one: cpu/int4-block-32, cpu/int8\."),
        (SPLIT, "bf16", r"is one of the 3 files .* `llama-gguf-split --merge m-BF16-00001-of-00003\.gguf whole\.gguf`"),
        (SPLIT, SPLIT[1], r"'BF16/m-BF16-00001-of-00003\.gguf' of 'org/repo' is one of the 3 files"),
        (GRAPHS + AROUND, "onnx", r"may be any of 3 ONNX models of 'org/repo'; give one: onnx/model.onnx, "),
        (GRAPHS + AROUND, "q5", r"has no 'q5' .*it holds 3 ONNX models: onnx/model.onnx, onnx/model_q4.onnx, "),
        (GRAPHS, "onnx/model.onnx", r"'onnx/model.onnx' of 'org/repo' lies without genai_config.json or config.json"),
        (ONNX[1:3], None, r"'cpu/int4-block-32/m.onnx' of 'org/repo' lies without"),
    ],
)  # fmt: skip
def test_what_is_not_there_or_not_one_is_refused_with_the_choices(names, what, says):
    with pytest.raises(UsageError, match=says):
        found(names, what)


def test_an_onnx_folder_is_no_baseline():
    with pytest.raises(UsageError, match="'cpu/int8' of 'org/repo' is an ONNX model, which may be a --variant"):
        found(ONNX, "cpu/int8", onnx=False)


def test_a_part_is_fetched_without_its_neighbours():
    """Names with brackets are no patterns."""
    (part,) = repository_parts(["a[1]/m-Q4_0.gguf"])
    assert part.files == ("a[[]1]/m-Q4_0.gguf",)
    root, awq = repository_parts([*AWQ, *FLOAT])
    assert (root.path, awq.path) == ("", "awq")
    assert "awq/config.json" in awq.files and all(name.startswith("awq/") for name in awq.files)


def test_a_graph_takes_its_own_data_and_what_lies_beside_or_in_the_root():
    names = [*GRAPHS, *AROUND, "onnx/model_q4.onnx_data_1", "README.md"]
    assert find_part("org/repo", names, "q4", onnx=True).among(names) == [
        "onnx/model_q4.onnx", "onnx/model_q4.onnx_data", *AROUND, "onnx/model_q4.onnx_data_1"
    ]  # fmt: skip
    beside = [*GRAPHS, *AROUND, *(f"onnx/{name}" for name in AROUND)]
    needed = find_part("org/repo", beside, "onnx/model.onnx", onnx=True).among(beside)
    assert needed == ["onnx/model.onnx", *(f"onnx/{name}" for name in AROUND)]
