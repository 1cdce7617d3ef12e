"""One module a stage: a config dataclass and `run(config) -> Artifact`. Stages know nothing of each other."""
