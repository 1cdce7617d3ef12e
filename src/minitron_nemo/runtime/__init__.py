"""Megatron-core alone: layouts, forward passes, depth sweeps, the teacher's pass, distributed checkpoints."""
