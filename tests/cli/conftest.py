import pytest
import torch

from slimmable.__main__ import main
from slimmable.cli.data import load_images
from slimmable.cli.run import read_config, trained_method

OPTIONS = (
    *("--num-images", "64", "--batch-size", "16", "--epochs", "2", "--widths", "1", "0.5"),
    *("--method", "mocov2", "--device", "cpu", "--workers", "0"),
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny():
    """Options of a run that takes seconds."""
    return OPTIONS


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a tiny run that went through without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["pretrain", *OPTIONS, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def images(gated_run):
    """The images of the run that a module makes as `gated_run`."""
    return load_images(read_config(gated_run))


@pytest.fixture
def backbone(gated_run):
    """The trained backbone of `gated_run`, for each test anew."""
    return trained_method(read_config(gated_run), gated_run, channels=1).backbone
