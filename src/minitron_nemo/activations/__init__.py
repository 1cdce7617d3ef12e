"""Looking at a model while it runs forward: which tokens count, what passes where, which tokens reach an expert."""
