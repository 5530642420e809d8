"""Runs with gates at several widths: each width dense, and gated to the same share of its own multiply-adds."""

import pytest
import torch

import slimmable
from slimmable.__main__ import main
from slimmable.cli.export import run_source
from slimmable.errors import WidthError
from slimmable.evaluation import knn_accuracy
from slimmable.gating import gated
from tests.cli.test_gated import ON_CPU, read
from tests.cli.test_pretrain import assert_same_results, interrupt_after

WIDTHS, BUDGET = (1.0, 0.5), 0.35
GATED = ("--widths", "1", "0.5", "--method", "simclr", "--gate-budget", str(BUDGET), "--knn-every", "2")
NAMES = {"dense": 1.0, "gated 0.35": 1.0, "dense/w0.5": 0.5, "gated 0.35/w0.5": 0.5}


@pytest.fixture(scope="module")
def gated_run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "gated"
    assert main(["pretrain", *tiny, *GATED, "--output", str(folder)]) == 0
    return folder


@torch.no_grad()
def in_pass(backbone, images, width, is_gated):
    with slimmable.at_width(backbone, width):
        if not is_gated:
            return backbone(images.float() / 255), None
        with gated(backbone) as run:
            found = backbone(images.float() / 255)
        return found, run.share()


def test_rows_are_those_of_each_width_dense_and_gated(gated_run, images, backbone):
    rows = read(gated_run / "metrics.csv")
    assert {row["network"]: float(row["width"]) for row in rows[:4]} == NAMES
    assert all(row["network"].startswith("static ") for row in rows[4:])
    plain = {row.width: row for row in slimmable.profile(backbone, (1, 24, 24), repeats=0).rows}
    for row in rows[:4]:
        width, is_gated = float(row["width"]), row["network"].startswith("gated")
        known, train_share = in_pass(backbone, images.train, width, is_gated)
        asked, test_share = in_pass(backbone, images.test, width, is_gated)
        expected = knn_accuracy(known, images.train_labels, asked, images.test_labels)
        assert float(row["knn"]) == pytest.approx(expected, abs=1e-4)
        if is_gated:
            assert float(train_share.mean()) == pytest.approx(BUDGET, abs=0.01)  # the images that set the gates
            assert int(row["macs"]) == pytest.approx(float(test_share.mean()) * plain[width].macs, abs=1)
        else:
            assert int(row["macs"]) == plain[width].macs
            assert int(row["parameters"]) == plain[width].parameters
        assert 0 <= float(row["knn"]) <= 1


def test_logs_have_a_column_for_each_width(gated_run):
    last = read(gated_run / "losses.csv")[-1]
    losses, shares = ["train_loss/w1", "train_loss/w0.5"], ["gated_share", "gated_share/w0.5"]
    assert list(last) == ["step", "learning_rate", *losses, *shares]
    assert all(0 < float(last[name]) < 1 for name in shares)
    assert last["gated_share"] != last["gated_share/w0.5"]
    (row,) = read(gated_run / "knn.csv")
    kinds = ("knn/dense", "knn/gated", "gated_share")
    assert list(row) == ["step", *kinds, *(f"{kind}/w0.5" for kind in kinds)]
    assert all(0 <= float(share) <= 1 for share in list(row.values())[1:])


def test_what_gates_of_each_width_are_set_to_is_told(gated_run, images, backbone, capsys):
    before = (gated_run / "metrics.csv").read_text()
    assert main(["pretrain", "--output", str(gated_run), "--resume", *ON_CPU]) == 0
    said = capsys.readouterr().out
    for width, name in ((1.0, "the gates"), (0.5, "the gates/w0.5")):
        _, share = in_pass(backbone, images.train, width, True)
        assert f"{name} are set to {float(share.mean()):.3f} of the multiply-adds; the budget is 0.35\n" in said
    assert "dense and gated to 0.35 of the multiply-adds, at widths 1, 0.5 on 64 images" in said
    assert (gated_run / "metrics.csv").read_text() == before


def test_an_interrupted_run_goes_on_to_the_same_numbers(tiny, gated_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(6, patch)
        assert main(["pretrain", *tiny, *GATED, "--output", str(folder)]) == 130
    assert main(["pretrain", "--output", str(folder), "--resume", *ON_CPU]) == 0
    assert_same_results(folder, gated_run)


def test_evaluation_and_export_know_both_widths(gated_run, tmp_path):
    rows = read(gated_run / "metrics.csv")
    assert main(["evaluate", str(gated_run), "--probes", "knn", *ON_CPU]) == 0
    again = read(gated_run / "metrics.csv")
    assert [row["network"] for row in again] == [row["network"] for row in rows]
    assert [row["knn"] for row in again] == [row["knn"] for row in rows]
    assert set(run_source(gated_run).accuracy) == set(WIDTHS)
    output = tmp_path / "exported"
    assert main(["export", str(gated_run), "--width", "0.5", "--format", "pt2", "--output", str(output)]) == 0
    assert (output / "width-0.5.pt2").exists()
    loaded = slimmable.load(gated_run / "model.safetensors")
    assert slimmable.widths_of(loaded) == WIDTHS
    narrow = slimmable.load(gated_run / "width-0.5.safetensors")
    x = torch.rand(2, 1, 24, 24)
    with slimmable.at_width(loaded.eval(), 0.5), torch.no_grad():
        torch.testing.assert_close(narrow.eval()(x), loaded(x))


def test_a_budget_that_a_narrow_width_cannot_meet_is_refused_at_once(tiny, tmp_path, capsys):
    """Closed gates leave more of a narrow network's multiply-adds, where the first layer weighs more."""
    options = ("--widths", "1", "0.1", "--method", "simclr", "--gate-budget", "0.1")
    output = tmp_path / "run"
    assert main(["pretrain", *tiny, *options, "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert "--gate-budget 0.1: small_resnet/w0.1 with all gates closed costs 0.181" in said
    assert not output.exists()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_least_share_is_what_closed_gates_cost_at_that_width(backbone, images, width):
    found = slimmable.gating.gate_plan(backbone, example_inputs=torch.zeros(2, 1, 24, 24))
    for module in backbone.modules():
        if isinstance(module, slimmable.gating.ChannelGate):
            module.threshold.fill_(torch.inf)
    _, share = in_pass(backbone, images.test[:4], width, True)
    assert found.least_share(width) == pytest.approx(float(share.mean()), rel=1e-9)
    with pytest.raises(WidthError, match=r"0\.3 is not one of"):
        found.least_share(0.3)
