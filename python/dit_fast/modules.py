"""What dit_fast asks of a torch module: the module under its wrappers, its trainable parameters, what it refuses."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dit_fast.errors import UnsupportedError


def inner_module(model: nn.Module) -> nn.Module:
    """The user's module under DataParallel, DistributedDataParallel and torch.compile, whose names the log uses."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def data_parallel_wrapper(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel among the wrappers that `inner_module` takes off."""
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model.module if isinstance(model, nn.DataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile is among the wrappers."""
    while not hasattr(model, "_orig_mod"):
        if not isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return False
        model = model.module
    return True


def refuse_sharded(model: nn.Module) -> None:
    """Raise UnsupportedError for models whose parameters are spread over processes; by name, so that nothing is imported."""
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__} & {"FullyShardedDataParallel", "FSDPModule"}
        if kinds:
            raise UnsupportedError(
                f"module '{name}' is sharded by FSDP ({kinds.pop()}): no process holds its parameters whole; "
                "use DistributedDataParallel"
            )
    for name, p in model.named_parameters():
        if type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor":
            raise UnsupportedError(f"parameter '{name}' is a DTensor, spread over processes; use DistributedDataParallel")


def trainable_parameters(model: nn.Module, optimized: Iterable[torch.Tensor] | None = None) -> dict[str, nn.Parameter]:
    """name → parameter, tied parameters once under their first name; only those in `optimized` where it is given."""
    wanted = None if optimized is None else {id(p) for p in optimized}
    named = inner_module(model).named_parameters()
    return {name: p for name, p in named if p.requires_grad and (wanted is None or id(p) in wanted)}


def tensor_places(model: nn.Module) -> dict[str, list[tuple[Any, str]]]:
    """name → the dicts that hold this parameter or buffer, with its key in each: several where it is tied, under its first
    name (a parameter's, where a buffer is tied to one)."""
    names: dict[int, str] = {}
    places: dict[str, list[tuple[Any, str]]] = {}
    named = list(model.named_modules())
    for kind in ("_parameters", "_buffers"):
        for prefix, module in named:
            tensors = getattr(module, kind)
            for key, tensor in tensors.items():
                if tensor is not None:
                    name = names.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                    places.setdefault(name, []).append((tensors, key))
    return places


def training_flags(model: nn.Module) -> dict[str, bool]:
    """module name → its `training` flag, "" for the module itself."""
    return {name: module.training for name, module in inner_module(model).named_modules()}


def set_training_flags(model: nn.Module, flags: dict[str, bool]) -> None:
    """Put back what `training_flags` returned; modules it does not name keep theirs."""
    for name, module in inner_module(model).named_modules():
        if flags.get(name, module.training) != module.training:
            module.training = flags[name]


def has_active_dropout(model: nn.Module) -> bool:
    """Whether a module drops at random with the training flags as they are."""
    return any(module.training and _dropout_rate(module) > 0 for module in inner_module(model).modules())


def refuse_unsupported(model: nn.Module, masks_are_logged: bool = False) -> None:
    """Raise UnsupportedError for modules whose per-sample loss depends on the rest of the batch or on chance.

    Called with the flags of training set: batch normalization and dropout are fine in eval mode.
    """
    for name, module in inner_module(model).named_modules():
        if not module.training:
            continue
        where = f"{type(module).__name__} '{name}'"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedError(
                f"{where} is in train mode: it couples the samples of a batch, so a single sample has no loss of its "
                "own; use GroupNorm or LayerNorm, or train with this module in eval mode"
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise UnsupportedError(f"{where} updates running statistics in train mode; use track_running_stats=False")
        if _dropout_rate(module) > 0 and not masks_are_logged:
            raise UnsupportedError(
                f"{where} drops at random in train mode and its masks are not in the log; "
                "set its rate to 0 or train with this module in eval mode"
            )


def _dropout_rate(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return float(module.p)
    if isinstance(module, nn.RNNBase):
        return float(module.dropout) if module.num_layers > 1 else 0.0
    if isinstance(module, nn.MultiheadAttention):
        return float(module.dropout)
    return 0.0


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes, by which a log knows parameters that were not trained."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + flat.numpy().tobytes()).hexdigest()
