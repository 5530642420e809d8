"""The evidence on SlimCLR: runs are kept and not repeated, and the tables say what the rows hold."""

import csv
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import cifar as cifar_module, stl10 as stl_module

from benchmarks.slimclr import run, table
from benchmarks.training_data import Kept, few_of_each
from slimmable.cli.data import Views

ROOT = Path(__file__).parents[2]


def quick(out, *arms):
    command = [sys.executable, "-m", "benchmarks.slimclr.run", "--quick", "--out", str(out), "--arms", *arms]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.slow
def test_finished_runs_are_not_repeated(tmp_path):
    quick(tmp_path, "alone")
    before = (tmp_path / "digits.csv").read_text()
    said = quick(tmp_path, "alone", "all")
    assert "seed 0 all" in said
    assert "alone" not in said
    assert (tmp_path / "digits.csv").read_text().startswith(before)
    rows = list(csv.DictReader((tmp_path / "digits.csv").open()))
    assert [(row["arm"], float(row["width"])) for row in rows] == [(a, w) for a in ("alone", "all") for w in run.WIDTHS]
    assert all(0 <= float(row[probe]) <= 100 for row in rows for probe in (*run.PROBES, "few"))
    text = table.page("digits", rows, "")
    assert f"| all | 1 | {float(rows[4]['linear']):.1f} |" in text


def test_an_interrupted_run_goes_on_after_its_last_epoch(tmp_path, monkeypatch):
    """It ends as if it had not been interrupted; of the two widths alone, the finished one is not trained again."""
    more = {"epochs": 3, "warmup_epochs": 1.0, "num_images": 256, "queue_size": 128}
    monkeypatch.setattr(run, "WIDTHS", (1.0, 0.5))
    expected = list(run.run("digits", "alone", 0, {}, **more))
    take_step, taken = run.Training.take_step, []

    def interrupted(training):
        taken.append(training.step)
        if len(taken) == 10:  # of the second width, in its second epoch
            raise KeyboardInterrupt
        return take_step(training)

    monkeypatch.setattr(run.Training, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(run.run("digits", "alone", 0, {}, unfinished=tmp_path, **more))
    found = list(run.run("digits", "alone", 0, {}, unfinished=tmp_path, **more))
    assert taken == [*range(6), *range(4), *range(2, 6)]
    for row in (*expected, *found):
        row.pop("seconds")
    assert found == expected


def test_all_arms_of_a_seed_see_the_same_views():
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    views = Views(images, torch.arange(4), [lambda image: image.float() / 255 * torch.rand(())] * 2, seed=0)
    known = {}
    first, again = (Kept(views, known).__getitems__([(0, 1)]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for kept, drawn in zip(first, views.__getitems__([(0, 1)]), strict=True):
        torch.testing.assert_close(kept, drawn, rtol=0, atol=0.5 / 255 + 1e-6)


def test_an_arm_with_more_views_draws_what_an_arm_with_fewer_has_not():
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    transform = [lambda image: image.float() / 255 * torch.rand(())]
    one, two = (Views(images, torch.arange(4), transform * count, seed=0) for count in (1, 2))
    known = {}
    first, _ = Kept(one, known).__getitems__([(0, 1)])
    same, other, _ = Kept(two, known).__getitems__([(0, 1)])
    again, _ = Kept(one, known).__getitems__([(0, 1)])
    assert torch.equal(first, same)
    assert torch.equal(first, again)
    assert not torch.equal(same, other)


def test_few_labels_are_as_many_of_each_class():
    labels = torch.arange(200) % 7
    chosen = few_of_each(labels, 10, seed=1)
    assert labels[chosen].bincount().tolist() == [10] * 7
    assert len(chosen.unique()) == len(chosen)


def test_the_cost_is_that_of_the_passes():
    """A step: queries forward and backward at the widths that run, keys forward at the full width."""
    images = run.images_of(run.configuration("digits", "bare", 0, num_images=256))
    found = {}
    for arm in ("bare", "slow start"):
        config = run.configuration("digits", arm, 0, epochs=4, num_images=256, queue_size=128)
        method = run.build_method(
            config, run.small_resnet(in_chans=1, channels=run.PLANES, blocks=(1, 1, 1, 1), zero_init_last=True), 1, 10
        )
        found[arm] = run.cost(run.Training(config, method, images, torch.device("cpu")), images)
        macs = [row.macs for row in run.slimmable.profile(method.encoder, (1, 20, 20), repeats=0).rows]
    steps, batch = 8, 128
    assert found["bare"] == batch * steps * (3 * sum(macs) + macs[0])
    assert found["slow start"] == batch * (steps * macs[0] + steps / 2 * 3 * (macs[0] + sum(macs)))


def cifar(folder):
    """Write CIFAR-10's files, of one image a class; its red is the number of the image, its class that modulo 10."""
    inside = folder / "cifar-10-batches-py"
    inside.mkdir()
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for at, name in enumerate(names):
        pixels = np.zeros((10, 3, 32, 32), np.uint8)
        pixels[:, 0] = np.arange(10 * at, 10 * at + 10)[:, None, None]
        (inside / name).write_bytes(pickle.dumps({"data": pixels.reshape(10, -1), "labels": list(range(10))}))
    (inside / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {number}" for number in range(10)]}))
    return 50, 10


def stl(folder):
    inside = folder / "stl10_binary"
    inside.mkdir()
    for part in ("train", "test"):
        pixels = np.zeros((20, 3, 96, 96), np.uint8)
        pixels[:, 0] = np.arange(20)[:, None, None]
        pixels.tofile(inside / f"{part}_X.bin")
        (np.arange(20) % 10 + 1).astype(np.uint8).tofile(inside / f"{part}_y.bin")  # from one on
    (inside / "class_names.txt").write_text("\n".join(f"class {number}" for number in range(10)))
    return 20, 20


def pictures(folder):
    for number in range(30):
        (folder / f"class {number % 10}").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"class {number % 10}" / f"{number}.png")
    return 20, 10  # a third of each class is held out


@pytest.mark.parametrize(("data", "write"), [("cifar10", cifar), ("stl10", stl), ("folder", pictures)])
def test_users_photographs_are_trained_on(data, write, tmp_path, monkeypatch):
    for module in (cifar_module, stl_module):
        monkeypatch.setattr(module, "check_integrity", lambda *path: True)  # these are not the real files
    train, test = write(tmp_path)
    small = {"epochs": 1, "warmup_epochs": 0.0, "batch_size": 8, "image_size": 16, "num_images": 16}
    config = run.configuration(data, "bare", 0, **small)
    images = run.images_of(replace(config, num_images=1000), folder=tmp_path)
    for part, labels, count in ((images.train, images.train_labels, train), (images.test, images.test_labels, test)):
        reds = [int(part[at][0, 0, 0]) for at in range(count)]
        assert [red % 10 for red in reds] == labels.tolist()
        assert len(part) == len(set(reds)) == count
    assert len(run.images_of(config, folder=tmp_path).train) == 16
    assert len(list(run.run(data, "bare", 0, None, tmp_path, **small))) == len(run.WIDTHS)


def test_intervals_and_paired_differences():
    assert table.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1.9632, abs=1e-4)  # 2.7764 sqrt(2.5 / 5)
    rows = [
        {"arm": arm, "seed": str(seed), "width": str(width), "linear": str(value + seed)}
        for arm, value in (("alone", 50.0), ("all", 52.0))
        for seed in range(3)
        for width in run.WIDTHS
    ]
    assert "| all | +2.0 ± 0.0 | +2.0 ± 0.0 |" in table.differences(rows, ["all"], "linear", "alone")
    assert "| all | 3 | 53.0 ± 2.5 |" in table.accuracies(rows, ["all"], "linear")
