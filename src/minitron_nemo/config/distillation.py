"""What the student is trained on: conf's `distillation` group."""

from __future__ import annotations

from dataclasses import dataclass, field

from minitron_nemo.checks import did_you_mean, require

TOP_K = "top_k"
KINDS = ("forward_kl", "reverse_kl", "symmetric_kl", "jensen_shannon", "cosine", "mse", TOP_K)
TAILS = ("bucket", "renormalised")
PLACES = ("embedding", "block_output", "attention_output", "mlp_input", "relation")
STATE_LOSSES = ("cosine", "mse", "smooth_l1")
MAPPINGS = ("last_minus_k", "last_k", "uniform", "plan", "explicit")
PROJECTIONS = ("auto", "shared", "per_pair", "none")
PROJECTION_INITS = ("random", "plan")
BALANCES = ("dynamic", "fixed")
_KEY = "distillation.hidden_states"


@dataclass
class DivergenceConfig:
    """Which divergence, of which distributions."""

    kind: str = "forward_kl"
    """forward_kl KL(teacher || student); reverse_kl KL(student || teacher); symmetric_kl, the mean of both;
    jensen_shannon; cosine and mse of the logits; top_k, forward KL over the teacher's k likeliest tokens."""
    beta: float = 0.5
    """jensen_shannon: beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student
    (arXiv:2306.13649). Between 0 and 1, where beta^-1 and (1 - beta)^-1 times it become forward and reverse KL."""
    k: int = 0
    """top_k: number of tokens, at least 1. In Minitron, 100 and less hurt and more changed nothing."""
    tail: str = "bucket"
    """top_k: every other token is one outcome with its true mass (bucket), or left out (renormalised)."""
    temperature: float = 1.0
    """Above 0; divides the scores of both. Minitron: 1 was best of 0.1, 0.5, 1 and 3."""
    scale_by_temperature_squared: bool = True
    """Multiply the divergence by temperature**2: the gradient keeps its size (Hinton et al. 2015, section 2)."""
    student_softcap: float | None = None
    """Above 0; None: no cap. For logits that the model has not capped itself (Gemma 2: 30)."""
    teacher_softcap: float | None = None
    """As student_softcap."""
    student_logit_scale: float = 1.0
    """Above 0; multiplies the logits, before the cap. For logits that the model has not scaled itself (Cohere)."""
    teacher_logit_scale: float = 1.0
    """As student_logit_scale."""

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"divergence.kind={self.kind} is not known; {did_you_mean(self.kind, KINDS)}")
        require(0 < self.beta < 1, f"divergence.beta={self.beta} must be between 0 and 1; 0.5 is Jensen-Shannon.")
        require(
            (self.k >= 1) == (self.kind == TOP_K),
            f"divergence.k={self.k} must be at least 1 for kind=top_k; try 1024."
            if self.kind == TOP_K
            else f"divergence.k={self.k} is read by kind=top_k only, and the kind is {self.kind}; remove one.",
        )
        require(self.tail in TAILS, f"divergence.tail={self.tail} is not known; {did_you_mean(self.tail, TAILS)}")
        require(self.temperature > 0, f"divergence.temperature={self.temperature} must be above 0; Minitron uses 1.0.")
        for name in ("student_softcap", "teacher_softcap"):
            value = getattr(self, name)
            require(value is None or value > 0, f"divergence.{name}={value} must be above 0, or null for no cap.")
        for name in ("student_logit_scale", "teacher_logit_scale"):
            value = getattr(self, name)
            require(value > 0, f"divergence.{name}={value} must be above 0; 1.0 leaves the logits as they are.")

    @property
    def factor(self) -> float:
        return self.temperature**2 if self.scale_by_temperature_squared else 1.0


@dataclass
class HiddenStateConfig:
    """Losses between hidden states of student and teacher (arXiv:2407.14679, section 3 and appendix A.6).

    They help where depth is cut a lot and do not where only width is (table 18 there), so they are off. The other
    defaults are what worked best there.
    """

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
    k: int = 2
    """Of last_minus_k and last_k."""
    pairs: list[list[int]] = field(default_factory=list)
    """explicit only: [student layer, teacher layer], both from 0."""
    projection: str = "auto"
    """Learned linear map from student to teacher channels: shared by all pairs, per_pair, none (equal hidden sizes
    only), or auto: shared where the sizes differ, none where they are equal."""
    projection_init: str = "random"
    """random, or plan: each kept channel to the teacher's channel it came from."""
    relation_heads: int = 0
    """Heads that queries, keys and values are cut into, the same number in both models; a multiple of
    tensor_model_parallel_size. 0: the largest number of query groups that divides both models'."""
    balance: str = "dynamic"
    """dynamic: the hidden losses' sum is weighted by alpha = divergence / their sum, both of the step before (the
    first step has none, and no hidden losses); fixed: by `weight` alone."""
    weight: float = 1.0
    """Above 0; of the hidden losses' sum, in dynamic balance on top of alpha."""
    warmup_steps: int = 0
    """Optimizer steps over which the weight rises linearly from 0."""
    decay_start: int = 0
    """Step, from 0, after which the weight falls linearly to 0 over `decay_steps`."""
    decay_steps: int = 0
    """0: it does not fall."""

    def __post_init__(self) -> None:
        for place in self.places:
            _require_known("places", place, PLACES)
        _require_known("loss", self.loss, STATE_LOSSES)
        _require_known("mapping", self.mapping, MAPPINGS)
        _require_known("projection", self.projection, PROJECTIONS)
        _require_known("projection_init", self.projection_init, PROJECTION_INITS)
        _require_known("balance", self.balance, BALANCES)
        require(
            bool(self.places) and len(set(self.places)) == len(self.places),
            f"{_KEY}.places={self.places} must name at least one place, and each once; known: {', '.join(PLACES)}.",
        )
        require(
            (self.mapping == "explicit") == bool(self.pairs),
            f"{_KEY}.pairs={self.pairs} and {_KEY}.mapping={self.mapping} do not go together. Set pairs with "
            "mapping=explicit, and only then.",
        )
        require(
            all(len(pair) == 2 for pair in self.pairs),
            f"{_KEY}.pairs={self.pairs} must hold [student layer, teacher layer], e.g. [[13, 29]].",
        )
        require(self.weight > 0, f"{_KEY}.weight={self.weight} must be above 0; to switch off, set enabled=false.")
        for name in ("k", "relation_heads", "warmup_steps", "decay_start", "decay_steps"):
            least = 1 if name == "k" and self.mapping == "last_k" else 0
            require(getattr(self, name) >= least, f"{_KEY}.{name}={getattr(self, name)} must be at least {least}.")


def _require_known(name: str, value: str, known: tuple[str, ...]) -> None:
    require(value in known, f"{_KEY}.{name}={value} is not known; {did_you_mean(value, known)}")


@dataclass
class DistillationConfig:
    """What the student is trained on. The defaults are the papers' final recipe: logits alone, temperature 1."""

    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    """Of the student's next-token distribution from the teacher's."""
    cross_entropy_weight: float = 0.0
    """At least 0; loss = divergence + weight * cross-entropy on the labels. The papers leave it at 0."""
    hidden_states: HiddenStateConfig = field(default_factory=HiddenStateConfig)
    teacher_lr: float = 0.0
    """Above 0: the teacher is corrected while it teaches (the second route of arXiv:2408.11796, figure 5). It learns
    the labels' cross-entropy with this peak learning rate, on the schedule of the student, which sees it improve."""

    def __post_init__(self) -> None:
        require(
            self.cross_entropy_weight >= 0,
            f"distillation.cross_entropy_weight={self.cross_entropy_weight} must be at least 0; Minitron uses 0.",
        )
        require(
            self.teacher_lr >= 0,
            f"distillation.teacher_lr={self.teacher_lr} must be at least 0; 0 leaves the teacher as it is.",
        )


def require_kind_reads_top_k(config: DivergenceConfig) -> None:
    require(
        config.kind == TOP_K,
        f"the teacher is known by its likeliest tokens only, and divergence.kind={config.kind} needs all; use "
        "divergence.kind=top_k.",
    )


def require_stored_is_enough(config: DistillationConfig) -> None:
    """Raises: ValueError: `config` asks for more of the teacher than its k likeliest tokens."""
    require_kind_reads_top_k(config.divergence)
    require(
        config.teacher_lr == 0,
        f"distillation.teacher_lr={config.teacher_lr} needs the teacher's weights, and only its likeliest tokens are "
        "stored. Set it to 0, or distil with the teacher in memory (distill.teacher_logits=null).",
    )
    require(
        not config.hidden_states.enabled,
        "distillation.hidden_states.enabled=true needs the teacher's hidden states, and only its likeliest tokens are "
        "stored. Set it to false, or distil with the teacher in memory (distill.teacher_logits=null).",
    )
