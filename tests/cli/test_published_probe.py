"""`evaluate --probes published`: crops drawn anew in each epoch, an evaluation that goes on, and options of kNN."""

import csv
import shutil

import pytest
import torch

from slimmable.__main__ import main
from slimmable.cli import evaluation
from slimmable.cli.config import LINEAR
from slimmable.cli.data import load_images
from slimmable.cli.run import read_config, trained_method
from slimmable.evaluation import evaluate_widths, label_fraction, linear_evaluation

ON_CPU = ("--device", "cpu", "--workers", "0")
PUBLISHED = ("--probes", "knn", "published", "--probe-epochs", "3", "--probe-batch-size", "24", "--probe-lr", "5")


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_it_is_linear_evaluation_on_crops_of_each_epoch(copy, capsys, monkeypatch):
    seen = []

    def watched(backbone, train, test, **given):
        (sizes,) = {tuple(x.shape[1:]) for x, _ in test(0)}
        for number in range(2):
            epoch = [(x, labels) for x, labels in train(number)]
            seen.append(epoch)
        assert [len(labels) for _, labels in seen[0]] == [24, 24, 16]
        assert sizes == tuple(seen[0][0][0].shape[1:]) == (1, 24, 24)
        batches = [(torch.cat([x for x, _ in seen[0]]), torch.cat([y for _, y in seen[0]]))]
        return linear_evaluation(backbone, batches, test, **{**given, "path": None})

    monkeypatch.setattr(evaluation, "linear_evaluation", watched)
    assert main(["evaluate", str(copy), *PUBLISHED, *ON_CPU]) == 0
    first, second = ([labels for _, labels in epoch] for epoch in seen)
    assert torch.cat(first).bincount().equal(torch.cat(second).bincount())
    assert not torch.cat(first).equal(torch.cat(second))  # another order
    pixels = [torch.cat([x for x, _ in epoch]) for epoch in seen]
    images = load_images(read_config(copy))
    means = [part.flatten(1).mean(1).sort().values for part in (*pixels, images.train.float() / 255)]
    assert all(not one.allclose(other, atol=1e-3) for one, other in ((means[0], means[1]), (means[0], means[2])))


def test_the_report_has_both_accuracies_and_an_interrupted_evaluation_goes_on(copy, capsys, monkeypatch):
    line = ["evaluate", str(copy), *PUBLISHED, *ON_CPU]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "epoch 3/3" in said
    assert "| kNN | linear on crops | linear on crops, top 5 |" in said
    expected = rows_of(copy)
    assert list(expected[0])[3:] == ["knn", "published", "published_top5"]
    found = [(float(row["published"]), float(row["published_top5"])) for row in expected]
    assert all(0 <= best <= five <= 1 and five > 0 for best, five in found)  # of 16 images, all may be wrong
    assert any(best > 0 for best, _ in found)
    assert not list(copy.glob("published*"))

    def stopped(text):
        if "epoch 3/3" in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "say", stopped)
        for _ in range(2):
            assert main(line) == 130
    (copy / "metrics.csv").write_text("")
    capsys.readouterr()
    changed = [*line[:-4], *("--probe-lr", "6"), *ON_CPU]
    assert main(changed) == 2
    assert "published.safetensors was not written by linear_evaluation of" in capsys.readouterr().err
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "epoch 3/3" in said
    assert "epoch 2/3" not in said
    assert rows_of(copy) == expected

    (copy / "published.safetensors").write_bytes(b"no state")
    assert main(line) == 2
    assert "published.safetensors cannot be read" in capsys.readouterr().err
    (copy / "published.safetensors").unlink()
    assert main(["evaluate", str(copy), "--probes", "published", "--probe-epochs", "1", *ON_CPU]) == 0
    assert list(rows_of(copy)[0])[3:] == ["published", "published_top5"]


def test_a_part_of_the_labels_has_an_evaluation_of_its_own(copy, capsys, monkeypatch):
    seen = []

    def watched(backbone, train, test, **given):
        seen.append([torch.cat([labels for _, labels in train(epoch)]) for epoch in range(2)])
        return linear_evaluation(backbone, train, test, **given)

    monkeypatch.setattr(evaluation, "linear_evaluation", watched)
    line = ["evaluate", str(copy), "--probes", "knn", "published", "--probe-epochs", "1", "--probe-batch-size", "8"]
    assert main([*line, "--label-fraction", "0.25", *ON_CPU]) == 0
    labels = load_images(read_config(copy)).train_labels
    kept = labels[label_fraction(labels, 0.25)]
    assert [len(epoch) for epochs in seen for epoch in epochs] == [64, 64, len(kept), len(kept)]
    assert all(epoch.bincount().equal(kept.bincount()) for epoch in seen[1])
    (row, _) = rows_of(copy)
    assert {"published", "published_top5", "published@0.25", "published_top5@0.25", "knn@0.25"} <= set(row)
    assert "linear on crops, top 5, 25 % of labels" in capsys.readouterr().out
    assert not list(copy.glob("published*"))


def test_options_of_neighbours_are_those_of_the_library(copy):
    config = read_config(copy)
    images = load_images(config)
    backbone = trained_method(config, copy, 1).backbone
    for options, given in (
        (("--k", "3"), {"k": 3}),
        (("--knn-metric", "euclidean"), {"metric": "euclidean"}),
        (("--knn-temperature", "0.01"), {"temperature": 0.01}),
        (("--k", "9", "--knn-temperature", "1e6", "--knn-metric", "cosine"), {"k": 9, "temperature": 1e6}),
    ):
        assert main(["evaluate", str(copy), "--probes", "knn", *options, *ON_CPU]) == 0
        sets = images.train, images.train_labels, images.test, images.test_labels
        expected = evaluate_widths(backbone, *sets, probes=("knn",), **given)
        for row in rows_of(copy):
            assert float(row["knn"]) == pytest.approx(expected[float(row["width"])].knn, abs=1e-4)


def test_published_settings():
    assert LINEAR["default"] == {"epochs": 90, "lr": 0.4 * 256 / 1024, "steps": []}  # SlimCLR with MoCo v3
    assert LINEAR["mocov2"] == {"epochs": 100, "lr": 60 * 256 / 1024, "steps": [0.6, 0.8]}


def test_gates_have_no_published_probe(tiny, tmp_path, capsys):
    options = ("--method", "vicreg", "--gate-budget", "0.5", "--knn-every", "0")
    at = tiny.index("--widths")
    folder = str(tmp_path / "run")
    assert main(["pretrain", *tiny[:at], *tiny[at + 3 :], *options, "--output", folder]) == 0
    capsys.readouterr()
    assert main(["evaluate", folder, "--probes", "published", *ON_CPU]) == 2
    assert "--probes published is for a run with widths" in capsys.readouterr().err
