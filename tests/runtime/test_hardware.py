"""Which device and precision PyTorch will choose, and a GPU that its build cannot use, told without importing it."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest
import torch

from fedmoe.runtime.device import choose_device, choose_dtype
from fedmoe.runtime.hardware import (
    CUDA_INDEX,
    Gpu,
    expected_device,
    expected_dtype,
    nvidia_gpus,
    torch_cuda,
    unused_gpu,
)

H200 = Gpu("NVIDIA H200", 143_771 << 20, 143_000 << 20, 9.0)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, first on the PATH."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 143000, 9.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


def test_gpus_are_those_that_the_driver_shows(nvidia_smi: Path) -> None:
    assert nvidia_gpus() == [H200]


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_is_none(hidden: str, nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert nvidia_gpus() == []


@pytest.mark.parametrize("script", ["exit 9", "echo no devices were found", "echo NVIDIA T4, [N/A], [N/A], 7.5"])
def test_a_driver_that_fails_shows_no_gpu(script: str, nvidia_smi: Path) -> None:
    nvidia_smi.write_text(f"#!/bin/sh\n{script}\n")
    assert nvidia_gpus() == []


def test_a_machine_without_the_program_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_gpus() == []


def test_the_build_of_torch_is_read_from_its_files() -> None:
    assert torch_cuda() == (torch.version.cuda or "")


def test_a_cpu_build_beside_a_gpu_is_told_with_the_command_that_helps() -> None:
    said = unused_gpu([H200], "")
    version = importlib.metadata.version("torch").partition("+")[0]
    assert said is not None
    assert said.startswith("torch is a CPU build but this machine has an NVIDIA GPU: NVIDIA H200; ")
    assert said.endswith(f"pip install --force-reinstall torch=={version} --index-url {CUDA_INDEX}")
    assert unused_gpu([H200], "13.0") is unused_gpu([], "") is unused_gpu([H200], None) is None


def test_what_is_expected_here_is_what_torch_chooses() -> None:
    device = expected_device("auto", nvidia_gpus(), torch_cuda())
    chosen = choose_device("auto")
    assert device == chosen.type
    assert (
        expected_dtype("auto", device, nvidia_gpus())
        == {
            torch.bfloat16: "bf16",
            torch.float16: "fp16",
            torch.float32: "fp32",
        }[choose_dtype("auto", chosen)]
    )


def test_a_gpu_is_used_by_a_cuda_build_in_the_precision_that_it_has() -> None:
    old = Gpu("Tesla T4", 16 << 30, 15 << 30, 7.5)
    assert expected_device("auto", [H200], "13.0") == "cuda"
    assert expected_device("cuda:1", [H200], "13.0") == "cuda:1"
    assert [expected_dtype("auto", "cuda", [gpu]) for gpu in (H200, old)] == ["bf16", "fp16"]
    assert expected_dtype("fp32", "cuda", [H200]) == "fp32"
