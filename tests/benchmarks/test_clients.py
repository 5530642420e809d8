"""The benchmark of published programs: it counts what changes, says yes where all holds, and sees what does not."""

import importlib
import sys

import pytest

from benchmarks.clients import client, difference, records, run
from benchmarks.clients.client import Client
from benchmarks.clients.measure import measure

PROGRAM = """
import copy
import torch
import torchvision
from torch import nn


class Queue(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("keys", nn.functional.normalize(torch.randn(16, 8), dim=1), persistent=False)
        self.calls = 0

    def forward(self, query, key):
        query, key = nn.functional.normalize(query, dim=1), nn.functional.normalize(key, dim=1)
        scores = torch.cat([(query * key).sum(1, keepdim=True), query @ self.keys.T], dim=1)
        self.keys = torch.cat([key, self.keys])[:16]
        self.calls += 1
        return nn.functional.cross_entropy(scores, torch.zeros(len(query), dtype=torch.long))


class MoCo(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.momentum = copy.deepcopy(backbone).requires_grad_(False)

    def forward(self, x):
        return self.backbone(x)


def train(model, loader, criterion, optimizer):
    for x, _ in loader:
        for a, b in zip(model.backbone.parameters(), model.momentum.parameters()):
            b.mul_(0.9).add_(a.detach(), alpha=0.1)
        query = model(x)
        key = model.momentum(x.flip(3))
        loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main():
    model = MoCo(nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(5776, 8)))
    data = torchvision.datasets.CIFAR10("data", download=True, transform=torchvision.transforms.ToTensor())
    loader = torch.utils.data.DataLoader(data, batch_size=256, shuffle=True, num_workers=8)
    criterion = Queue()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(7):
        train(model, loader, criterion, optimizer)


if __name__ == "__main__":
    main()
"""
DIFF = """\
 import copy
+import slimmable
@@
         self.backbone = backbone
+        slimmable.slimify(self, (1.0, 0.5), example_inputs=torch.zeros(2, 3, 40, 40), inplace=True)
@@
-        query = model(x)
-        key = model.momentum(x.flip(3))
-        loss = criterion(query, key)
-        loss.backward()
+        loss = model.recipe.backward(lambda: criterion(model(x), model.momentum(x.flip(3))), once=[criterion])
@@
     criterion = Queue()
+    model.recipe = slimmable.SlimRecipe(model, frozen=[model.momentum])
"""


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Return a function that puts a program and its diff in place and measures the client."""
    monkeypatch.setattr(client, "HERE", tmp_path / "diffs")
    (tmp_path / "own").mkdir()
    (tmp_path / "diffs" / "own").mkdir(parents=True)
    (tmp_path / "own" / "main.py").write_text(PROGRAM)

    def measured(diff):
        (tmp_path / "diffs" / "own" / "moco.diff").write_text(diff)
        return measure(Client("own/moco", "own/main.py", images=(2, 3, 40, 40)), tmp_path)

    return measured


def test_a_program_with_the_right_lines_holds_in_every_stage(published):
    record = published(DIFF)
    assert {stage: record[stage] for stage in client.STAGES} == dict.fromkeys(client.STAGES, "yes")
    assert (record["added"], record["removed"], record["indented"], record["steps"]) == (4, 4, 0, 14)
    assert "| own/moco | 4, 4 | 0 | yes | yes | yes | yes |  |" in records.table([record])


@pytest.mark.parametrize(
    ("line", "instead", "stage", "says"),
    [
        (", once=[criterion]", "", "all widths", "changes more than once a step: criterion.keys"),
        (", frozen=[model.momentum]", "", "resumed", "yes"),
        ("(1.0, 0.5), ", "(1.0,), ", "all widths", "step 0: losses {1.0: "),
        ("lambda: criterion", "lambda: 2 * criterion", "all widths", "the first loss of the widest is "),
        ("inplace=True)", "inplace=True).backbone[4].weight.data.mul_(2)", "equal at 1.0", "step 0: loss "),
        (
            "criterion(model(x), ",
            "criterion(model.backbone[4](model.backbone[:4](x).detach()), ",
            "all widths",
            "not trained: model.",
        ),
    ],
)
def test_what_does_not_hold_is_seen(published, line, instead, stage, says):
    assert line in DIFF
    assert published(DIFF.replace(line, instead))[stage].startswith(says)


def test_an_error_in_a_program_names_its_line(published):
    record = published(DIFF.replace("SlimRecipe(model,", "SlimRecipe(None,"))
    assert record["equal at 1.0"] == "yes"
    assert " in line " in record["all widths"]
    assert record["resumed"] == record["extracted"] == "not tried"


def test_lines_are_counted_as_diff_w_counts_them():
    before = "a\nb\nc\n"
    assert difference.count(before, "a\n    b\nc\n") == difference.Changes(0, 0, 1)
    assert difference.count(before, "a\nx\ny\nc\n") == difference.Changes(2, 1, 0)
    assert difference.count(before, "def f():\n    a\n    b\nc\n") == difference.Changes(1, 0, 2)


def test_a_hunk_that_fits_nowhere_or_twice_is_refused():
    assert difference.apply(" b\n+x\n", "a\nb\n") == "a\nb\nx\n"
    for wrong in (" z\n+x\n", " a\n+x\n"):
        with pytest.raises(ValueError, match="wanted once"):
            difference.apply(wrong, "a\nb\na\n")
    assert difference.by_file("+x\n+++ other.py\n+y\n", "main.py") == {"main.py": "+x\n", "other.py": "+y\n"}


def test_every_client_has_a_diff_that_converts_and_trains():
    found = set(client.HERE.rglob("*.diff")) - set((client.HERE / "lightning").glob("*.diff"))  # below
    kept = {path.read_text() for path in found}
    assert kept == {each.diff for each in run.CLIENTS.values()}
    for each in run.CLIENTS.values():
        added = difference.side(each.diff.replace(difference.SEPARATOR, ""), "+")
        for call in ("import slimmable", "slimmable.slimify(", "slimmable.SlimRecipe(", "recipe.backward("):
            assert call in added, each.name
        hunks = each.diff.split(difference.SEPARATOR)
        assert not any("slimmable.slimify(" in hunk and not difference.converts(hunk) for hunk in hunks), each.name


def test_every_client_with_a_trainer_has_a_diff_that_converts_and_trains():
    pytest.importorskip("pytorch_lightning")
    clients = importlib.import_module("benchmarks.clients.lightning").CLIENTS
    found = sorted(f"lightning/{path.stem}" for path in (client.HERE / "lightning").glob("*.diff"))
    assert found == [each.name for each in clients]
    for each in clients:
        added = difference.side(each.diff.replace(difference.SEPARATOR, ""), "+")
        for call in ("import slimmable", "slimmable.slimify(", "slimmable.SlimRecipe(", "SlimCallback(recipe)"):
            assert call in added, each.name


def test_the_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    calls = []

    def measured(found, checkouts):
        calls.append(found.name)
        return {
            "name": found.name,
            "added": 4,
            "removed": 4,
            "indented": 0,
            "needs": "",
            **dict.fromkeys(client.STAGES, "yes"),
        }

    monkeypatch.setattr(run, "measure", measured)
    monkeypatch.setattr(run, "guarded", lambda function, name, seconds, gib: function(name))
    monkeypatch.setattr(
        sys, "argv", ["run", "--programs", str(tmp_path), "--only", "lightly/*", "--out", str(tmp_path / "out")]
    )
    source = tmp_path / run.CLIENTS["lightly/moco"].source
    source.parent.mkdir(parents=True)
    source.write_text(PROGRAM)
    run.main()
    assert "lightly/simclr: no " in capsys.readouterr().out
    run.main()
    assert calls == ["lightly/moco"]
    assert "| lightly/moco | 4, 4 | 0 |" in (tmp_path / "out" / "table.md").read_text()
