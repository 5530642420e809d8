"""BatchNorms with separate statistics, gain and bias for the dense and the gated pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from slimmable.errors import UsageError
from slimmable.gating._layer_gates import Pass
from slimmable.view.container import inner_modules
from slimmable.view.cuts import take_channels
from slimmable.view.norms import SwitchableNorm
from slimmable.view.recompute import Active


class PassNorm(SwitchableNorm):
    """A `SwitchableNorm` with further norms for the gated pass, one per width: `gated.0` and so on in the state dict.

    A checkpoint without them loads into the norms of both passes.

    Source: the separate batch norms of Krishna et al. 2023.
    """

    active_pass: Active[Pass]
    gated: nn.ModuleList

    @staticmethod
    def of(norm: nn.Module, widths: int) -> PassNorm:
        """Give a norm, switchable or not, norms for the gated pass, which start as copies.

        Only the first `widths` widths get them; those that `calibrate_bn` added run dense. A switchable norm is changed
        in place, any other is put inside a new one.
        """
        own = norm if isinstance(norm, SwitchableNorm) else SwitchableNorm(norm, (1.0,), (None,))
        copies = [own.copy_at(index) for index in range(min(widths, 1 + len(own.narrow)))]
        own.__dict__["inside"] = own is not norm
        own.__dict__["active_pass"] = Active(Pass.DENSE)
        own.__class__ = PassNorm
        own.add_module("gated", nn.ModuleList(copies))
        own.gated.training = own.training
        return cast(PassNorm, own)

    def without(self) -> nn.Module:
        """Undo `of`: return the original norm, switchable or not."""
        del self._modules["gated"], self.__dict__["active_pass"]
        self.__class__ = SwitchableNorm  # type: ignore[assignment]
        return self.full if self.__dict__.pop("inside") else self

    def of_gated_pass(self, index: int) -> nn.Module:
        """Return the gated pass's norm of the width with this index.

        Raises: UsageError: if the width has none.
        """
        norms = inner_modules(self, "gated")
        if str(index) not in norms:
            raise UsageError(f"the active width {self._slim.active.width} has no norm for the gated pass")
        return norms[str(index)]

    def norm_at(self, index: int) -> nn.Module:
        """Return the active pass's norm of the width with this index."""
        if self.__dict__["active_pass"].active is Pass.DENSE:
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
        """Yield the gated pass's norms last."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        yield from self.gated.named_modules(memo, f"{prefix}.gated" if prefix else "gated", remove_duplicate)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Save the gated pass's norms under `gated`."""
        found = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.gated.state_dict(destination=found, prefix=f"{prefix}gated.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *reports: list[str]
    ) -> None:
        own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(f"{prefix}gated.")}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)
        state_dict.update(own or self._from_dense(state_dict, prefix))

    def _from_dense(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
        """Return the dense pass's entries for the gated pass; narrow norms without an entry use the full norm's."""
        found = {}
        for index, norm in enumerate(self.gated):
            dense = f"{prefix}full." if index == 0 else f"{prefix}narrow.{index - 1}."
            for key, tensor in norm.state_dict(keep_vars=True).items():
                given = state_dict.get(f"{dense}{key}", state_dict.get(f"{prefix}full.{key}"))
                if given is not None:
                    part = given if given.shape == tensor.shape else take_channels(given, self._kept[index])
                    found[f"{prefix}gated.{index}.{key}"] = part.clone()
        return found
