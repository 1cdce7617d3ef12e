"""Training a pruned student on its teacher's outputs: divergences, and the module that holds both models."""
