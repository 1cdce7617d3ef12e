"""What is known of a device by its name."""

from __future__ import annotations

import pytest

from minitron_nemo.platform.peak import peak_tflops


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("AMD EPYC 9654", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_a_devices_peak_is_known_by_its_name_or_not_at_all(name: str, expected: float | None) -> None:
    assert peak_tflops(name) == expected
