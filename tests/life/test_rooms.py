"""The rooms of the package: imports go one way, and never into another room's private module; see docs/map.md."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2] / "slimmable"


def imports():
    """Yield (file, room, imported room, rest of the path) for each import from one room of the package into another.

    The top level of the package is the face, which only its own files and `cli` import.
    """
    for path in ROOT.rglob("*.py"):
        own, *_ = path.relative_to(ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "slimmable":
                _, *parts = node.module.split(".")
                for room, *rest in [parts] if parts else [[alias.name] for alias in node.names]:
                    if room != own and own != "__init__":
                        yield path, own, room, rest


def test_no_room_imports_a_private_module_of_another():
    found = [(path.name, room, *rest) for path, _, room, rest in imports() if rest and rest[0].startswith("_")]
    assert found == []


def test_imports_go_one_way():
    edges = {}
    for _, own, room, _ in imports():
        edges.setdefault(own, set()).add(room)
    assert {"cli", "gating", "analysis", "view"} <= edges.keys()
    order = list(TopologicalSorter(edges).static_order())  # raises CycleError for rooms that import each other
    assert order.index("view") < order.index("layers") < order.index("methods") < order.index("cli")
    assert "analysis" not in edges["view"]
    assert not {"view", "layers"} & edges["analysis"]
    assert not {"gating", "methods", "cli"} & edges["_convert"]
    assert "integrations" not in set().union(*edges.values())
