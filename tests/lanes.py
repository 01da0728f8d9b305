"""Which cases of a test every run has, and which only `pytest -m slow`."""

import pytest


def slow(*values: object, **options: object):
    return pytest.param(*values, marks=pytest.mark.slow, **options)
