"""`--compute bf16` on the CPU: only where the processor has it, and with its noise floor beside the variants."""

import pytest

from qeval.backends import memory
from qeval.store.rows import concat
from tests.fixtures.bench import Bench


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


def test_bf16_is_refused_on_a_processor_without_it(place, monkeypatch, capfd):
    monkeypatch.setattr(memory, "has_bf16", lambda: False)
    assert place.compare("--quiet", methods="rtn:g32", compute="bf16") == 2
    assert "this processor has no bf16 instructions" in capfd.readouterr().err
    assert not place.out.exists()


@pytest.mark.parametrize("stream", [False, True])
def test_bf16_is_shown_with_its_noise_floor(place, tmp_path, monkeypatch, stream):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(memory, "has_bf16", lambda: True)
    out = tmp_path / "out"
    more = ["--stream", "--max-memory", "4MiB"] if stream else []
    assert place.compare("--quiet", *more, methods="rtn:g32", tasks="kl", compute="bf16", out=str(out)) == 0
    floor, variant = place.report(out)["variants"]
    assert (floor["name"], floor["role"], floor["backend"]) == ("baseline@fp32", "floor", "torch")
    found = floor["metrics"]["kl_nats"]["value"]
    assert 0 < found < variant["metrics"]["kl_nats"]["value"]
    paths = sorted((out / "rows" / "tokens").glob("*.parquet"))
    exact = [row["nll"] for row in concat("tokens", paths).to_pylist() if row["variant"] == "baseline@fp32"]
    other = tmp_path / "fp32"
    assert place.compare("--quiet", methods="rtn:g32", tasks="kl", out=str(other)) == 0
    paths = sorted((other / "rows" / "tokens").glob("*.parquet"))
    expected = [row["nll"] for row in concat("tokens", paths).to_pylist() if row["variant"] == "baseline"]
    # Its weights carry what a variant's lose when they are rounded to bf16; otherwise it is the baseline in fp32.
    apart = [abs(value - other) for value, other in zip(exact, expected, strict=True) if other is not None]
    assert 1e-4 < max(apart) < 0.2
