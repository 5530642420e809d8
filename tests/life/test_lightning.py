"""A converted network in a LightningModule: training, checkpoints, resuming."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import slimmable
from slimmable.errors import UsageError
from slimmable.training import average_gradients
from tests.life.networks import WIDTHS, converted

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
torchmetrics = pytest.importorskip("torchmetrics")  # comes with it
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging  # noqa: E402
from lightning.pytorch.demos.transformer import LightningTransformer  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402

SlimCallback = slimmable.integrations.lightning.SlimCallback
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


# -- the callback


class Plain(lightning.LightningModule):
    """What a user has: automatic optimization, a log, and state that a step changes."""

    def __init__(self, widths: tuple[float, ...] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Flatten(), nn.Linear(8 * 49, 10),
        )  # fmt: skip
        if widths:
            self.network = slimmable.slimify(self.network, widths, example_inputs=torch.zeros(2, 3, 32, 32))
        self.register_buffer("queue", torch.zeros(4))
        self.accuracy = torchmetrics.MeanMetric()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        scores = self.network(batch[0])
        loss = nn.functional.cross_entropy(scores, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"largest": scores.max()})
        self.accuracy((scores.argmax(1) == batch[1]).float())
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.queue[index % 4] += 1
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def slim(method: Plain, **options) -> SlimCallback:
    distill = slimmable.OnlineDistillation()
    return SlimCallback(slimmable.SlimRecipe(method.network, distill=distill, **options))


def fit(method, *callbacks, epochs=2, path=None, **options) -> lightning.Trainer:
    folder = options.pop("default_root_dir", Path())
    options = {"enable_checkpointing": False, "callbacks": list(callbacks), **options}
    run = trainer(folder, epochs, **options)
    run.fit(method, loader(), ckpt_path=path)
    return run


def scaled() -> list[MixedPrecision]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]


def assert_same(method: nn.Module, expected: nn.Module) -> None:
    tensors = method.state_dict()
    different = [name for name, tensor in expected.state_dict().items() if not torch.equal(tensors[name], tensor)]
    assert different == []


SETTINGS = {
    "as it comes": dict,
    "accumulation and clipping": lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "bfloat16": lambda: {"precision": "bf16-mixed"},
    "float16": lambda: {"plugins": scaled(), "gradient_clip_val": 0.1},
    "an average": lambda: {"callbacks": [WeightAveraging()]},
    "an average of the last": lambda: {"callbacks": [StochasticWeightAveraging(0.01, swa_epoch_start=1)]},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_at_width_1_a_module_trains_as_the_plain_one(setting):
    plain, one = Plain(), Plain((1.0,))
    fit(plain, **SETTINGS[setting]())
    options = SETTINGS[setting]()
    callbacks = [slim(one), *options.pop("callbacks", [])]
    fit(one, *callbacks, **options)
    assert plain.losses == one.losses
    assert_same(one, plain)


@pytest.mark.parametrize("setting", ["as it comes", "accumulation and clipping", "float16"])
def test_all_widths_take_the_steps_of_a_loop(setting):
    method, expected = Plain(WIDTHS), Plain(WIDTHS).train()
    options = SETTINGS[setting]()
    callback = slim(method, slow_start=0.5)
    fit(method, callback, **options)

    scaler = torch.amp.GradScaler("cpu", enabled="plugins" in options)
    every = options.get("accumulate_grad_batches", 1)
    recipe = slimmable.SlimRecipe(
        expected.network, distill=slimmable.OnlineDistillation(), slow_start=0.5, steps=2 * len(loader())
    )
    optimizer = expected.configure_optimizers()
    for number, (x, labels) in enumerate([*loader()] * 2):

        def loss(x: Tensor = x, labels: Tensor = labels) -> Tensor:
            with torch.autocast("cpu", torch.float16, enabled=scaler.is_enabled(), cache_enabled=False):
                return nn.functional.cross_entropy(expected.network(x), labels)

        recipe.backward(loss, backward=lambda part: scaler.scale(part / every).backward())
        if (number + 1) % every == 0:
            scaler.unscale_(optimizer)
            if "gradient_clip_val" in options:
                nn.utils.clip_grad_norm_(expected.parameters(), options["gradient_clip_val"])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert callback.recipe.losses.keys() == recipe.losses.keys() == set(WIDTHS)
    assert_same(method.network, expected.network)
    assert "training_step" not in vars(method)  # it is left as it was


def test_a_step_changes_what_is_not_trained_once_and_logs_each_width_by_its_name():
    method = Plain(WIDTHS)
    run = fit(method, slim(method), epochs=3)
    assert method.queue.tolist() == [3.0] * 4
    assert len(method.losses) == 12
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    narrow = {f"{name}/w{width}" for width in WIDTHS[1:] for name in ("loss", "largest")}
    assert {name for name in logged if "/w" in name and not name.endswith(("_step", "_epoch"))} == narrow
    assert logged["loss"] == pytest.approx(sum(method.losses[-4:]) / 4)
    assert logged["loss_step"] == pytest.approx(method.losses[-1])
    assert len({logged["loss"], *(logged[f"loss/w{width}"] for width in WIDTHS[1:])}) == len(WIDTHS)


def test_one_width_s_graph_is_alive_at_a_time():
    alive = []

    class Watched(Plain):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            alive.append([hidden for hidden in watched if hidden() is not None])
            return super().training_step(batch, index)

    watched: list[weakref.ref[Tensor]] = []
    method = Watched(WIDTHS)
    method.network[3].register_forward_hook(lambda module, args, output: watched.append(weakref.ref(output)))
    fit(method, slim(method), epochs=1)
    assert len(watched) == 4 * len(WIDTHS)
    assert alive == [[]] * len(watched)


def test_a_resumed_run_ends_bit_for_bit_where_one_without_a_break_does(tmp_path):
    class Break(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            trainer.should_stop = True

    whole, broken, resumed = Plain(WIDTHS), Plain(WIDTHS), Plain(WIDTHS)
    fit(whole, slim(whole, slow_start=0.75))
    fit(broken, slim(broken, slow_start=0.75), Break()).save_checkpoint(tmp_path / "half.ckpt")
    callback = slim(resumed, slow_start=0.75)
    fit(resumed, callback, path=tmp_path / "half.ckpt")
    assert (callback.recipe.steps_done, callback.recipe.steps) == (8, 8)
    assert_same(resumed, whole)


def test_a_plain_checkpoint_gives_its_weights_only(tmp_path):
    """As the page says: the optimizer's state does not fit."""
    plain, method = Plain(), Plain(WIDTHS)
    fit(plain, epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="parameter group that doesn't match"):
        fit(method, slim(method), path=tmp_path / "plain.ckpt")
    method.load_state_dict(torch.load(tmp_path / "plain.ckpt")["state_dict"])
    kept = method.network[1].module_at(1)
    assert torch.equal(kept.running_mean, plain.network[1].running_mean[: len(kept.running_mean)])


def test_stochastic_weight_averaging_computes_the_statistics_of_every_width():
    method = Plain(WIDTHS)
    callback = slim(method, slow_start=0.1)
    fit(method, callback, StochasticWeightAveraging(1e-9, swa_epoch_start=1, annealing_epochs=1))
    assert callback.recipe.progress == 1.0
    expected = copy.deepcopy(method.network).train()
    norms = [module for module in expected.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        type(norm).reset_running_stats(norm)
        norm.momentum = None
    for width in WIDTHS:
        slimmable.set_width(expected, width)
        for x, _ in loader():
            expected(x)
    assert {int(norm.num_batches_tracked) for norm in norms} == {len(loader())}
    for name, tensor in expected.named_buffers():
        torch.testing.assert_close(method.network.get_buffer(name), tensor, msg=name)


def test_manual_optimization_logs_and_counts_too(tmp_path):
    class Manual(Plain):
        def __init__(self) -> None:
            super().__init__(WIDTHS)
            self.automatic_optimization = False
            self.recipe = slimmable.SlimRecipe(self.network, distill=slimmable.OnlineDistillation(), slow_start=0.5)

        def training_step(self, batch: list[Tensor], index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            step = super().training_step
            self.recipe.backward(lambda: step(batch, index), backward=self.manual_backward)
            optimizer.step()

    method, expected = Manual(), Plain(WIDTHS)
    run = fit(method, SlimCallback(method.recipe))
    fit(expected, slim(expected, slow_start=0.5))
    assert {f"loss/w{width}" for width in WIDTHS[1:]} <= run.callback_metrics.keys()
    assert_same(method.network, expected.network)


def test_what_cannot_be_trained_is_refused():
    class Iterates(Plain):
        def training_step(self, dataloader_iter):
            return super().training_step(*next(dataloader_iter)[:2])

    class OwnBackward(SingleDeviceStrategy):
        def backward(self, closure_loss: Tensor, *args: object) -> None:
            closure_loss.backward()

    method = Iterates(WIDTHS)
    with pytest.raises(UsageError, match="must take a batch, not a dataloader_iter"):
        fit(method, slim(method))
    method = Plain(WIDTHS)
    with pytest.raises(UsageError, match="OwnBackward ran its own backward pass"):
        fit(method, slim(method), strategy=OwnBackward(), accumulate_grad_batches=2)
    assert "training_step" not in vars(method)


def test_a_published_module_trains_at_all_widths(tmp_path, monkeypatch):
    monkeypatch.setattr(LightningTransformer, "prepare_data", lambda self: None)  # it downloads texts

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            self.found = [*getattr(self, "found", []), float(outputs["loss"])]

    def run(widths: tuple[float, ...] | None) -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        module = LightningTransformer(vocab_size=24)
        inputs = torch.randint(24, (8, 12), generator=torch.Generator().manual_seed(0))
        losses = Losses()
        callbacks: list[lightning.Callback] = [losses]
        if widths:
            slimmable.slimify(module, widths, example_inputs=(inputs[:2], inputs[:2]), inplace=True)
            callbacks.append(SlimCallback(slimmable.SlimRecipe(module, distill=slimmable.OnlineDistillation())))
        torch.manual_seed(1)
        batches = DataLoader(TensorDataset(inputs, inputs.roll(1, 1)), 4)
        trainer(tmp_path, 2, callbacks=callbacks, enable_checkpointing=False).fit(module, batches)
        return losses.found, module

    plain, one, slim_losses = run(None), run((1.0,)), run((1.0, 0.5))
    assert plain[0] == one[0]
    assert_same(one[1], plain[1])
    assert slim_losses[0][0] == plain[0][0]
    inputs = torch.zeros(1, 12, dtype=torch.long)
    small = slimmable.extract(slim_losses[1].model, 0.5).eval()
    with slimmable.at_width(slim_losses[1].eval(), 0.5):
        torch.testing.assert_close(small(inputs, inputs), slim_losses[1].model(inputs, inputs))


def test_a_recipe_elsewhere_does_not_mind_gradients_that_come_within_the_optimizer_s_step():
    other = slimmable.layers.SlimLinear(4, 2, widths=(1.0, 0.5), slim_in=False)
    recipe = slimmable.SlimRecipe(other)
    recipe.backward(lambda: other(torch.ones(1, 4)).sum())
    method = Plain(WIDTHS)
    fit(method, slim(method), epochs=1)
    assert recipe.steps_done == 1


class InParallel(Plain):
    """Saves what two processes had and what the optimizer got."""

    def __init__(self, folder: Path, automatic: bool) -> None:
        super().__init__(WIDTHS)
        self.folder, self.automatic_optimization = folder, automatic
        self.recipe = slimmable.SlimRecipe(self.network)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        self.batch = batch
        if self.automatic_optimization:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.recipe.backward(
            lambda: nn.functional.cross_entropy(self.network(batch[0]), batch[1]), backward=self.manual_backward
        )
        self.optimizers().step()
        return None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = {name: parameter.grad for name, parameter in self.network.named_parameters()}
        torch.save((*self.batch, gradients), self.folder / f"{self.global_rank}.pt")


@pytest.mark.slow  # two processes that import lightning
@pytest.mark.parametrize("automatic", [True, False])
def test_the_callback_averages_the_gradients_of_two_processes(tmp_path, automatic):
    method = InParallel(tmp_path, automatic)
    options = {"devices": 2, "strategy": "ddp_spawn", "enable_checkpointing": False}
    trainer(tmp_path, -1, max_steps=1, callbacks=[SlimCallback(method.recipe)], **options).fit(method, loader())
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    halves = []
    for x, labels, _ in saved:
        network = InParallel(tmp_path, automatic).network.train()
        recipe = slimmable.SlimRecipe(network)
        recipe.backward(lambda network=network, x=x, y=labels: nn.functional.cross_entropy(network(x), y))
        halves.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert not torch.equal(saved[0][0], saved[1][0])
    for _, _, gradients in saved:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, (halves[0][name] + halves[1][name]) / 2, msg=name)
