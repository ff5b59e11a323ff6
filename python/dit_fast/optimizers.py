"""How a run was trained: the forward and the adjoint rule of each optimizer, as pure functions on one parameter.

A rule object holds the settings of one parameter group as they were at the start; the log holds every setting of every
group at every step, and the functions here take those (`settings`, a plain dict with "lr" among its keys).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_fast.errors import UnsupportedError

Settings = Mapping[str, float]


@dataclass(frozen=True)
class SGD:
    """Plain stochastic gradient descent, θ[t+1] = θ[t] − η (g + wd·θ[t]) (torch.optim.SGD without momentum).

    weight_decay: wd, the decay of the optimizer: it stays when a sample is removed. A penalty ½·l2·‖θ‖² inside every
        per-sample loss, which leaves with its sample, is `Problem(l2=...)`.
    """

    weight_decay: float = 0.0

    kind: ClassVar[str] = "SGD"
    setting_names: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")

    @staticmethod
    def forward(parameter: Tensor, gradient: Tensor, settings: Settings) -> Tensor:
        """θ[t+1] from θ[t] and the raw batch gradient g_t, any shape."""
        return parameter - settings["lr"] * (gradient + settings["weight_decay"] * parameter)

    @staticmethod
    def adjoint(block: Tensor, settings: Settings) -> Tensor:
        """The cotangent c [K, *shape] of the raw batch gradient, from u = `block` [K, *shape], which becomes u' in place.

        c = −η u and u' = u + wd·c (design §1); the caller then adds H_t c.
        """
        cotangent = block * -settings["lr"]
        if settings["weight_decay"]:
            block.add_(cotangent, alpha=settings["weight_decay"])
        return cotangent


RULES: dict[str, type[SGD]] = {rule.kind: rule for rule in (SGD,)}


def from_torch(optimizer: torch.optim.Optimizer) -> tuple[SGD, ...]:
    """The rule of each parameter group of a torch optimizer; UnsupportedError names what is not known exactly."""
    if type(optimizer) is not torch.optim.SGD:
        raise UnsupportedError(
            f"optimizer {type(optimizer).__module__}.{type(optimizer).__name__} is not supported; "
            "supported: torch.optim.SGD without momentum"
        )
    return tuple(_sgd_rule(group, number) for number, group in enumerate(optimizer.param_groups))


def _sgd_rule(group: Mapping[str, Any], number: int) -> SGD:
    for name in ("momentum", "nesterov", "maximize", "differentiable"):
        if group.get(name):
            raise UnsupportedError(f"torch.optim.SGD with {name}={group[name]} (parameter group {number}) is not supported")
    return SGD(weight_decay=float(group["weight_decay"]))


def group_settings(optimizer: torch.optim.Optimizer, rules: tuple[SGD, ...]) -> list[list[float]]:
    """The settings of every group as they are now, in the order of `setting_names`: [groups][settings]."""
    return [
        [float(group[name]) for name in rule.setting_names] for group, rule in zip(optimizer.param_groups, rules, strict=True)
    ]


def to_json(rules: tuple[SGD, ...]) -> dict[str, Any]:
    """For the manifest: the kind once, the starting settings per group."""
    return {"kind": rules[0].kind, "groups": [asdict(rule) for rule in rules]}


def from_json(data: Mapping[str, Any]) -> tuple[SGD, ...]:
    """The inverse of `to_json`; UnsupportedError for a kind this version does not know."""
    if data["kind"] not in RULES:
        raise UnsupportedError(f"the log was trained with {data['kind']}, which this version of dit_fast does not know")
    return tuple(RULES[data["kind"]](**settings) for settings in data["groups"])
