"""What the examples in docstrings take as imported."""

import pytest
import torch

import slimmable


@pytest.fixture(autouse=True)
def names_of_examples(doctest_namespace):
    """Let examples use these names."""
    doctest_namespace |= {"torch": torch, "nn": torch.nn, "slimmable": slimmable}
