"""Evaluation with a part of the labels, and without holding the images of a data set."""

import csv
import weakref

import pytest
import torch
from hypothesis import given, settings, strategies as st

from slimmable import at_width, set_width
from slimmable.__main__ import main
from slimmable.cli.commands import Evaluate
from slimmable.cli.data import Images, load_images
from slimmable.cli.evaluation import report_run, rows_of_run
from slimmable.cli.report import read_rows, title_of
from slimmable.cli.run import read_config, trained_method
from slimmable.evaluation import evaluate_features, knn_accuracy, label_fraction


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.floats(0.001, 0.999), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_a_part_is_balanced_and_the_same_for_the_same_seed(counts, fraction, seed):
    labels = torch.cat([torch.full((count,), 2 * number) for number, count in enumerate(counts)])  # odd ones are absent
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    places = label_fraction(labels, fraction, seed=seed)
    each = max(1, round(fraction * len(labels) / len(counts)))
    assert len(places.unique()) == len(places)
    assert [int((labels[places] == 2 * number).sum()) for number in range(len(counts))] == [
        min(each, count) for count in counts
    ]
    assert torch.equal(places, label_fraction(labels, fraction, seed=seed))


def test_another_seed_gives_another_part():
    labels = torch.arange(10).repeat(100)
    assert label_fraction(labels, 0.01).tolist() != label_fraction(labels, 0.01, seed=1).tolist()
    assert sorted(labels[label_fraction(labels, 0.01)].tolist()) == list(range(10))


def test_a_run_is_evaluated_with_a_part_of_its_labels(run, capsys):
    before = (run / "metrics.csv").read_text()
    assert main(["evaluate", str(run), "--label-fraction", "0.5", "0.25", "--device", "cpu", "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "| width | parameters | MACs | kNN, 50 % of labels | linear, 50 % of labels |" in said
    assert said.count("| width | parameters |") == 3
    with (run / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    config = read_config(run)
    images, backbone = load_images(config), trained_method(config, run, 1).backbone
    features = []
    for part in (images.train, images.test):
        with torch.no_grad():
            features.append({})
            for width in config.widths:
                with at_width(backbone, width):
                    features[-1][width] = backbone(part.float() / 255)
    set_width(backbone, 1.0)
    for fraction in (0.5, 0.25):
        places = label_fraction(images.train_labels, fraction)
        known = {width: part[places] for width, part in features[0].items()}
        own = evaluate_features(
            known, images.train_labels[places], features[1], images.test_labels, probes=("knn", "linear")
        )
        for row in found:
            expected = own[float(row["width"])]
            assert float(row[f"knn@{fraction:g}"]) == pytest.approx(expected.knn, abs=0.07)  # one of 16 images
            assert float(row[f"linear@{fraction:g}"]) == pytest.approx(expected.linear, abs=0.07)
    columns = [line.split(",") for line in before.splitlines()]
    assert [[row[name] for name in columns[0]] for row in found] == columns[1:]
    assert {"knn@0.5", "linear@0.25"} <= set(read_rows(run)[0].shares)
    assert main(["evaluate", str(run), "--device", "cpu", "--workers", "0"]) == 0
    assert (run / "metrics.csv").read_text() == before


def test_titles_tell_the_part():
    assert title_of("linear@0.01") == "linear, 1 % of labels"
    assert title_of("ridge@0.001") == "ridge, 0.1 % of labels"
    with pytest.raises(ValueError):
        title_of("knn@many")


class Counted:
    """Random images, which counts how many are alive."""

    def __init__(self, count):
        self.count, self.alive, self.most = count, 0, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = torch.randint(256, (1, 24, 24), generator=torch.Generator().manual_seed(index)).to(torch.uint8)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(image, self._gone)
        return image

    def _gone(self):
        self.alive -= 1


def test_evaluation_holds_a_batch_of_images_however_many_there_are(run, tmp_path, monkeypatch):
    monkeypatch.setattr("slimmable.cli.evaluation.VOTERS", 300)
    compared = []

    def counting(train, train_labels, test, test_labels):
        compared.append((len(train), len(train_labels), len(test), len(test_labels)))
        return knn_accuracy(train, train_labels, test, test_labels)

    monkeypatch.setattr("slimmable.cli.evaluation.knn_accuracy", counting)
    config = read_config(run)
    method = trained_method(config, run, 1)
    most = []
    for count in (300, 1200):
        parts = [Counted(count), Counted(count)]
        labels = torch.arange(count) % 10
        images = Images(parts[0], labels, parts[1], labels, tuple("0123456789"), 1)
        options = Evaluate(tmp_path, probes=("knn",), label_fraction=(0.1,), workers=0)
        rows = rows_of_run(config, method, images, options)
        report_run(config, rows, images, options)
        most.append(max(part.most for part in parts))
    assert most[0] == most[1] <= 300
    assert compared == [(300,) * 4] * 2  # by their pixels
