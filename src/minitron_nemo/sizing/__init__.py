"""plan: what a recipe will take, reckoned before anything is spent: on one CPU, without weights, GPUs or the network.

Of every step that runs a model: whether its layout divides the model, memory of the fullest rank by part, tokens,
FLOPs, hours and disk at the recipe's real number of ranks; and what to change where it does not fit.
"""
