"""What a model is worth: held-out loss, distance to its teacher, continuations."""
