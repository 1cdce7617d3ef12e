"""What a device could do at best: the denominator of model FLOPs utilisation.

Dense bf16 matrix products in TFLOP/s, from NVIDIA's data sheets; where these print the figure "with sparsity", half.
"""

from __future__ import annotations

import torch

DENSE_BF16_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "L4": 121.0,
    "L40": 181.05,
    "L40S": 362.05,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H800": 989.4,
    "H20": 148.0,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "GH200": 989.4,
    "B200": 2250.0,
    "GB200": 2500.0,
}
"""By words of the name that torch.cuda.get_device_name() gives: "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"."""


def peak_tflops(device_name: str) -> float | None:
    """Of a device with this name; None where it is not known.

    The longest entry whose words all stand in the name: an "H100 PCIe" is not just an H100, and an "L40S" is no L40.
    """
    words = set(device_name.replace("-", " ").split())
    fitting = [name for name in DENSE_BF16_TFLOPS if words.issuperset(name.split())]
    return DENSE_BF16_TFLOPS[max(fitting, key=len)] if fitting else None


def peak_tflops_here() -> float | None:
    """Of this rank's accelerator; None without one."""
    return peak_tflops(torch.cuda.get_device_name()) if torch.cuda.device_count() > 0 else None
