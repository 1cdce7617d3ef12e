"""Which smaller shape: every candidate of a space, what it costs, and what is left of the teacher in it."""
