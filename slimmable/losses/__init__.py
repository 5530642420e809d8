"""Losses for training all widths of a network at once: plain functions of tensors for any training code.

All raise DataError for tensors whose shapes or types do not fit, and UsageError for numbers out of range.
"""

from slimmable.losses.distillation import (
    OnlineDistillation,
    decoupled_distillation,
    embedding_cross_entropy,
    slim_loss,
    slim_term,
    soft_cross_entropy,
    squared_error,
    standardised_distillation,
    width_weights,
)
from slimmable.losses.self_supervised import (
    barlow_twins_loss,
    byol_loss,
    contrastive_cross_entropy,
    dino_loss,
    info_nce,
    moco_logits,
    moco_v3_logits,
    moco_v3_loss,
    nt_xent,
    nt_xent_logits,
    simsiam_loss,
    vicreg_loss,
)

__all__ = [
    "OnlineDistillation", "barlow_twins_loss", "byol_loss", "contrastive_cross_entropy", "decoupled_distillation",
    "dino_loss", "embedding_cross_entropy", "info_nce", "moco_logits", "moco_v3_logits", "moco_v3_loss", "nt_xent",
    "nt_xent_logits", "simsiam_loss", "slim_loss", "slim_term", "soft_cross_entropy", "squared_error",
    "standardised_distillation", "vicreg_loss", "width_weights",
]  # fmt: skip
