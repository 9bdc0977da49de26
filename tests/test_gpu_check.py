"""The script for a graphics card does on a CPU, small, all that it does on a card, and says in one line that there
is none."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import gpu_check


@pytest.mark.parametrize("one", gpu_check.CHECKS, ids=lambda one: one.__name__)
def test_a_check_runs_on_a_cpu(one, tmp_path):
    found = one("cpu", gpu_check.SMALL, tmp_path)
    assert found and all(
        isinstance(value, float | int) and value == value and value >= 0 for value in found.values()
    ), found
    if one is gpu_check.two_devices:
        assert set(found) == {"cpu,cpu stock", "cpu,cpu cut", "cpu stock", "cpu cut"} and max(found.values()) < 1e-4
    elif one is gpu_check.low_rank_kernel:
        assert found["float32_difference"] < 1e-4 < found["bfloat16_difference"], "bfloat16 rounds"
    elif one is gpu_check.nf4:
        assert found["difference"] == 0 and found["loss_cpu"] != found["loss_float32"]
    elif one is gpu_check.nf4_memory:
        full = gpu_check.random_bundle(gpu_check.SMALL, "cpu", torch.bfloat16)
        plain = gpu_check.held_bytes([full.family.language_of(full.model)]) / gpu_check.GIB
        assert found["language_gib"] < plain and found["pieces"] == 1 and found["peak_gib"] > 0
    elif one in (gpu_check.throughput, gpu_check.evaluation):
        assert all(value > 0 for value in found.values())


def test_a_wrong_kernel_is_found(tmp_path, monkeypatch):
    twice = lambda module, query, key, value, mask: gpu_check.dense_attention(module, query, key, 2 * value, mask)
    monkeypatch.setattr(gpu_check, "structural_attention", twice)
    with pytest.raises(AssertionError, match="difference"):
        gpu_check.low_rank_kernel("cpu", gpu_check.SMALL, tmp_path)


def test_what_fails_and_what_time_was_not_left_for_is_written_down(monkeypatch):
    def broken(device, size, folder):
        raise ValueError("no such kernel\nmore")

    def slow(device, size, folder):
        assert folder.is_dir() and size is gpu_check.SMALL
        monkeypatch.setattr(gpu_check.time, "monotonic", lambda: 1e12)
        return {"value": 1.0}

    def hungry(device, size, folder):
        raise torch.OutOfMemoryError("tried 9 GiB")

    monkeypatch.setattr(gpu_check, "CHECKS", (broken, hungry, slow, gpu_check.nf4))
    lines = []
    found = gpu_check.run_checks("cpu", gpu_check.SMALL, 300, lines.append)
    assert found["broken"]["failed"] == "ValueError: no such kernel" and found["slow"]["value"] == 1.0
    assert found["hungry"]["not_measured"] == "out of memory: tried 9 GiB"
    assert found["nf4"] == {"not_measured": "300 s were over"} and "nf4: not_measured 300 s were over" in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card: make test-gpu")
def test_without_a_card_it_says_so_in_one_line(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "gpu")]) == 0
    assert (
        capsys.readouterr().out == "tests/gpu: skipped, there is no CUDA device\n" and not (tmp_path / "gpu").exists()
    )
