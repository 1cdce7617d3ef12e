"""Hugging Face checkpoints: families, reading, writing, surgery on disk, the check of an export. No trainer."""
