"""Evaluate the features of every width: nearest neighbours, linear probes and a ridge classifier."""

from slimmable.evaluation.evaluate import (
    Accuracies,
    accuracy_of,
    evaluate_features,
    evaluate_widths,
    features_of,
    knn_accuracy,
    probe_loss,
    ridge_classifier,
    train_probe,
    train_slimmable_probe,
)

__all__ = [
    "Accuracies", "accuracy_of", "evaluate_features", "evaluate_widths", "features_of", "knn_accuracy", "probe_loss",
    "ridge_classifier", "train_probe", "train_slimmable_probe",
]  # fmt: skip
