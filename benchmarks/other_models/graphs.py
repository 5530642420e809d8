"""Graph networks of PyTorch Geometric."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch_geometric
from torch_geometric import nn as layers

from benchmarks.other_models.entry import Entry, noise


def entries() -> Iterator[Entry]:
    yield model("GCN")
    yield model("GCN", "GCN with normalisation", norm="batch_norm", jk="cat")
    yield model("GAT", heads=4)
    yield model("GAT", "GATv2", v2=True, heads=4)
    yield model("GraphSAGE")
    yield model("GraphSAGE", "GraphSAGE with max", aggr="max")
    yield model("GIN", norm="batch_norm")


def model(kind: str, name: str = "", **arguments: Any) -> Entry:
    make = partial(getattr(layers, kind), in_channels=16, hidden_channels=64, num_layers=4, out_channels=5, **arguments)
    return Entry("torch_geometric", kind, name or kind, make, graph)


def graph() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features of 12 nodes, and edges in a circle with chords."""
    nodes = torch.arange(12)
    edges = [torch.stack([nodes, (nodes + step) % 12]) for step in (1, 11, 5)]
    return noise(12, 16), torch.cat(edges, 1)


def version() -> tuple[str, str]:
    return "torch_geometric", torch_geometric.__version__
