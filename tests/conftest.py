"""Options of the test suite."""

import os

import pytest

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # the CUDA tests run without it, where nothing can be installed
    settings = None

# One thread a process: several test processes share the cores, and results do not depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test needs the Hub, and where there is no network, each request of one would try for half a minute.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A busy machine must not fail a test, and in CI a change fails by itself only, not by an example that chance finds.
if settings is not None:
    settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
    )
    settings.load_profile("untimed")


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests marked as slow")


def pytest_collection_modifyitems(config, items):
    import torch  # after the number of threads is set

    skipped = {}
    if not config.getoption("--runslow"):
        skipped["slow"] = "slow; run with --runslow"
    if not torch.cuda.is_available():
        skipped["cuda"] = "needs a CUDA device"
    for item in items:
        for mark, reason in skipped.items():
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
