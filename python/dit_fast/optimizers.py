"""How a run was trained: the forward and the adjoint rule of each optimizer, as pure functions on one parameter.

A rule object holds the settings of one parameter group as they were at the start; the log holds every setting of every
group at every step, and the functions here take those (`settings`, a plain dict with "lr" among its keys). A rule keeps
`slots` of state per parameter (momentum buffer; m and v) and counts the updates of that state (`count`, those before the
step), as torch does per parameter. Formulas: design §1; the order of operations is torch's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_fast.errors import UnsupportedError

Settings = Mapping[str, float]
State = tuple[Tensor, ...]

# what torch.nn.utils.clip_grad_norm_ adds to the norm
_CLIP_EPS = 1e-6


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD: stochastic gradient descent with momentum, dampening, Nesterov's rule and weight decay.

        g̃ = g + wd·θ[t],  buf = μ·buf + (1 − τ)·g̃  (buf = g̃ the first time),  θ[t+1] = θ[t] − η·buf  (Nesterov: η·(g̃ + μ·buf))

    weight_decay: wd, the decay of the optimizer: it stays when a sample is removed. A penalty ½·l2·‖θ‖² inside every
        per-sample loss, which leaves with its sample, is `Problem(l2=...)`.
    maximize: −g in place of g.

    The rate η is no setting of the rule: it is given for every step.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    maximize: bool = False

    kind: ClassVar[str] = "SGD"
    setting_names: ClassVar[tuple[str, ...]] = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize")
    # the rule is linear in (θ, state, g): differences of two runs obey it too, and its adjoint needs neither g nor state
    is_linear: ClassVar[bool] = True

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state tensors torch keeps per parameter."""
        return ("momentum_buffer",) if self.momentum else ()

    @staticmethod
    def counted(settings: Settings) -> bool:
        """Whether a step with these settings updates the state."""
        return settings["momentum"] != 0

    @staticmethod
    def forward(theta: Tensor, g: Tensor, state: State, count: int, settings: Settings) -> tuple[Tensor, State]:
        """θ[t+1] and the state after the step, from the clipped batch gradient g; any shape."""
        g = _decayed(theta, g, settings)
        step, momentum = g, settings["momentum"]
        if momentum:
            buffer = momentum * state[0] + (1 - settings["dampening"]) * g if count else g
            step = g + momentum * buffer if settings["nesterov"] else buffer
            state = (buffer,)
        return theta - settings["lr"] * step, state

    @staticmethod
    def adjoint(u: Sequence[Tensor], theta: Tensor, g: Tensor, state: State, count: int, settings: Settings) -> Tensor:
        """The cotangent [K, *shape] of the clipped batch gradient, from u = (u_θ, u_buf) after the step.

        u becomes, in place, the cotangent of (θ, buf) before the step but for H_t c, which the caller adds to u_θ.
        theta, g and state are not used: the rule is linear.
        """
        r, momentum = u[0] * -settings["lr"], settings["momentum"]
        c = r
        if momentum:
            buffer = u[1] + (momentum * r if settings["nesterov"] else r)
            c = (1 - settings["dampening"]) * buffer if count else buffer
            if settings["nesterov"]:
                c = c + r
            u[1].copy_(momentum * buffer if count else torch.zeros_like(buffer))
        return _undecayed(u[0], c, settings)


@dataclass(frozen=True)
class Adam:
    """torch.optim.Adam: with g̃ = g + wd·θ[t], m = β1·m + (1 − β1)·g̃, v = β2·v + (1 − β2)·g̃²,

        θ[t+1] = θ[t] − η/bc1 · m / (√v/√bc2 + eps),   bc1 = 1 − β1ⁿ, bc2 = 1 − β2ⁿ, n the parameter's own step count.

    betas: (β1, β2). weight_decay, maximize: as in SGD. There is no amsgrad.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False

    kind: ClassVar[str] = "Adam"
    setting_names: ClassVar[tuple[str, ...]] = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")
    is_linear: ClassVar[bool] = False
    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    decoupled: ClassVar[bool] = False

    @staticmethod
    def counted(settings: Settings) -> bool:
        """Whether a step with these settings updates the state."""
        return True

    @classmethod
    def forward(cls, theta: Tensor, g: Tensor, state: State, count: int, settings: Settings) -> tuple[Tensor, State]:
        """θ[t+1] and (m, v) after the step, from the clipped batch gradient g; any shape."""
        g = cls._direction(theta, g, settings)
        if cls.decoupled:
            theta = theta * (1 - settings["lr"] * settings["weight_decay"])
        m, v = cls._moments(g, state, settings)
        rate, root = _corrections(count, settings)
        return theta - rate * m / (v.sqrt() / root + settings["eps"]), (m, v)

    @classmethod
    def adjoint(cls, u: Sequence[Tensor], theta: Tensor, g: Tensor, state: State, count: int, settings: Settings) -> Tensor:
        """The cotangent [K, *shape] of the clipped batch gradient g [*shape], from u = (u_θ, u_m, u_v) after the step.

        u becomes, in place, the cotangent of (θ, m, v) before the step but for H_t c, which the caller adds to u_θ.
        theta and state are those before the step.
        """
        beta1, beta2 = settings["beta1"], settings["beta2"]
        g = cls._direction(theta, g, settings)
        m, v = cls._moments(g, state, settings)
        rate, root = _corrections(count, settings)
        deviation = v.sqrt()
        denominator = deviation / root + settings["eps"]
        # û_m = u_m − A u_θ/D;  û_v = u_v + A u_θ m/(2 D² √v √bc2), 0 where v = 0
        u_m = u[1] - u[0] * (rate / denominator)
        slope = rate * m / (2 * denominator.square() * deviation * root)
        u_v = u[2] + u[0] * torch.where(v > 0, slope, 0.0)
        c = (1 - beta1) * u_m + 2 * (1 - beta2) * g * u_v
        u[1].copy_(beta1 * u_m)
        u[2].copy_(beta2 * u_v)
        if cls.decoupled:
            u[0].mul_(1 - settings["lr"] * settings["weight_decay"])
            return -c if settings["maximize"] else c
        return _undecayed(u[0], c, settings)

    @classmethod
    def _direction(cls, theta: Tensor, g: Tensor, settings: Settings) -> Tensor:
        if cls.decoupled:
            return -g if settings["maximize"] else g
        return _decayed(theta, g, settings)

    @staticmethod
    def _moments(g: Tensor, state: State, settings: Settings) -> State:
        m, v = state
        return m + (1 - settings["beta1"]) * (g - m), settings["beta2"] * v + (1 - settings["beta2"]) * g.square()


@dataclass(frozen=True)
class AdamW(Adam):
    """torch.optim.AdamW: as Adam without wd·θ in g̃; θ[t] is first multiplied by 1 − η·wd."""

    weight_decay: float = 0.01

    kind: ClassVar[str] = "AdamW"
    decoupled: ClassVar[bool] = True


Rule = SGD | Adam
RULES: dict[str, type[SGD] | type[Adam]] = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW}


@dataclass(frozen=True)
class Clip:
    """Clipping of the batch gradient between backward() and optimizer.step(), over all logged parameters together.

    norm: torch.nn.utils.clip_grad_norm_(parameters, norm), Euclidean. value: torch.nn.utils.clip_grad_value_.
    """

    norm: float | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("clip_norm", self.norm), ("clip_value", self.value)):
            if limit is not None and not (isinstance(limit, int | float) and limit > 0 and math.isfinite(limit)):
                raise ValueError(f"{name} must be a positive number, got {limit!r}")
        if self.norm is not None and self.value is not None:
            raise ValueError("give clip_norm or clip_value, not both")

    def __bool__(self) -> bool:
        return self.norm is not None or self.value is not None

    def forward(self, gradient: Mapping[str, Tensor], stacked: bool = False) -> dict[str, Tensor]:
        """The clipped gradient; with `stacked`, of each row of [n, *shape] by itself."""
        if self.value is not None:
            return {name: g.clamp(-self.value, self.value) for name, g in gradient.items()}
        if self.norm is None:
            return dict(gradient)
        if not stacked:
            scale = (self.norm / (_norm(gradient) + _CLIP_EPS)).clamp(max=1.0)
            return {name: g * scale for name, g in gradient.items()}
        squares: Tensor = sum(g.flatten(1).square().sum(1) for g in gradient.values())  # type: ignore[assignment]
        scales = (self.norm / (squares.sqrt() + _CLIP_EPS)).clamp(max=1.0)
        return {name: g * scales.view(-1, *[1] * (g.ndim - 1)) for name, g in gradient.items()}

    def adjoint(self, c: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The cotangent [K, *shape] of the raw gradient [*shape] from that of the clipped one."""
        if self.value is not None:
            return {name: block * (gradient[name].abs() < self.value) for name, block in c.items()}
        if self.norm is None:
            return dict(c)
        size = _norm(gradient)
        scale = self.norm / (size + _CLIP_EPS)
        if scale >= 1:
            return dict(c)
        # s c̃ − C/((n+ε)² n)·⟨g, c̃⟩ g
        along: Tensor = sum(block.flatten(1) @ gradient[n].flatten() for n, block in c.items())  # type: ignore[assignment]
        along = along * (scale / ((size + _CLIP_EPS) * size))
        return {n: scale * block - along.view(-1, *[1] * gradient[n].ndim) * gradient[n] for n, block in c.items()}


def from_torch(optimizer: torch.optim.Optimizer) -> tuple[Rule, ...]:
    """The rule of each parameter group of a torch optimizer; UnsupportedError names what is not known exactly."""
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise UnsupportedError(
            f"optimizer {type(optimizer).__module__}.{type(optimizer).__name__} is not supported; "
            "supported: torch.optim.SGD, Adam and AdamW"
        )
    return tuple(_rule(optimizer, group, number) for number, group in enumerate(optimizer.param_groups))


def _rule(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], number: int) -> Rule:
    for name in ("amsgrad", "differentiable"):
        if group.get(name):
            raise UnsupportedError(
                f"torch.optim.{type(optimizer).__name__} with {name}={group[name]} (parameter group {number}) is not supported"
            )
    decay, maximize = float(group["weight_decay"]), bool(group["maximize"])
    if isinstance(optimizer, torch.optim.SGD):
        return SGD(float(group["momentum"]), float(group["dampening"]), bool(group["nesterov"]), decay, maximize)
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    kind = AdamW if decoupled else Adam
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return kind((beta1, beta2), float(group["eps"]), decay, maximize)


def group_settings(optimizer: torch.optim.Optimizer, rules: Sequence[Rule]) -> list[list[float]]:
    """The settings of every group as they are now, in the order of `setting_names`: [groups][settings]."""
    return [
        [_setting(group, name) for name in rule.setting_names]
        for group, rule in zip(optimizer.param_groups, rules, strict=True)
    ]


def constant_settings(rule: Rule, lr: float) -> list[float]:
    """The settings of a group whose rate is `lr` and whose others are the rule's own."""
    return [lr if name == "lr" else _setting(asdict(rule), name) for name in rule.setting_names]


def _setting(group: Mapping[str, Any], name: str) -> float:
    if name in ("beta1", "beta2"):
        return float(group["betas"][0 if name == "beta1" else 1])
    return float(group[name])


def slots_of(rules: Sequence[Rule]) -> tuple[str, ...]:
    """The state tensors the log keeps per parameter: those of the group that has most."""
    return max((rule.slots for rule in rules), key=len)


def to_json(rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """For the manifest: kind and starting settings of every group."""
    return [{"kind": rule.kind} | asdict(rule) for rule in rules]


def from_json(data: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """The inverse of `to_json`; UnsupportedError for a kind this version does not know."""
    rules = []
    for group in data:
        if group["kind"] not in RULES:
            raise UnsupportedError(f"the log was trained with {group['kind']}, which this version of dit_fast does not know")
        rule = RULES[group["kind"]]
        values = {field.name: group[field.name] for field in fields(rule)}
        rules.append(rule(**values | ({"betas": tuple(values["betas"])} if "betas" in values else {})))
    if len({rule.setting_names for rule in rules}) != 1:
        raise ValueError("the optimizer's groups are of different kinds")
    return tuple(rules)


def _decayed(theta: Tensor, g: Tensor, settings: Settings) -> Tensor:
    """±g + wd·θ."""
    if settings["maximize"]:
        g = -g
    return g + settings["weight_decay"] * theta if settings["weight_decay"] else g


def _undecayed(u: Tensor, c: Tensor, settings: Settings) -> Tensor:
    """The adjoint of `_decayed`: adds to u_θ, returns the cotangent of g."""
    if settings["weight_decay"]:
        u.add_(c, alpha=settings["weight_decay"])
    return -c if settings["maximize"] else c


def _corrections(count: int, settings: Settings) -> tuple[float, float]:
    """A = η/bc1 and √bc2 of the step that makes `count` + 1."""
    return settings["lr"] / (1 - settings["beta1"] ** (count + 1)), math.sqrt(1 - settings["beta2"] ** (count + 1))


def _norm(gradient: Mapping[str, Tensor]) -> Tensor:
    squares: Tensor = sum(g.square().sum() for g in gradient.values())  # type: ignore[assignment]
    return squares.sqrt()
