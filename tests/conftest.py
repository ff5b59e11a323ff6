"""Fixtures shared by all tests."""

import os
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn. Without a usable GPU the cuda case is skipped with its reason, or fails where one is required."""
    if request.param == "cuda":
        reason = cuda_missing()
        if reason and os.environ.get("DIT_FAST_REQUIRE_CUDA") == "1":
            pytest.fail(f"DIT_FAST_REQUIRE_CUDA=1, but {reason}")
        if reason:
            pytest.skip(f"CUDA NOT TESTED: {reason}")
    return request.param


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*arguments) → (exit status, stdout, stderr) of `dit-fast`."""

    from dit_fast import cli

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dit-fast", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return call


def cuda_missing() -> str:
    """Why CUDA cannot be tested here; empty where it can."""
    from dit_fast import ops

    if not ops.build_info()["cuda_compiled"]:
        return "the CUDA part of dit_fast is not compiled"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return ""


def data_file(name: str) -> Path:
    """A file of the real data sets, in the folder DIT_FAST_DATA or beside the checkout; skips, loudly, where it is absent."""
    folder = Path(os.environ.get("DIT_FAST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / name).is_file():
        pytest.skip(f"DATA NOT TESTED: {name} is not in {folder}; name its folder in DIT_FAST_DATA")
    return folder / name
