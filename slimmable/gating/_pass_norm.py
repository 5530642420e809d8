"""Norms of their own for the gated pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from slimmable.errors import UsageError
from slimmable.gating._pass import Pass
from slimmable.view.container import inner_modules
from slimmable.view.cuts import take_channels
from slimmable.view.narrow import copy_of_norm, own_norm
from slimmable.view.norms import SwitchableNorm
from slimmable.view.recompute import Active


class PassNorm(SwitchableNorm):
    """A `SwitchableNorm` with more norms for the gated pass, one per width; in the state dict `bn.gated.0` and so on.

    A checkpoint without them loads into both passes' norms.

    Source: the separate batch norms of Krishna et al. 2023.
    """

    @staticmethod
    def of(norm: nn.Module, widths: int) -> PassNorm:
        """Turn a norm, switchable or not, into one with norms for the gated pass too, which start as copies.

        They are for the first `widths` of its widths; those that `calibrate_bn` added run dense.

        A switchable norm is changed in place, any other is put inside of a new one.
        """
        own = norm if isinstance(norm, SwitchableNorm) else SwitchableNorm(norm, (1.0,), (None,))
        copies = [copy_of_norm(own_norm(own.norm_at(index))) for index in range(min(widths, 1 + len(own.narrow)))]
        own.__dict__["inside"] = own is not norm
        own.__dict__["state"] = Active(Pass.DENSE)
        own.__class__ = PassNorm
        own.add_module("gated", nn.ModuleList(copies))
        own._modules["gated"].training = own.training  # type: ignore[union-attr]
        return cast(PassNorm, own)

    def without(self) -> nn.Module:
        """Undo `of`: the norm, switchable or not, that there was."""
        del self._modules["gated"], self.__dict__["state"]
        self.__class__ = SwitchableNorm  # type: ignore[assignment]
        return self.full if self.__dict__.pop("inside") else self

    def of_gated_pass(self, index: int) -> nn.Module:
        """Return the gated pass's norm of the width with this index.

        Raises: UsageError: if the width has none.
        """
        gated = inner_modules(self, "gated")
        if str(index) not in gated:
            raise UsageError(f"the active width {self._slim.active.width} has no norm for the gated pass")
        return gated[str(index)]

    def norm_at(self, index: int) -> nn.Module:
        """Return the norm of the width with this index, of the pass that runs."""
        if self.__dict__["state"].active is Pass.DENSE:
            return super().norm_at(index)
        return self.of_gated_pass(index)

    module_at = norm_at

    def norms(self) -> Iterator[nn.Module]:
        """Yield the norms of all widths and of both passes."""
        yield from super().norms()
        yield from inner_modules(self, "gated").values()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """List the gated pass's norms last."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        gated = cast(nn.Module, self._modules["gated"])
        yield from gated.named_modules(memo, f"{prefix}.gated" if prefix else "gated", remove_duplicate)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Save the gated pass's norms under `gated`."""
        found = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        gated = cast(nn.Module, self._modules["gated"])
        return gated.state_dict(destination=found, prefix=f"{prefix}gated.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *reports: list[str]
    ) -> None:
        own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(f"{prefix}gated.")}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)
        state_dict.update(own or self._from_dense(state_dict, prefix))

    def _from_dense(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
        """Take what a checkpoint has for the dense pass; a narrow norm that shares gain and bias takes the full's."""
        found = {}
        for index, norm in enumerate(cast(nn.ModuleList, self._modules["gated"])):
            dense = f"{prefix}full." if index == 0 else f"{prefix}narrow.{index - 1}."
            for key, tensor in norm.state_dict(keep_vars=True).items():
                given = state_dict.get(f"{dense}{key}", state_dict.get(f"{prefix}full.{key}"))
                if given is not None:
                    part = given if given.shape == tensor.shape else take_channels(given, self._kept[index])
                    found[f"{prefix}gated.{index}.{key}"] = part.clone()
        return found
