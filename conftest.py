"""What the examples in docstrings take as imported."""

from importlib import import_module

import pytest


@pytest.fixture(scope="session", autouse=True)
def names_of_examples(doctest_namespace):
    """Let examples use these names; they are imported late, once tests/conftest.py has set the environment."""
    names = {"torch": "torch", "nn": "torch.nn", "slimmable": "slimmable"}
    doctest_namespace |= {name: import_module(module) for name, module in names.items()}
