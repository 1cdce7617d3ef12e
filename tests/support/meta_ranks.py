"""Parameters that Megatron-core's own model has on given ranks of a large world: built on the meta device, by one
process that takes itself for one rank after the other. Groups are torch's fake ones, which send nothing.

    python -m support.meta_ranks '[{"shape": {...}, "layout": {...}, "world": 512, "ranks": [0, 511]}, ...]'

prints as JSON, of each case and rank: its pipeline stage, all its parameters, and those of routed experts.
"""

from __future__ import annotations

import json
import sys

from minitron_nemo.cli import set_up_environment

set_up_environment()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from minitron_nemo import platform  # noqa: E402
from minitron_nemo.config.trainer import Layout  # noqa: E402
from minitron_nemo.nemo.models import build_core, nemo_config  # noqa: E402
from minitron_nemo.runtime.layout import stop  # noqa: E402
from minitron_nemo.shape import ModelShape  # noqa: E402


def held(shape: ModelShape, layout: Layout, world: int, rank: int) -> dict[str, int]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        parallel_state.initialize_model_parallel(**layout.sizes, create_gloo_process_groups=False)
        options = {"pipeline_dtype": torch.float32, "init_model_with_meta_device": True}
        config = nemo_config(shape, plain=True, **options, **layout.of_model)
        core = build_core(config, shape)
        sizes = {name: parameter.numel() for name, parameter in core.named_parameters()}
        experts = sum(size for name, size in sizes.items() if ".local_experts." in name)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return {"stage": stage, "parameters": sum(sizes.values()), "of_experts": experts}
    finally:
        stop()


if __name__ == "__main__":
    platform.activate()
    cases = json.loads(sys.argv[1])
    found = [
        [
            held(ModelShape.from_dict(case["shape"]), Layout(**case["layout"]), case["world"], rank)
            for rank in case["ranks"]
        ]
        for case in cases
    ]
    print("\n" + json.dumps(found))
