"""Losses for training all widths of a network at once; plain functions of tensors, usable in any training code."""

from slimmable.losses._contrastive import byol as byol
from slimmable.losses._contrastive import contrast as contrast
from slimmable.losses._contrastive import info_nce as info_nce
from slimmable.losses._contrastive import moco_logits as moco_logits
from slimmable.losses._contrastive import moco_v3 as moco_v3
from slimmable.losses._contrastive import moco_v3_logits as moco_v3_logits
from slimmable.losses._contrastive import nt_xent as nt_xent
from slimmable.losses._contrastive import nt_xent_logits as nt_xent_logits
from slimmable.losses._distill import decoupled as decoupled
from slimmable.losses._distill import embedding_cross_entropy as embedding_cross_entropy
from slimmable.losses._distill import soft_cross_entropy as soft_cross_entropy
from slimmable.losses._distill import squared_error as squared_error
from slimmable.losses._distill import standardised as standardised
from slimmable.losses._modules import InfoNCE as InfoNCE
from slimmable.losses._modules import MoCoV3 as MoCoV3
from slimmable.losses._modules import NTXent as NTXent
from slimmable.losses._modules import VICReg as VICReg
from slimmable.losses._online import OnlineDistillation as OnlineDistillation
from slimmable.losses._total import slim_loss as slim_loss
from slimmable.losses._total import slim_term as slim_term
from slimmable.losses._vicreg import vicreg as vicreg
from slimmable.losses._weights import width_weights as width_weights

__all__ = [
    "InfoNCE",
    "MoCoV3",
    "NTXent",
    "OnlineDistillation",
    "VICReg",
    "byol",
    "contrast",
    "decoupled",
    "embedding_cross_entropy",
    "info_nce",
    "moco_logits",
    "moco_v3",
    "moco_v3_logits",
    "nt_xent",
    "nt_xent_logits",
    "slim_loss",
    "slim_term",
    "soft_cross_entropy",
    "squared_error",
    "standardised",
    "vicreg",
    "width_weights",
]
