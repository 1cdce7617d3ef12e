"""Minitron compression of language models as an extension of Megatron-core and NeMo."""

__version__ = "0.1.0"
