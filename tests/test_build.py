"""What the compiled core is made of, and what it must never be made of."""

import importlib.machinery
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_fast import _C, ops

ROOT = Path(__file__).parents[1]


def test_build_info():
    info = ops.build_info()
    assert set(info) == {
        *("version", "compiler", "openmp", "blas", "cuda_compiled", "cuda_compiler"),
        *("cuda_architectures", "cuda_available", "torch"),
    }
    assert re.match(r"\d+\.\d+", info["version"])
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert info["torch"] == torch.__version__
    assert bool(info["cuda_architectures"]) == info["cuda_compiled"] == (info["cuda_compiler"] is not None)


def test_blas_comes_from_torch_and_can_be_switched_off():
    # a torch that no longer exports its BLAS should be noticed here, not as a slow release
    assert ops.build_info()["blas"] == "libtorch_cpu.so sgemm_/dgemm_"
    assert ops.use_blas(False) is False
    assert ops.build_info()["blas"] == "built-in"
    assert ops.use_blas(True) is True


def test_core_works_without_torch():
    code = (
        "import importlib.machinery as m, importlib.util as u\n"
        f"loader = m.ExtensionFileLoader('_C', {_C.__file__!r})\n"
        "core = u.module_from_spec(u.spec_from_loader('_C', loader)); loader.exec_module(core)\n"
        "import sys; assert 'torch' not in sys.modules\n"
        "import array; d, x, u, g = (array.array('d', v) for v in ([0], [2, 3], [5, 7], [10]))\n"
        "at = lambda a: (a.buffer_info()[0], (0, 0, 0))\n"
        "core.grad_dot_cpu(True, 1, (at(d), (1, 1)), [((1, at(g), at(x)), ((1, 2), at(u), (0, (0, 0, 0))))], 1)\n"
        "print(core.blas_name(), d[0])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment())
    assert out.stdout.split() == ["built-in", "310.0"], out.stderr


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ldd is a Linux tool")
def test_core_links_no_torch_and_no_cuda_library():
    assert _C.__file__.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
    linked = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in linked
    assert not re.search(r"torch|libc10|libcuda|libpython", linked), linked


@pytest.mark.parametrize("op", ["grad_dot", "lowrank_update", "update_dot"])
def test_every_op_has_all_its_parts(op):
    for part in (f"csrc/{op}.h", f"csrc/cpu/{op}.cpp", f"csrc/cuda/{op}.cu", f"tests/test_ops_{op}.py"):
        assert (ROOT / part).is_file(), part
    assert op in (ROOT / "bench" / "bench_ops.py").read_text("utf-8")
    from dit_fast import ops_torch

    for name in (op, f"{op}_layers"):
        assert getattr(ops, name).__annotations__ == getattr(ops_torch, name).__annotations__


def test_cuda_tensors_on_a_cpu_build_say_how_to_rebuild(monkeypatch):
    class Core:
        cuda_compiled = False

    class OnCuda:
        dtype = torch.float32
        device = torch.device("cuda", 0)

    monkeypatch.setattr(ops, "_C", Core)
    with pytest.raises(RuntimeError, match=r"built for the CPU alone.*DIT_FAST_CUDA=ON"):
        ops._launch("grad_dot", OnCuda)
