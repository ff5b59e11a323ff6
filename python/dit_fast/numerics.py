"""Torch's global settings during dit_fast's own work: full precision, math attention, the user's state put back."""

import resource
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

_PRECISION = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 or bfloat16 inside float32 matrix products and convolutions, no autocast, and back as it was."""
    backends = [_backend(name) for name in _PRECISION]
    before = [backend.fp32_precision for backend in backends]
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.fp32_precision = value


@contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Only kernels that can be differentiated twice: attention as plain matrix products, recurrent nets without cuDNN."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    fastpath = torch.backends.mha.get_fastpath_enabled()
    cudnn = torch.backends.cudnn.enabled
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), warnings.catch_warnings():
        # vmap says so when it falls back to a loop inside one operation: slower, never wrong
        warnings.filterwarnings("ignore", message=".*performance drop.*batching rule.*")
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            torch.backends.cudnn.enabled = cudnn and not recurrent
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.backends.cudnn.enabled = cudnn


@contextmanager
def preserved_state(dtype: torch.dtype) -> Iterator[None]:
    """`dtype` as torch's default inside; the default dtype and every random generator put back afterwards."""
    default = torch.get_default_dtype()
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(default)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU so far, or the most this process had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _backend(name: str) -> Any:
    found: Any = torch.backends
    for part in name.split("."):
        found = getattr(found, part)
    return found
