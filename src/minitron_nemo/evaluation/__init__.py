"""What a model is worth: held-out loss, distance to its teacher, continuations, and scores of lm-evaluation-harness.

Of lm_eval (0.4), on our checkpoints over the ranks and on Hugging Face folders: rank 0 alone runs it, reads the tasks'
data, writes the questions and counts the answers. What it asks the model goes to every rank
(`parallel.rank_zero_leads`), so that lm_eval never hears of ranks.
"""
