"""Plain-torch twins of dit_fast.ops: the same names, arguments and results, in a few lines that can be read at once."""

import torch
from torch import Tensor


def grad_dot(dots: Tensor, delta: Tensor, activations: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """dots[k,b] += Σ_s ( Σ_o Σ_i δ[b,s,o] U[k,o,i] a[b,s,i] + Σ_o δ[b,s,o] v[k,o] ), all of it in double.

    Shapes, dtypes and errors: dit_fast.ops.grad_dot.
    """
    delta = delta.double()
    dots += torch.einsum("bso,koi,bsi->kb", delta, weight.double(), activations.double())
    if bias is not None:
        dots += torch.einsum("bso,ko->kb", delta, bias.double())


def lowrank_update(weight: Tensor, bias: Tensor | None, coefficients: Tensor, delta: Tensor, activations: Tensor) -> None:
    """U[k,o,i] += Σ_b c[k,b] Σ_s δ[b,s,o] a[b,s,i] and v[k,o] += Σ_b c[k,b] Σ_s δ[b,s,o], summed in double.

    Shapes, dtypes and errors: dit_fast.ops.lowrank_update.
    """
    delta = delta.double()
    weight += torch.einsum("kb,bso,bsi->koi", coefficients, delta, activations.double()).to(weight.dtype)
    if bias is not None:
        bias += torch.einsum("kb,bso->ko", coefficients, delta).to(bias.dtype)
