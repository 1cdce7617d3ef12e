"""A compression on a SLURM cluster: one job a stage, each waiting for the one before.

    scripts = render_chain(run_dir, [StageJob("prune", ("recipe=8b",)), StageJob("distill", ("recipe=8b",))], slurm)
    jobs = submit_chain(scripts)

`render_chain` writes `<run_dir>/slurm/NN-<stage>.sbatch` from the one template slurm/stage.sbatch and needs no SLURM;
`submit_chain` hands them to sbatch and records the job ids in `<run_dir>/slurm/jobs.json`.
"""

from minitron_nemo.cluster.render import StageJob, StageScript, render_chain
from minitron_nemo.cluster.submit import SubmittedJob, stage_overrides, submit_chain

__all__ = ["StageJob", "StageScript", "SubmittedJob", "render_chain", "stage_overrides", "submit_chain"]
