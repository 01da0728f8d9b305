"""Every parser of untrusted input, given mutations of valid input, returns a result or raises a ZImageError."""

import itertools
import random
import warnings

import fuzz
import pytest

pytestmark = pytest.mark.slow  # many processes, or many inputs

# Mutations per parser: together under 10 s. tests/fuzz.py, which .ci/long runs, makes millions.
INPUTS = 60


@pytest.mark.parametrize("name", fuzz.PARSERS)
def test_a_parser_survives_mutated_input(tmp_path, on_cpu, name, record_property):
    record_property("attacks", INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *_, total = fuzz.fuzz(name, seconds=60, seed=7, folder=tmp_path, most_inputs=INPUTS)
    assert (total["executions"], total["findings"]) == (INPUTS, [])


@pytest.mark.parametrize("name", fuzz.PARSERS)
def test_valid_input_is_among_what_a_parser_is_given(tmp_path, on_cpu, name):
    parser = fuzz.PARSERS[name]
    taken = 0
    for content in parser.seeds(tmp_path):
        (tmp_path / parser.name).write_bytes(content)
        try:
            parser.read(tmp_path / parser.name)
            taken += 1
        except fuzz.ZImageError:
            pass
    assert taken or name in ("single", "gguf-file")  # a part of a model, for which the rest is missing


@pytest.mark.parametrize("name", ["to-openai", "to-a1111", "to-a1111-image", "forms"])
def test_valid_input_becomes_a_job_of_the_server(tmp_path, name):
    parser = fuzz.PARSERS[name]
    for content in parser.seeds(tmp_path):
        (tmp_path / parser.name).write_bytes(content)
        assert parser.read(tmp_path / parser.name) == 503


def test_mutations_depend_on_the_seed_only():
    content = b'{"a": [1, {"b": null}], "c": "d"}'
    for mutate in (fuzz.mutate_bytes, fuzz.mutate_text, fuzz.mutate_lines):
        first, second = (
            [mutate(content, rng) for _ in range(50)] for rng in map(random.Random, itertools.repeat(3, 2))
        )
        assert first == second and len(set(first)) > 30
