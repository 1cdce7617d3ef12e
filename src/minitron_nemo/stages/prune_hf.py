"""prune-hf: a Hugging Face checkpoint and a plan in, the pruned Hugging Face checkpoint out; shard by shard.

Nothing is loaded: a machine smaller than the model will do. One process does it; under several ranks the first, while
the others wait. The plan is one that the prune stage wrote, for the model
that import-hf made of this checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from minitron_nemo.artifact import Artifact, open_artifact, writing
from minitron_nemo.checks import require
from minitron_nemo.config.stages import EMBEDDED, PruneHfConfig
from minitron_nemo.hf.surgery import prune_hf
from minitron_nemo.kinds import refuse_as_hugging_face
from minitron_nemo.parallel import by_rank_zero
from minitron_nemo.plan import PruningPlan
from minitron_nemo.runtimes import require_opens
from minitron_nemo.stages.import_hf import embedded_teacher


@by_rank_zero
def run(config: PruneHfConfig) -> Artifact:
    """Raises: FileNotFoundError, ValueError: see `hf.surgery.prune_hf`; nothing is left behind."""
    require(bool(config.model), "prune_hf.model is not set. Set it to a Hugging Face checkpoint directory.")
    source = embedded_teacher() if config.model == EMBEDDED else Path(config.model)
    refuse_as_hugging_face(source, "prune_hf.model")
    plan = PruningPlan.load(config.plan)
    require_opens(plan.target, plan.source)
    with writing(config.output, stage="prune-hf", config=config) as draft:
        prune_hf(
            source,
            plan,
            draft.path,
            max_shard_bytes=int(config.max_shard_gigabytes * 10**9),
            ignore=config.ignore_tensors,
        )
        plan.save(draft.path)
        draft.metrics.update(
            parameters=plan.target.num_parameters, parameters_of_source=plan.source.num_parameters, tokens=0
        )
    return open_artifact(config.output)
