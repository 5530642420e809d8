"""Training and evaluation: the recipe for an own loop, several processes, MoCo, BatchNorm calibration, kNN, probes."""

from slimmable.training.calibrate import calibrate_bn as calibrate_bn
from slimmable.training.diagnostics import GradientDiagnostics as GradientDiagnostics
from slimmable.training.distributed import average_gradients as average_gradients
from slimmable.training.distributed import gather as gather
from slimmable.training.distributed import synchronised_batchnorm as synchronised_batchnorm
from slimmable.training.evaluate import Accuracy as Accuracy
from slimmable.training.evaluate import accuracy_of as accuracy_of
from slimmable.training.evaluate import evaluate_features as evaluate_features
from slimmable.training.evaluate import evaluate_widths as evaluate_widths
from slimmable.training.evaluate import features_of as features_of
from slimmable.training.knn import knn_accuracy as knn_accuracy
from slimmable.training.moco import MoCo as MoCo
from slimmable.training.momentum import cosine_momentum as cosine_momentum
from slimmable.training.probe import probe_loss as probe_loss
from slimmable.training.probe import train_probe as train_probe
from slimmable.training.probe import train_slimmable_probe as train_slimmable_probe
from slimmable.training.recipe import SlimRecipe as SlimRecipe
from slimmable.training.ridge import ridge_classifier as ridge_classifier

__all__ = [
    "Accuracy",
    "GradientDiagnostics",
    "MoCo",
    "SlimRecipe",
    "accuracy_of",
    "average_gradients",
    "calibrate_bn",
    "cosine_momentum",
    "evaluate_features",
    "evaluate_widths",
    "features_of",
    "gather",
    "knn_accuracy",
    "probe_loss",
    "ridge_classifier",
    "synchronised_batchnorm",
    "train_probe",
    "train_slimmable_probe",
]
