"""From scores to kept indices: the k highest of each row, in ascending order.

    hidden   [h]     one set for the whole model: the residual stream is shared
    ffn      [l, f]  per layer
    group    [l, g]  per layer, whole groups with their key and value
    head     [l, n]  per layer, inside their group; every kept group keeps the same number

Heads and neurons are ranked inside their layer, as scores of different layers are not on one scale. Of equal scores
the lower index is kept, so a plan is the same on every machine. Indices are global, int64. Nothing communicates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_nemo.checks import require


def top_k(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` highest scores of each row, ascending.

    Args:
        scores: [..., c], finite.
        keep: 1 to c.
    Returns: [..., keep] int64.
    """
    size = scores.size(-1)
    require(
        1 <= keep <= size,
        f"{keep} of {size} cannot be kept: pruning keeps at least 1 and at most what there is. Choose 1 to {size}.",
    )
    require(bool(scores.isfinite().all()), "Scores hold NaN or infinity, which rank nothing. Estimate them again.")
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices  # stable: ties keep the lower index
    return order[..., :keep].sort(dim=-1).values


def top_heads(scores: Tensor, kept_groups: Tensor, *, heads_per_group: int, keep_per_group: int) -> Tensor:
    """Indices of the `keep_per_group` highest heads inside each kept group, ascending.

    Args:
        scores: [l, n], n = groups x heads_per_group.
        kept_groups: [l, kg] int64, ascending.
    Returns: [l, kg * keep_per_group] int64, global head indices.
    """
    require(
        keep_per_group <= heads_per_group,
        f"{keep_per_group} heads per query group cannot be kept where a group has {heads_per_group}. Lower "
        f"target.num_attention_heads to at most {kept_groups.size(-1) * heads_per_group}, or keep more query groups.",
    )
    grouped = scores.unflatten(-1, (-1, heads_per_group))  # [l, g, n/g]
    of_kept = grouped.gather(1, kept_groups.unsqueeze(-1).expand(-1, -1, heads_per_group))
    inside = top_k(of_kept, keep_per_group)  # [l, kg, keep]
    return (kept_groups.unsqueeze(-1) * heads_per_group + inside).flatten(1)


def head_partners(scores: Tensor, kept_groups: Tensor, *, heads_per_group: int, keep_per_group: int) -> Tensor:
    """Of each kept head the dropped head of its group that is merged into it, or -1.

    Minitron (arXiv:2407.14679, section 2.3): of L heads ranked from 1, K are kept, and head i becomes
    head_i + (head_i - head_{2K-i+1}) for i in [2K-L+1, K]: the last kept pairs with the first dropped, and so on. (The
    paper prints K-(L-K) as the lower end, whose partner L+1 does not exist.) Here L and K count the query heads of one
    group, since heads of other groups read other keys. Where more heads are dropped than kept, the lowest have no
    partner.

    Args: as `top_heads`.
    Returns: [l, kg * keep_per_group] int64, global head indices, in the order of `top_heads`.
    """
    grouped = scores.unflatten(-1, (-1, heads_per_group))
    of_kept = grouped.gather(1, kept_groups.unsqueeze(-1).expand(-1, -1, heads_per_group))
    order = torch.sort(of_kept, dim=-1, descending=True, stable=True).indices  # [l, kg, L], as `top_k` ranks
    partner = torch.full_like(order, -1)  # by place in the group
    for rank in range(max(1, 2 * keep_per_group - heads_per_group + 1), keep_per_group + 1):
        head, dropped = order[..., rank - 1 : rank], order[..., 2 * keep_per_group - rank].unsqueeze(-1)
        partner.scatter_(-1, head, dropped + kept_groups.unsqueeze(-1) * heads_per_group)
    kept = order[..., :keep_per_group].sort(dim=-1).values
    return partner.gather(-1, kept).flatten(1)
