"""How far two next-token distributions are apart: formulas, the walk over a split vocabulary, its fused forms."""
