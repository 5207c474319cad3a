"""Defended: whatever is wrong with a file, its reader takes it or says so in one sentence of qeval's own.

Every door is tried with mangled files, the same ones each time; `python benchmarks/fuzz_doors.py` tries as many as one
likes.
"""

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qeval.errors import QevalError
from tests.fixtures.doors import DOORS, copied, file_of, sound
from tests.fixtures.mangle import KINDS, mangled, other_value

SEEDS = st.integers(0, 2**32 - 1)
FAST, SLOW = 40, 12
READ = [name for name, door in DOORS.items() if not door.runs]
QUIET = {
    "derandomize": True, "deadline": None, "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}  # fmt: skip


def outcome(name, change):
    """What a door makes of its file when `change` was done to it: None, or the sentence."""
    folder = copied(sound(name))
    try:
        change(file_of(name, folder))
        DOORS[name].read(folder)
    except QevalError as error:
        return str(error)
    finally:
        shutil.rmtree(folder.parent)
    return None


def is_sentence(text):
    return text is None or (text.strip() and "\n" not in text and "Traceback" not in text)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READ)
def test_mangled_bytes_are_taken_or_refused_in_a_sentence(name):
    @settings(max_examples=SLOW if DOORS[name].slow else FAST, **QUIET)
    @given(st.sampled_from(list(KINDS)), SEEDS)
    def tried(how, seed):
        assert is_sentence(outcome(name, lambda file: file.write_bytes(mangled(file.read_bytes(), how, seed))))

    tried()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in READ if DOORS[name].text])
def test_other_values_are_taken_or_refused_in_a_sentence(name):
    @settings(max_examples=SLOW if DOORS[name].slow else FAST, **QUIET)
    @given(SEEDS)
    def tried(seed):
        assert is_sentence(outcome(name, lambda file: file.write_text(other_value(file.read_text(), seed))))

    tried()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in READ if not DOORS[name].slow])
def test_a_file_cut_to_nothing_is_refused(name):
    said = outcome(name, lambda file: file.write_bytes(b""))
    assert said
    assert is_sentence(said)
