"""What the student is trained on: conf's `distillation` group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.ranges import Ranged, ranged

FORWARD_KL, TOP_K = "forward_kl", "top_k"
KINDS = (FORWARD_KL, "reverse_kl", "symmetric_kl", "jensen_shannon", "cosine", "mse", TOP_K)
TAILS = ("bucket", "renormalised")
PLACES = ("embedding", "block_output", "attention_output", "mlp_input", "relation")
STATE_LOSSES = ("cosine", "mse", "smooth_l1")
MAPPINGS = ("last_minus_k", "last_k", "uniform", "plan", "explicit")
PROJECTIONS = ("auto", "shared", "per_pair", "none")
PROJECTION_INITS = ("random", "plan")
BALANCES = ("dynamic", "fixed")


@dataclass
class DivergenceConfig(Ranged):
    """Which divergence, of which distributions."""

    KEY: ClassVar[str] = "distillation.divergence"

    kind: str = FORWARD_KL
    """forward_kl KL(teacher || student); reverse_kl KL(student || teacher); symmetric_kl, the mean of both;
    jensen_shannon; cosine and mse of the logits; top_k, forward KL over the teacher's k likeliest tokens."""
    beta: float = ranged(0.5, above=0, below=1, mend="0.5 is Jensen-Shannon")
    """jensen_shannon: beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student
    (arXiv:2306.13649). Between 0 and 1, where beta^-1 and (1 - beta)^-1 times it become forward and reverse KL."""
    k: int = ranged(0, at_least=0)
    """top_k: number of tokens, at least 1. In Minitron, 100 and less hurt and more changed nothing."""
    tail: str = "bucket"
    """top_k: every other token is one outcome with its true mass (bucket), or left out (renormalised)."""
    temperature: float = ranged(1.0, above=0, mend="Minitron uses 1.0")
    """Divides the scores of both. Minitron: 1 was best of 0.1, 0.5, 1 and 3."""
    scale_by_temperature_squared: bool = True
    """Multiply the divergence by temperature**2: the gradient keeps its size (Hinton et al. 2015, section 2)."""
    student_softcap: float | None = ranged(None, above=0)
    """None: no cap. For logits that the model has not capped itself (Gemma 2: 30)."""
    teacher_softcap: float | None = ranged(None, above=0)
    """As student_softcap."""
    student_logit_scale: float = ranged(1.0, above=0)
    """Multiplies the logits, before the cap. For logits that the model has not scaled itself (Cohere)."""
    teacher_logit_scale: float = ranged(1.0, above=0)
    """As student_logit_scale."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_known(self.KEY, "kind", self.kind, KINDS)
        require(
            (self.k >= 1) == (self.kind == TOP_K),
            f"{self.KEY}.k={self.k} must be at least 1 for kind=top_k; try 1024."
            if self.kind == TOP_K
            else f"{self.KEY}.k={self.k} is read by kind=top_k only, and the kind is {self.kind}; remove one.",
        )
        _require_known(self.KEY, "tail", self.tail, TAILS)

    @property
    def factor(self) -> float:
        return self.temperature**2 if self.scale_by_temperature_squared else 1.0


@dataclass
class HiddenStateConfig(Ranged):
    """Losses between hidden states of student and teacher (arXiv:2407.14679, section 3 and appendix A.6).

    They help where depth is cut a lot and do not where only width is (table 18 there), so they are off. The other
    defaults are what worked best there.
    """

    KEY: ClassVar[str] = "distillation.hidden_states"

    enabled: bool = False
    places: list[str] = field(default_factory=lambda: ["embedding", "block_output"])
    """What is compared: embedding (once), and of each mapped pair of layers block_output, attention_output (what
    attention adds to the stream), mlp_input (after its layernorm), relation (of queries, keys and values, as MiniLMv2,
    arXiv:2012.15828). The last three gave nothing more."""
    loss: str = "cosine"
    """cosine (1 - cos), mse or smooth_l1 (means over the channels), per token. Relations have their own: KL."""
    after_layernorm: bool = True
    """Read embedding and block_output behind the layernorm that follows, as the papers do; false: the raw stream."""
    mapping: str = "last_minus_k"
    """Student layer -> teacher layer: last_minus_k (one pair: last layer minus `k` of both), last_k (the last `k`
    layers in pairs), uniform (every student layer, evenly spread, last to last), plan (every student layer to the
    teacher's layer that the pruning plan kept as it), explicit (`pairs`)."""
    k: int = ranged(2, at_least=0)
    """Of last_minus_k and last_k."""
    pairs: list[list[int]] = ranged(of=list, at_least=0)
    """explicit only: [student layer, teacher layer], both from 0."""
    projection: str = "auto"
    """Learned linear map from student to teacher channels: shared by all pairs, per_pair, none (equal hidden sizes
    only), or auto: shared where the sizes differ, none where they are equal."""
    projection_init: str = "random"
    """random, or plan: each kept channel to the teacher's channel it came from."""
    relation_heads: int = ranged(0, at_least=0)
    """Heads that queries, keys and values are cut into, the same number in both models; a multiple of
    tensor_model_parallel_size. 0: the largest number of query groups that divides both models'."""
    balance: str = "dynamic"
    """dynamic: the hidden losses' sum is weighted by alpha = divergence / their sum, both of the step before (the
    first step has none, and no hidden losses); fixed: by `weight` alone."""
    weight: float = ranged(1.0, above=0, mend="to switch off, set enabled=false")
    """Of the hidden losses' sum, in dynamic balance on top of alpha."""
    warmup_steps: int = ranged(0, at_least=0)
    """Optimizer steps over which the weight rises linearly from 0."""
    decay_start: int = ranged(0, at_least=0)
    """Step, from 0, after which the weight falls linearly to 0 over `decay_steps`."""
    decay_steps: int = ranged(0, at_least=0)
    """0: it does not fall."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for place in self.places:
            _require_known(self.KEY, "places", place, PLACES)
        _require_known(self.KEY, "loss", self.loss, STATE_LOSSES)
        _require_known(self.KEY, "mapping", self.mapping, MAPPINGS)
        _require_known(self.KEY, "projection", self.projection, PROJECTIONS)
        _require_known(self.KEY, "projection_init", self.projection_init, PROJECTION_INITS)
        _require_known(self.KEY, "balance", self.balance, BALANCES)
        require(
            bool(self.places) and len(set(self.places)) == len(self.places),
            f"{self.KEY}.places={self.places} must name at least one place, and each once; known: {', '.join(PLACES)}.",
        )
        require(
            (self.mapping == "explicit") == bool(self.pairs),
            f"{self.KEY}.pairs={self.pairs} and {self.KEY}.mapping={self.mapping} do not go together. Set pairs with "
            "mapping=explicit, and only then.",
        )
        require(
            all(len(pair) == 2 for pair in self.pairs),
            f"{self.KEY}.pairs={self.pairs} must hold [student layer, teacher layer], e.g. [[13, 29]].",
        )
        require(
            self.mapping != "last_k" or self.k >= 1, f"{self.KEY}.k={self.k} must be at least 1 with mapping=last_k."
        )


def _require_known(group: str, name: str, value: str, known: tuple[str, ...]) -> None:
    require(value in known, f"{group}.{name}={value} is not known; {did_you_mean(value, known)}")


@dataclass
class DistillationConfig(Ranged):
    """What the student is trained on. The defaults are the papers' final recipe: logits alone, temperature 1."""

    KEY: ClassVar[str] = "distillation"

    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    """Of the student's next-token distribution from the teacher's."""
    cross_entropy_weight: float = ranged(0.0, at_least=0)
    """loss = divergence + weight * cross-entropy on the labels. The papers leave it at 0."""
    hidden_states: HiddenStateConfig = field(default_factory=HiddenStateConfig)
    teacher_lr: float = ranged(0.0, at_least=0)
    """Above 0: the teacher is corrected while it teaches (the second route of arXiv:2408.11796, figure 5). It learns
    the labels' cross-entropy with this peak learning rate, on the schedule of the student, which sees it improve."""


def require_stored_is_enough(config: DistillationConfig) -> None:
    """Raises: ValueError: `config` asks for more of the teacher than draws or its k likeliest tokens."""
    kind = config.divergence.kind
    require(
        kind in (FORWARD_KL, TOP_K),
        f"a stored teacher is known by draws of its distribution or by its likeliest tokens, and divergence.kind="
        f"{kind} needs all; use divergence.kind={FORWARD_KL} (teacher_logits.method=sampled) or {TOP_K}.",
    )
    require(
        config.teacher_lr == 0,
        f"distillation.teacher_lr={config.teacher_lr} needs the teacher's weights, and only a few of its tokens are "
        "stored. Set it to 0, or distil with the teacher in memory (distill.teacher_logits=null).",
    )
    require(
        not config.hidden_states.enabled,
        "distillation.hidden_states.enabled=true needs the teacher's hidden states, and only a few of its tokens are "
        "stored. Set it to false, or distil with the teacher in memory (distill.teacher_logits=null).",
    )
