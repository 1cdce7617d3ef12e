"""NeMo: model classes, trainer and strategy, data modules, checkpoints, HF import and export."""
