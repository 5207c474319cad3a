"""What is known of a loaded model, in plain values."""

from types import SimpleNamespace

import pytest

from qeval.models.info import LoadedModel

INFO = SimpleNamespace(name="tiny")


def config_hash(text):
    return LoadedModel(None, None, INFO, None, config=text).config_sha256


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_json_lacks_is_hashed_by_its_text(number):
    assert config_hash(f'{{"eps": {number}}}') != config_hash('{"eps": 1e-6}')


def test_who_wrote_a_configuration_changes_no_hash():
    assert config_hash('{"eps": 1, "transformers_version": "5.24.0"}') == config_hash(
        '{"_name_or_path": "x", "eps": 1}'
    )


def test_a_setting_changes_the_hash():
    assert config_hash('{"eps": 1}') != config_hash('{"eps": 2}')
