from pathlib import Path

import pytest
import torch

from fedmoe.runtime.device import (
    DeviceError,
    LossScale,
    autocast,
    choose_device,
    choose_dtype,
    cpu_has_bf16,
    pin_threads,
)

CPU = torch.device("cpu")


def test_a_device_that_is_absent_is_an_error_and_never_the_cpu() -> None:
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(DeviceError, match=r"asked for.*sees \d+ CUDA devices"):
        choose_device(absent)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1", "cuda:-1", ""])
def test_an_unknown_device_is_an_error(name: str) -> None:
    with pytest.raises(DeviceError, match="unknown device"):
        choose_device(name)


def test_auto_takes_the_cpu_when_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU


def test_local_rank_chooses_among_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("auto", local_rank=3) == torch.device("cuda", 3)
    assert choose_device("cuda:1", local_rank=3) == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_dtype_on_cpu_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert choose_dtype("auto", CPU) == dtype


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="Linux tells the processor's flags here")
@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="there is only one answer to compare")
def test_an_older_pytorch_gives_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = cpu_has_bf16()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert cpu_has_bf16() == answer


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_dtype_on_cuda_is_bf16_only_in_hardware(
    monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert choose_dtype("auto", torch.device("cuda", 0)) == dtype


def test_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(DeviceError, match="unknown dtype 'int8'"):
        choose_dtype("int8", CPU)


def test_autocast_computes_in_the_given_dtype() -> None:
    x = torch.ones(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (x @ x).dtype == torch.float32


def test_the_loss_scale_halves_on_overflow_and_doubles_after_2000_good_steps() -> None:
    scale = LossScale.start(torch.float16)
    smaller = scale.after_overflow()
    assert smaller is not None
    assert smaller.value == scale.value / 2
    for _ in range(1999):
        smaller = smaller.after_step()
    assert smaller.value == scale.value / 2
    assert smaller.after_step().value == scale.value


def test_the_loss_scale_gives_up_when_scaling_is_not_the_cause() -> None:
    assert LossScale.start(torch.bfloat16).after_overflow() is None
    assert LossScale(1.0, 0, True).after_overflow() is None


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert pin_threads() == 2
        assert torch.get_num_threads() == 2
        assert pin_threads(1) == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "many")
        with pytest.raises(DeviceError, match="OMP_NUM_THREADS must be a number"):
            pin_threads()
    finally:
        torch.set_num_threads(before)
