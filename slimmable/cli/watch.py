"""kNN accuracy of every network of a run while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from slimmable._width import at_width
from slimmable.cli.config import PretrainConfig
from slimmable.cli.evaluation import features_in
from slimmable.cli.gates import features_of_passes
from slimmable.cli.loader import Plain, some_of
from slimmable.cli.loggers import CsvLog, Logger
from slimmable.cli.training import Training
from slimmable.evaluation import knn_accuracy

KNN = "knn.csv"
_MOST = 50_000  # training images that vote


def epochs_between(config: PretrainConfig, asked: int | None) -> int:
    """Return how many epochs lie between two evaluations, 0 for none; by default a tenth of a run with gates.

    >>> epochs_between(PretrainConfig(), None), epochs_between(PretrainConfig(), 3)
    (0, 3)
    """
    if asked is not None:
        return asked
    return 0 if config.gate_budget is None else max(1, config.epochs // 10)


class Watch:
    """Writes the kNN accuracy of every network of a run to `knn.csv`; the training goes on as if it were not there.

    Args:
        training: of the run; rows of steps that it has not done are dropped.
        folder: of the run.
        loggers: that get the numbers too.
    """

    def __init__(self, training: Training, folder: Path, loggers: Sequence[Logger]) -> None:
        self.training = training
        config = training.config
        # of a universal model the other widths have no statistics before the end
        self.widths = config.widths[:: len(config.widths) - 1] if config.universal else config.widths
        passes = ["knn/dense", "knn/gated", "gated_share"]
        self.columns = [f"knn/w{width:g}" for width in self.widths] if config.gate_budget is None else passes
        self.loggers = [CsvLog(folder / KNN, self.columns, training.step), *loggers]

    def look(self) -> str:
        """Evaluate, write a row, and return a line that says the same."""
        found = self._evaluate()
        for logger in self.loggers:
            logger.log(self.training.step, found)
            logger.flush()
        shares = {name[4:].lstrip("w"): 100 * share for name, share in found.items() if name.startswith("knn/")}
        costs = f"  ({found['gated_share']:.2f} of the multiply-adds)" if "gated_share" in found else ""
        return "kNN accuracy in %  " + "  ".join(f"{name}: {share:.1f}" for name, share in shares.items()) + costs

    def _evaluate(self) -> dict[str, float]:
        """Return the numbers of a row by column; gates decide without noise, at thresholds of the training."""
        config, images, backbone = self.training.config, self.training.images, self.training.method.backbone
        train = some_of(Plain(images.train, config.image_size), _MOST)
        test = Plain(images.test, config.image_size)
        labels = images.train_labels[train.indices]

        def accuracy(known: Tensor, asked: Tensor) -> float:
            return knn_accuracy(known, labels, asked, images.test_labels)

        if config.gate_budget is None:
            settings = {width: partial(at_width, backbone, width) for width in self.widths}
            known, asked = (features_in(settings, backbone, part, self.training.workers) for part in (train, test))
            return {f"knn/w{width:g}": accuracy(known[width], asked[width]) for width in self.widths}
        trained, _ = features_of_passes(backbone, train, self.training.workers)
        held_out, share = features_of_passes(backbone, test, self.training.workers)
        found = {f"knn/{name}": accuracy(trained[name], held_out[name]) for name in trained}
        return {**found, "gated_share": float(share.mean())}
