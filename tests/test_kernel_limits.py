import kernel_limits
import pytest
import torch


def test_every_launch_is_one(monkeypatch, device):
    """At small sizes, on this machine, with the dtype that the interpreter can round."""
    for name, value in dict(DTYPE=torch.float16, M=32, K=64, N=128, B=1, T=16, HEADS=4, KEY_HEADS=2, D=16).items():
        monkeypatch.setattr(kernel_limits, name, value)
    found = kernel_limits.launches(device)
    assert len(found) == 8
    for launch in found.values():
        launch()


@pytest.mark.gpu
@pytest.mark.slow
def test_counters_are_of_each_launch(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_limits, "record", lambda name, rows, command: (name, rows))
    name, rows = kernel_limits.main()
    assert name.startswith("limits_") and [row["op"] for row in rows] == list(kernel_limits.launches())
    assert all(0 < row["dram_busy"] <= 1 and 0 < row["issue_busy"] <= 1 for row in rows)
