"""What a worker tells its engine, and the defaults that depend on the device."""

from __future__ import annotations

import pytest
from twostroke_engine.config import EngineConfig
from twostroke_worker.settings import WorkerSettings


class DemoSettings(WorkerSettings):
    """A worker of the tests."""

    role = "demo"


def engine_config(*argv: str) -> EngineConfig:
    settings = DemoSettings.load(["--model-dir", "x", *argv], "twostroke-demo")
    return settings.engine_config(1, sends_kv=False, receives_kv=False)


def test_sizes_follow_the_device_unless_they_are_given() -> None:
    cpu, gpu = engine_config(), engine_config("--device", "cuda")
    assert (cpu.block_size, cpu.max_step_tokens, cpu.max_running) == (16, 512, 64)
    assert (gpu.block_size, gpu.max_step_tokens, gpu.max_running) == (64, 8192, 256)
    assert gpu.kv_cache_bytes is gpu.num_blocks is None
    assert (gpu.gpu_memory_fraction, gpu.load_format) == (0.9, "safetensors")
    told = engine_config("--device", "cuda", "--block-size", "16", "--max-step-tokens", "100", "--max-running", "3")
    assert (told.block_size, told.max_step_tokens, told.max_running) == (16, 100, 3)


def test_random_weights_and_memory_reach_the_engine() -> None:
    told = engine_config("--load-format", "random", "--gpu-memory-fraction", "0.45", "--kv-cache-bytes", "4096")
    assert (told.load_format, told.gpu_memory_fraction, told.kv_cache_bytes) == ("random", 0.45, 4096)


def test_the_batch_invariant_mode_reaches_the_engine() -> None:
    assert engine_config("--batch-invariant").batch_invariant
    assert not engine_config().batch_invariant


def test_channels_are_names_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine_config().channels == ()
    assert engine_config("--channels", "tcp,shm").channels == ("tcp", "shm")
    with pytest.raises(SystemExit):
        engine_config("--channels", "tcp,pigeon")
    assert "--channels: expected some of cuda_ipc,shm,nixl,collective,tcp, got 'pigeon'" in capsys.readouterr().err


@pytest.mark.parametrize("fraction", ["0", "1.01", "nan"])
def test_a_fraction_is_a_fraction(fraction: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        engine_config("--gpu-memory-fraction", fraction)
    assert "--gpu-memory-fraction" in capsys.readouterr().err
