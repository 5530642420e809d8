"""Training and evaluation: the recipe for an own loop, several processes, MoCo, BatchNorm calibration, kNN, probes."""

from slimmable.training.calibrate import calibrate_bn as calibrate_bn
from slimmable.training.distributed import average_gradients as average_gradients
from slimmable.training.evaluate import Accuracy as Accuracy
from slimmable.training.evaluate import evaluate_widths as evaluate_widths
from slimmable.training.evaluate import features_of as features_of
from slimmable.training.knn import knn_accuracy as knn_accuracy
from slimmable.training.moco import MoCo as MoCo
from slimmable.training.probe import probe_loss as probe_loss
from slimmable.training.probe import train_probe as train_probe
from slimmable.training.recipe import SlimRecipe as SlimRecipe

__all__ = [
    "Accuracy",
    "MoCo",
    "SlimRecipe",
    "average_gradients",
    "calibrate_bn",
    "evaluate_widths",
    "features_of",
    "knn_accuracy",
    "probe_loss",
    "train_probe",
]
