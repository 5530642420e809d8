"""The list of models outside timm, by library."""

from __future__ import annotations

from importlib import import_module

from benchmarks.other_models.entry import Entry

LIBRARIES = (
    *("hugging_face", "generators", "segmentation", "graphs", "einops_style", "vision"),
    *("medical", "clip", "transformer_options", "detection", "sound", "video"),
)


def listed() -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the entries by key, and the versions of the libraries that are installed."""
    found: dict[str, Entry] = {}
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            library = import_module(f"benchmarks.other_models.{name}")
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")
            continue
        versions |= [library.version()]
        for entry in library.entries():
            assert entry.key not in found, entry.key
            found[entry.key] = entry
    return found, versions
