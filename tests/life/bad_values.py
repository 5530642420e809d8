"""Bad values for each kind of argument, beside a good one: the generators of the table in `test_bad_calls.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Thing:
    """An object that is nothing that any function takes."""

    def __repr__(self) -> str:
        return "Thing()"


@dataclass(frozen=True)
class Argument:
    """A good value, made anew at each call, and what is wrong with bad ones, which may be made from the good one."""

    good: Callable[[], Any]
    bad: Mapping[str, Any]
    fine: Mapping[str, str] = field(default_factory=dict)  # label -> why such a value is no mistake here

    def but(self, **fine: str) -> Argument:
        """The same argument, for which some of the bad values are good ones; each with the reason."""
        labels = {label.replace("_", " "): why for label, why in fine.items()}
        unknown = labels.keys() - self.bad.keys()
        assert not unknown, f"no such bad value: {unknown}"
        kept = {label: value for label, value in self.bad.items() if label not in labels}
        return Argument(self.good, kept, {**self.fine, **labels})

    def optional(self) -> Argument:
        return self.but(none="it is the default, or means that there is none")

    def values(self) -> dict[str, Callable[[], Any]]:
        """Label -> a function that makes the bad value."""
        return {label: _maker(self.good, value) for label, value in self.bad.items()}


class Of:
    """A bad value that is made from the good one."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change


def _maker(good: Callable[[], Any], value: Any) -> Callable[[], Any]:
    return (lambda: value.change(good())) if isinstance(value, Of) else (lambda: value)


def anything(good: Callable[[], Any] | Any, why: str) -> Argument:
    """An argument of which every value is a good one."""
    return Argument(good if callable(good) else lambda: good, {}, {"all": why})


WRONG = {"none": None, "text": "three", "object": Thing(), "list": [], "dict": {}, "class": int}
NUMBERS = {"negative": -1, "fractional": 1.5, "true": True, "nan": math.nan, "infinite": math.inf, "huge": 10**30}


def number(good: float, **bad: Any) -> Argument:
    given = {**WRONG, "zero": 0, **NUMBERS, "complex": 1j, "tensor": torch.tensor([1.0, 2.0]), **bad}
    return Argument(lambda: good, given)


def count(good: int) -> Argument:
    return number(good)


def natural(good: int) -> Argument:
    return number(good).but(zero="nothing of it is meant")


def positive(good: float) -> Argument:
    return number(good).but(fractional="a number like another", huge="a number like another")


def not_negative(good: float) -> Argument:
    return positive(good).but(zero="it turns the term off")


def real(good: float) -> Argument:
    """Any finite number."""
    return not_negative(good).but(negative="a number like another")


def fraction(good: float) -> Argument:
    return number(good).but(zero="one end of the range")


def open_fraction(good: float) -> Argument:
    return number(good, one=1.0)


def flag(good: bool = False) -> Argument:
    numbers = {label: value for label, value in NUMBERS.items() if label != "true"}
    return Argument(lambda: good, {**WRONG, "two": 2, **numbers, "tensor": torch.tensor([True, False])})


def choice(good: str) -> Argument:
    return Argument(lambda: good, {**WRONG, **NUMBERS, "empty": "", "zero": 0})


def function(good: Callable[..., Any]) -> Argument:
    bad = {**WRONG, **NUMBERS}
    del bad["class"]
    return Argument(lambda: good, bad)


def mapping(good: Callable[[], Any], **bad: Any) -> Argument:
    return Argument(good, {**WRONG, **NUMBERS, **bad})


def path(good: Callable[[], Any]) -> Argument:
    bad = {**WRONG, **NUMBERS, "zero byte": "model\0.safetensors", "long": "m" * 300, "empty": ""}
    del bad["text"]
    return Argument(good, bad)


def module(good: Callable[[], nn.Module]) -> Argument:
    return Argument(good, {**WRONG, **NUMBERS, "module class": nn.Linear, "tensor": torch.zeros(2)})


def slim(good: Callable[[], nn.Module]) -> Argument:
    """A model with widths."""
    plain = Of(lambda model: nn.Linear(4, 2))
    return Argument(good, {**module(good).bad, "plain": plain, "no parameters": nn.Identity()})


def widths(good: tuple[float, ...] = (1.0, 0.5)) -> Argument:
    bad = {
        **WRONG,
        **NUMBERS,
        **{f"with {label}": (1.0, value) for label, value in {**WRONG, **NUMBERS, "zero": 0}.items()},
        "twice": (1.0, 0.5, 0.5),
        "without the full one": (0.5, 0.25),
        "one number": 0.5,
    }
    return Argument(lambda: good, bad)


def setting() -> Argument:
    """A width of a model with the widths 1 and 0.5."""
    bad = {**WRONG, **NUMBERS, "zero": 0, "unknown": 0.3, "counts": (99,), "pattern": {"no": 1}}
    return Argument(lambda: 0.5, bad).but(dict="no layer is said to be narrower")


def tensor(good: Callable[[], Tensor], **bad: Any) -> Argument:
    changed = {
        "empty": Of(lambda x: x[:0]),
        "bytes": Of(lambda x: x.to(torch.uint8)),
        "integers": Of(lambda x: x.to(torch.int64)),
        "complex": Of(lambda x: x.to(torch.complex64)),
        "meta": Of(lambda x: x.to("meta")),
        "an axis more": Of(lambda x: x[None]),
        "an axis less": Of(lambda x: x[0]),
        "a row less": Of(lambda x: x[:-1]),
        "array": Of(lambda x: x.detach().numpy()),
        "nested lists": Of(lambda x: x.tolist()),
    }
    return Argument(good, {**WRONG, **NUMBERS, **changed, **bad})


def features(good: Callable[[], Tensor]) -> Argument:
    """Features that are measured, which must be finite."""
    changed = {
        "holding nan": Of(lambda x: torch.cat([x[:1] * math.nan, x[1:]])),
        "holding infinity": Of(lambda x: torch.cat([x[:1] + math.inf, x[1:]])),
    }
    return tensor(good, **changed)


def labels(good: Callable[[], Tensor]) -> Argument:
    changed = {
        "floats": Of(lambda x: x.float()),
        "booleans": Of(lambda x: x > 0),
        "below zero": Of(lambda x: x - 10),
        "one number": Of(lambda x: torch.tensor(1)),
    }
    alike = "class numbers of any integer type"
    return tensor(good, **changed).but(bytes=alike, integers=alike)


def maps_of(make: Callable[[Callable[[], Tensor]], Argument], good: Callable[[], dict[float, Tensor]]) -> Argument:
    """A mapping of widths to tensors: each tensor's bad values at the narrow width, and bad mappings."""
    inner = make(lambda: good()[0.5])
    bad: dict[str, Any] = {**WRONG, **NUMBERS}
    bad["without the full width"] = Of(lambda features: {0.5: features[0.5]})
    bad["names for widths"] = Of(lambda features: {"wide": features[1.0], "narrow": features[0.5]})
    for label, value in inner.bad.items():
        changed = _maker(inner.good, value)
        bad[f"narrow: {label}"] = Of(lambda features, changed=changed: {**features, 0.5: changed()})
        full = value.change if isinstance(value, Of) else (lambda part, value=value: value)
        bad[f"wide: {label}"] = Of(lambda features, full=full: {**features, 1.0: full(features[1.0])})
    return Argument(good, bad)


def listed(inner: Argument, count: int = 2, **bad: Any) -> Argument:
    """A list of such arguments, one of which is bad, and values that are no lists of them."""
    made: dict[str, Any] = {**WRONG, **NUMBERS}
    for label, value in inner.values().items():
        made[f"one: {label}"] = Of(lambda good, value=value: [*good[:-1], value()])
    return Argument(lambda: [inner.good() for _ in range(count)], {**made, **bad})


def batches(good: Callable[[], Tensor]) -> Argument:
    """A loader of batches for a model."""
    bad = {
        "tensor": Of(lambda loader: loader[0]),
        "batch of text": ["three"],
        "batch of nothing": [None],
        "batch of numbers": [3],
        "batch as a dict": Of(lambda loader: [{"image": loader[0]}]),
        "batch of arrays": Of(lambda loader: [loader[0].numpy()]),
        "empty batch": Of(lambda loader: [loader[0][:0]]),
        "batch of bytes": Of(lambda loader: [loader[0].to(torch.uint8)]),
        "batch of integers": Of(lambda loader: [loader[0].long()]),
        "complex batch": Of(lambda loader: [loader[0].to(torch.complex64)]),
        "batch without numbers": Of(lambda loader: [loader[0].to("meta")]),
        "batch of another size": Of(lambda loader: [loader[0][:, :-1]]),
        "scalar batch": [torch.tensor(1.0)],
    }
    return Argument(lambda: [good()], {**WRONG, **NUMBERS, **bad})
