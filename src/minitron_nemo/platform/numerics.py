"""In which numbers things are computed: the one policy, and what of it holds in this process.

    models' products        `trainer.precision`: bf16, or float32. Float32 ones of torch are float32, unless the process
                            was told otherwise; transformer-engine's own take TF32, whatever torch's switch says
    weights that are trained, their gradients and moments       float32
    softmax, divergences, cross-entropy, aggregates of a score  float32; log-sums and sums over tokens float64
    sums over samples and ranks                                 float64
    second moments of the residual stream                       on a GPU products in TF32, of values that came as bf16
    second moments for refitted weights, and solves             products of 4096 tokens float32, of bf16 on a GPU TF32,
                                                                which is the same; the rest float64

Each manifest says how the process that made it stood to this (`numerics`).
"""

from __future__ import annotations

import torch

_PRODUCTS = {"highest": "float32", "high": "tf32 or bf16x3", "medium": "bf16"}


def numerics() -> dict[str, str]:
    """What torch makes of a product of float32 matrices here, and the type its reductions in bf16 are summed in."""
    try:
        products = _PRODUCTS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # the newer switches were used, and may say more than the older ones can
        products = str(torch.backends.cuda.matmul.fp32_precision)
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    return {
        "float32_products": products,
        "bf16_sums": "bf16 where split over blocks" if reduced else "float32",
        "sums_over_samples": "float64",
        "solves": "float64",
    }
