"""A converted network in a LightningModule: training, checkpoints, resuming."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import slimmable
from slimmable.training import average_gradients
from tests.life.networks import WIDTHS, converted

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of lightning's own, about loggers and workers


class Method(lightning.LightningModule):
    """Manual optimization: one backward pass per width, then one step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = converted("test_resnet")
        self.recipe = slimmable.SlimRecipe(self.network, distill=slimmable.OnlineDistillation(), slow_start=0.25)
        self.widths_of_steps: list[list[float]] = []

    def training_step(self, batch: list[Tensor], index: int) -> None:
        x, labels = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        done = []
        for width in self.recipe.widths(self.global_step / self.trainer.estimated_stepping_batches):
            scores = self.network(x)
            self.manual_backward(self.recipe.loss(nn.functional.cross_entropy(scores, labels), teach=scores))
            done.append(width)
        average_gradients(self.network)
        optimizer.step()
        self.widths_of_steps.append(done)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        for width, scores in slimmable.run_widths(self.network, batch[0]).items():
            self.log(f"accuracy/w{width}", (scores.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(10, (16,), generator=generator)), batch_size=4)


def trainer(folder: Path, epochs: int, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Method, Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("lightning")
    method = Method()
    run = trainer(folder, 2)
    run.fit(method, loader(), loader())
    run.save_checkpoint(folder / "last.ckpt")
    return method, folder / "last.ckpt", dict(run.callback_metrics)


def test_all_widths_are_trained_and_logged(trained):
    method, _, metrics = trained
    assert method.widths_of_steps == [[1.0]] * 2 + [list(WIDTHS)] * 6  # a quarter of the steps is the slow start
    assert {name for name in metrics if name.startswith("accuracy")} == {f"accuracy/w{width}" for width in WIDTHS}
    assert slimmable.width_of(method) == 1.0
    before = converted("test_resnet")
    assert all(not torch.equal(p, before.get_parameter(name)) for name, p in method.network.named_parameters())


def test_a_checkpoint_opens_with_every_width(trained):
    method, path, _ = trained
    opened = Method.load_from_checkpoint(path)
    assert opened.state_dict().keys() == method.state_dict().keys()
    assert all(torch.equal(tensor, method.state_dict()[name]) for name, tensor in opened.state_dict().items())


def test_a_resumed_run_ends_where_one_without_a_break_does(trained, tmp_path):
    _, path, _ = trained
    resumed, whole = Method(), Method()
    resumed.recipe.slow_start = whole.recipe.slow_start = 0.0
    run = trainer(tmp_path, 3)
    run.fit(resumed, loader(), ckpt_path=path)
    saved = torch.load(path, weights_only=False)
    whole.load_state_dict(saved["state_dict"])
    optimizer = whole.configure_optimizers()
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer_states"][0]))
    for x, labels in loader():
        optimizer.zero_grad()
        for _ in whole.recipe.widths(1.0):
            scores = whole.network.train()(x)
            whole.recipe.loss(nn.functional.cross_entropy(scores, labels), teach=scores).backward()
        optimizer.step()
    assert len(resumed.widths_of_steps) == 4
    for name, parameter in whole.network.named_parameters():
        torch.testing.assert_close(resumed.network.get_parameter(name), parameter, msg=name)


class Parallel(Method):
    """The same in several processes: no reduction until the last backward pass, then one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: list[Tensor], index: int) -> None:
        x, labels = batch
        with self.trainer.strategy.block_backward_sync():
            for _ in self.recipe.widths(1.0):
                scores = self.network(x)
                self.manual_backward(self.recipe.loss(nn.functional.cross_entropy(scores, labels), teach=scores))
        average_gradients(self)
        gradients = {name: parameter.grad for name, parameter in self.network.named_parameters()}
        torch.save((x, labels, gradients), self.folder / f"{self.global_rank}.pt")
        self.optimizers().step()


@pytest.mark.slow  # two processes that import lightning
def test_the_gradients_of_two_processes_are_those_of_one(tmp_path):
    run = trainer(tmp_path, -1, max_steps=1, devices=2, strategy="ddp_spawn", enable_checkpointing=False)
    run.fit(Parallel(tmp_path), loader())
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    halves = []
    for x, labels, _ in saved:
        method = Method()
        for _ in method.recipe.widths(1.0):
            scores = method.network.train()(x)
            method.recipe.loss(nn.functional.cross_entropy(scores, labels), teach=scores).backward()
        halves.append({name: parameter.grad for name, parameter in method.network.named_parameters()})
    assert not torch.equal(saved[0][0], saved[1][0])
    for _, _, gradients in saved:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, (halves[0][name] + halves[1][name]) / 2, msg=name)
