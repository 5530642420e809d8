"""Options of the test suite."""

import os

import pytest
from hypothesis import HealthCheck, settings

# One thread a process: several test processes share the cores, and results do not depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine must not fail a test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests marked as slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--runslow"):
        skip = pytest.mark.skip(reason="slow; run with --runslow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
