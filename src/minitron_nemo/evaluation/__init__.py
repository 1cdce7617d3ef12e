"""Scores of lm-evaluation-harness (lm_eval 0.4), on our checkpoints over the ranks and on Hugging Face folders.

Rank 0 alone runs lm_eval: it reads the tasks' data, writes the questions, counts the answers. What it asks the model
goes to every rank (`parallel.rank_zero_leads`), so that lm_eval never hears of ranks.
"""
