"""One dataclass a stage: the schema of its section in a recipe, and what its artifact's manifest keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_nemo.checks import did_you_mean, require
from minitron_nemo.config.data import STDLIB, DataConfig, Documents, Prepared
from minitron_nemo.config.distillation import TOP_K, DistillationConfig, require_stored_is_enough
from minitron_nemo.config.evaluation import PRESETS
from minitron_nemo.config.identity import how
from minitron_nemo.config.importance import DepthConfig, ImportanceConfig
from minitron_nemo.config.pruning import BudgetConfig, DepthChoice, SurgeryConfig
from minitron_nemo.config.ranges import SEEDS, Ranged, ranged
from minitron_nemo.config.throughput import ThroughputConfig
from minitron_nemo.config.trainer import Calibrating, Layout, Loading, Passing, TrainerConfig
from minitron_nemo.config.training import TrainingConfig

EMBEDDED = "embedded"
"""In place of a Hugging Face directory: the small teacher inside this package."""
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
EXPORT_DTYPES = ("bf16", "fp32")
SPECIAL_TOKENS = ("auto", "keep", "split")
SAMPLED = "sampled"
STORES = (SAMPLED, TOP_K)


@dataclass
class PrepareDataConfig(Ranged):  # conf/prepare-data.yaml
    """What `prepare-data` reads and how it splits."""

    output: str = how("runs/data")
    """Directory of the artifact."""
    corpus: Any = STDLIB
    """`stdlib` (the interpreter's own standard library source), a path, or a list of paths or {path, weight}."""
    text_key: str = "text"
    """Key (JSONL) or column (Parquet) that holds the text."""
    prompt_key: str | None = None
    """That of a prompt, which the text answers, written as the model is to see it: the prompt is read, and only the
    text is learned. Null: there are no prompts."""
    messages_key: str = "messages"
    """That of a chat's messages, in records without a text: the tokenizer's template writes them, with what stands
    under `tools`, and only the assistant's part is learned."""
    special_tokens: str = "auto"
    """What spells a special token in a document: `keep` makes it one, `split` leaves it text; `auto` keeps it in chats
    and in prompts with their answers, and splits it in plain text."""
    add_bos: bool | None = None
    """Whether a document begins with the beginning-of-text token; null: as the tokenizer does, and a chat as its
    template does."""
    max_skipped: float = ranged(0.01, at_least=0, at_most=1)
    """Largest share of a source's records that may be left out because their text is null."""
    max_characters: int | None = ranged(None, at_least=1)
    """Longer documents are left out; null: none are."""
    tokenizer: str | None = None
    """Local Hugging Face tokenizer directory, such as the teacher's; null trains one on the training split."""
    vocab_size: int = ranged(4096, at_least=SMALLEST_VOCABULARY, mend="every byte and the end of text; try 4096")
    """Tokens of the tokenizer that is trained; not read when `tokenizer` is given."""
    validation_fraction: float = ranged(0.02, above=0, at_most=0.5)
    """Share of the documents that is held out."""
    seed: int = ranged(1234, at_least=0, at_most=SEEDS)
    """Order of the training documents."""
    licence: str | None = None
    """Licence of the corpus, kept in the manifest; that of `stdlib` is known."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.special_tokens in SPECIAL_TOKENS,
            f"special_tokens={self.special_tokens} is not known; use {', '.join(SPECIAL_TOKENS)}.",
        )
        require(
            not self.add_bos or self.tokenizer is not None,
            "add_bos=true needs a tokenizer; the one that is trained begins no text. Set tokenizer or add_bos=null.",
        )


@dataclass
class PretrainConfig(Ranged):
    shape: dict[str, Any] | None = field(default_factory=dict)
    """Fields of ModelShape for random weights; null or empty with `initial` or `like`."""
    like: str | None = None
    """A model artifact whose shape random weights take."""
    initial: str | None = None
    """A model artifact whose weights training starts from."""
    seed: int = ranged(1234, at_least=0, at_most=SEEDS)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: str = how("runs/pretrained")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("shape", "like", "initial") if getattr(self, name)]
        require(len(given) <= 1, f"pretrain: {' and '.join(given)} exclude each other; keep one of them.")


@dataclass
class ImportHfConfig(Ranged):
    model: str = EMBEDDED
    """Directory with config.json, safetensors and tokenizer, or a .gguf file; `embedded` is the small teacher inside
    this package."""
    tokenizer: str | None = None
    """Local Hugging Face tokenizer directory in place of the model's own; null: the model's own."""
    make_vocab_size_divisible_by: int = ranged(1, at_least=1)
    """Pads the embedding table with zero rows up to a multiple, so that it splits over tensor parallelism."""
    ignore_tensors: list[str] = field(default_factory=list)
    """Patterns (`model.mtp.*`) of tensors to leave out, which config.json does not call for; others are refused."""
    trainer: Loading = field(default_factory=Loading)
    """With precision=auto the weights are stored as they are in the checkpoint."""
    output: str = how("runs/teacher")


@dataclass
class CorrectTeacherConfig(Ranged):
    model: str = ""
    """Model artifact of the teacher as it came."""
    seed: int = ranged(1234, at_least=0, at_most=SEEDS)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output: str = how("runs/corrected_teacher")


@dataclass
class EstimateImportanceConfig(Ranged):
    model: str = ""
    """Model artifact to score; the corrected teacher."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    """Scores of layers and blocks of layers; none unless it names metrics."""
    seed: int = ranged(1234, at_least=0, at_most=SEEDS)
    trainer: Passing = field(default_factory=Passing)
    data: Prepared = field(default_factory=Prepared)
    output: str = how("runs/importance")


@dataclass
class PruneConfig(Ranged):
    model: str = ""
    """Model artifact to prune; the corrected teacher."""
    importance: str = ""
    """estimate-importance artifact of a model of the same shape."""
    plan: str | None = None
    """A plan's folder (one that prune wrote, or an edited copy) to follow instead of importance and target. With
    surgery.compensate its neurons and heads stay, and what reads them is refitted."""
    target: dict[str, int | None] = ranged(of=dict, at_least=1)
    """Dims of the student: num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, and of
    experts num_moe_experts, moe_ffn_hidden_size, moe_shared_expert_intermediate_size. Those left out, or null, stay as
    they are."""
    keep: dict[str, float] = ranged(of=dict, above=0, at_most=1)
    """The same dims as fractions of the model's."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What the student may cost in all; resolves dims that target and keep leave open."""
    multiple_of: dict[str, int] = ranged(of=dict, at_least=1)
    """Rounds these dims to multiples that hardware and tensor parallelism like. Wide dims that keep gives and that are
    not named here become multiples of 64, or of the largest power of two in the model's, if that is smaller."""
    family: str | None = None
    """Hugging Face family of the student, one whose model computes the same: mistral for a llama without biases. Null:
    the model's own."""
    layers: list[int] | None = ranged(None, at_least=0)
    """Kept layers, from 0. Where fewer layers are kept, they or depth.metric say which."""
    depth: DepthChoice = field(default_factory=DepthChoice)
    """Which layers go, by their scores."""
    batch_aggregation: str = "l2"
    sequence_aggregation: str = "mean"
    rounds: int = ranged(1, at_least=1, mend="1 prunes in one shot")
    """Cut the width to its target in so many equal steps, and score what is left before each but the first,
    as the importance was estimated; layers go in the last."""
    merge_heads: bool = False
    """Merge each dropped query head into a kept one of its group (arXiv:2407.14679, section 2.3)."""
    surgery: SurgeryConfig = field(default_factory=SurgeryConfig)
    """What is done to the weights so that less is lost; by default nothing, as in the papers."""
    offline: bool = False
    """Cut the checkpoint on disk piece by piece in one process, never holding a model; for machines smaller than it."""
    trainer: Calibrating = field(default_factory=Calibrating)
    output: str = how("runs/student_pruned")

    @property
    def dims(self) -> dict[str, int]:
        """Those of `target` that are said."""
        return {dim: size for dim, size in self.target.items() if size is not None}

    def __post_init__(self) -> None:
        super().__post_init__()
        hindrances = {
            "prune.plan is set, which says already what is kept": self.plan is not None,
            "prune.offline=true never holds a model, and each round scores one": self.offline,
            "prune.merge_heads=true changes heads, and the rounds are put together into one cut": self.merge_heads,
            "prune.surgery.basis=rotation leaves no channels to score": self.surgery.basis == "rotation",
            "prune.surgery.norm_scale rescales norms for one cut of the stream": not self.surgery.is_sequential
            and self.surgery.chosen("norm_scale") != "none",
        }
        for hindrance, stands in hindrances.items():
            works = self.rounds == 1 or not stands
            require(works, f"prune.rounds={self.rounds}, but {hindrance}. Give up one of them.")
        for fit in (self.surgery.compensation, self.surgery.sequential):
            require(
                self.plan is None or fit.selection != "compensated_error",
                f"prune.plan={self.plan} says which neurons and heads stay, and prune.{fit.KEY}.selection="
                "compensated_error chooses them anew. Leave selection out (or set it to scores) to refit what the plan "
                "keeps, or prune by importance and target (prune.plan=null).",
            )
        require(
            not (self.merge_heads and (self.surgery.chosen("compensate") or self.surgery.is_sequential)),
            "prune.surgery compensates for dropped heads, which prune.merge_heads=true merges into others. Set "
            "prune.surgery.compensate=false and prune.surgery.refit=none, or prune.merge_heads=false.",
        )


@dataclass
class PruneHfConfig(Ranged):
    model: str = ""
    """Directory with config.json and safetensors."""
    plan: str = ""
    """Folder with plan.json and plan.safetensors: a prune artifact, or an edited copy of its plan."""
    max_shard_gigabytes: float = ranged(5.0, above=0)
    """Size of a file of the result."""
    ignore_tensors: list[str] = field(default_factory=list)
    """As import_hf.ignore_tensors."""
    output: str = how("runs/pruned_hf")


@dataclass
class TeacherLogitsConfig(Ranged):
    model: str = ""
    """Model artifact that teaches; the corrected teacher."""
    method: str = TOP_K
    """top_k: the teacher's likeliest tokens and the mass of the rest, for divergence.kind=top_k. sampled: draws of its
    distribution, from which divergence.kind=forward_kl is estimated without bias (arXiv:2503.16870)."""
    draws: int = ranged(64, at_least=1)
    """sampled: of each token, equidistant through its distribution. 64 take 25 to 35 bytes a token of text."""
    seed: int = ranged(1234, at_least=0, at_most=SEEDS)
    """sampled: of where the draws begin."""
    k: int = ranged(56, at_least=1)
    """top_k: likeliest tokens kept of each token. With float16, 56 take 284 bytes a token at vocabularies above 65536,
    and 228 below."""
    precision: str = "float16"
    """top_k: of their log-probabilities; float32 takes 2 bytes more each."""
    temperature: float = ranged(1.0, above=0)
    """That of the distillation, as the tail's mass depends on it."""
    softcap: float | None = ranged(None, above=0)
    """The distillation's divergence.teacher_softcap."""
    logit_scale: float = ranged(1.0, above=0)
    """The distillation's divergence.teacher_logit_scale."""
    num_samples: int | None = ranged(None, at_least=1)
    """Samples of trainer.seq_length tokens, shared out by the sources' weights; null: all there are. A distillation
    that needs more goes through them again."""
    samples_per_shard: int = ranged(64, at_least=1)
    """Samples of one file: what a data-parallel rank can lose to a kill."""
    trainer: Passing = field(default_factory=Passing)
    data: Documents = field(default_factory=Documents)
    output: str = how("runs/teacher_logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.method in STORES,
            f"teacher_logits.method={self.method} is not known; {did_you_mean(self.method, STORES)}",
        )
        require(
            not self.data.reset_at_documents,
            "data.reset_at_documents=true cannot be stored: a sample is a window whose documents see each other. Set "
            "it to false, or distil with the teacher at hand (distill.teacher_logits=null).",
        )


@dataclass
class DistillConfig(Ranged):
    teacher: str = ""
    """Model artifact that teaches; the corrected teacher. With teacher_logits it is not opened."""
    teacher_logits: str | None = None
    """What it says of this data, made by teacher-logits; then no teacher is in memory, and the divergence is the
    one that the store's method goes with: forward_kl or top_k."""
    student: str = ""
    """Model artifact that learns; the pruned student."""
    plan: str | None = None
    """Folder of the plan by which the student was cut from this teacher, for hidden losses that go by it; null: the
    student's own, where prune made it."""
    offload_teacher: bool = how(False)
    """Keep the teacher's layers in host memory; each visits the device when its turn comes."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    seed: int = ranged(1234, at_least=0, at_most=SEEDS)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    corrected_teacher: str | None = None
    """With distillation.teacher_lr: where to write the teacher as it is in the end; null: it is not kept."""
    output: str = how("runs/distilled")

    def __post_init__(self) -> None:
        super().__post_init__()
        hidden = self.distillation.hidden_states
        require(
            not self.data.reset_at_documents or not (hidden.enabled and "relation" in hidden.places),
            "distillation.hidden_states.places names relation, which compares tokens across the documents of a sample; "
            "with data.reset_at_documents=true they do not see each other. Leave one of the two out.",
        )
        require(
            not self.data.reset_at_documents or self.teacher_logits is None,
            f"distill.teacher_logits={self.teacher_logits} are of samples whose documents see each other. Set "
            "data.reset_at_documents=false, or distil with the teacher at hand.",
        )
        require(
            self.teacher_logits is None or not self.offload_teacher,
            f"distill.offload_teacher=true keeps a teacher's layers on the host, and with distill.teacher_logits="
            f"{self.teacher_logits} the teacher is not in memory. Leave one of the two out.",
        )
        if self.teacher_logits is not None:
            require_stored_is_enough(self.distillation)
        require(
            self.corrected_teacher is None or self.distillation.teacher_lr > 0,
            f"distill.corrected_teacher={self.corrected_teacher} is of a teacher that learns. Leave it out, or set "
            "distillation.teacher_lr.",
        )
        require(
            self.distillation.teacher_lr == 0 or (self.teacher_logits is None and not self.offload_teacher),
            f"distillation.teacher_lr={self.distillation.teacher_lr} needs the teacher's weights on the device. Leave "
            "out distill.teacher_logits and distill.offload_teacher, or set teacher_lr=0.",
        )


@dataclass
class EvaluateConfig(Ranged):
    model: str = ""
    """Model artifact to measure; with tasks also a Hugging Face folder, which has no held-out loss here."""
    num_samples: int | None = ranged(None, at_least=0)
    """Samples over all data-parallel ranks, of every source in proportion; null takes all of the held-out text, 0
    leaves the held-out loss out."""
    teacher: str | None = None
    """Model artifact whose distance (forward KL) on the held-out text is measured too; null: none is."""
    prompts: list[str] = field(default_factory=list)
    """Texts that the model continues, greedily and sampled, for a look."""
    new_tokens: int = ranged(64, at_least=1)
    """Tokens it adds to each, at most."""
    temperature: float = ranged(0.8, above=0)
    """Of the sampled continuation, as the two that follow."""
    top_p: float = ranged(0.95, above=0, at_most=1)
    """Share of the probability that the likeliest tokens, which alone are drawn, make up together."""
    seed: int = ranged(1234, at_least=0, at_most=SEEDS)
    tasks: list[str] | None = None
    """Of lm-evaluation-harness: names, YAML files, or folders of them."""
    preset: str | None = None
    """Tasks with their settings: papers (arXiv:2408.11796) or quick. It and `tasks` add up."""
    metrics: dict[str, str] = field(default_factory=dict)
    """Of a task in `tasks`, by its name in lm_eval, the metric that is quoted; of others acc_norm for ARC and
    HellaSwag, else the task's first."""
    num_fewshot: int | None = ranged(None, at_least=0)
    """Examples before each question of `tasks`; null: what the task says."""
    limit: Any = None
    """Of each task the first so many documents (a whole number, 1 is one), or a share of them (below 1)."""
    batch_size: int = ranged(8, at_least=1, how=True)
    """Texts that are run at once on a data-parallel rank."""
    chat_template: str | None = None
    """Write the questions and prompts by the tokenizer's chat template: default, or one's name; null: as plain text."""
    run_code: bool = how(False)
    """Allow tasks that run what the model wrote (mbpp, humaneval) on this machine."""
    against: str | None = None
    """Evaluation of the teacher, to be compared with."""
    trainer: Passing = field(default_factory=Passing)
    data: Prepared = field(default_factory=Prepared)
    output: str = how("runs/evaluation")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.preset in (None, *PRESETS),
            f"evaluate.preset={self.preset} is not known; use {', '.join(PRESETS)} or null.",
        )
        limit = self.limit
        known = limit is None or (
            isinstance(limit, int | float)
            and not isinstance(limit, bool)
            and (limit >= 1 if isinstance(limit, int) else 0 < limit < 1)
        )
        require(
            known,
            f"evaluate.limit={limit} must be a whole number of documents (1, 100) or a share of them above 0 and "
            "below 1 (0.1). Lm_eval reads 1.0 as one document; leave limit out to take all.",
        )
        require(
            self.num_samples != 0 or self.has_tasks,
            "evaluate.num_samples=0 leaves the held-out loss out, and there is no task. Name evaluate.tasks or a "
            "preset, or set num_samples=null.",
        )
        of_tasks = ("against", "limit", *(() if self.prompts else ("chat_template",)))
        lonely = next((name for name in of_tasks if getattr(self, name) is not None), None)
        require(
            lonely is None or self.has_tasks,
            f"evaluate.{lonely} is about tasks, and none is named. Set evaluate.tasks or evaluate.preset.",
        )

    @property
    def has_tasks(self) -> bool:
        return bool(self.tasks) or self.preset is not None


@dataclass
class ExportHfConfig(Ranged):
    model: str = ""
    """Model artifact to export."""
    dtype: str = "bf16"
    """Of the tensors written: bf16 or fp32."""
    verify: bool = True
    """Load the checkpoint with transformers in float32 and compare its logits with Megatron's."""
    tolerance: float = ranged(1e-3, above=0)
    """Largest difference of a logit that passes, in float32, as a fraction of the largest logit."""
    family: str | None = None
    """Hugging Face family of the checkpoint; null: the model's own. A llama without biases is the same as a mistral."""
    prompt: str | None = None
    """Text the exported model continues, for a first look; null generates nothing."""
    new_tokens: int = ranged(64, at_least=1)
    """Tokens it adds."""
    seed: int = ranged(1234, at_least=0, at_most=SEEDS)
    trainer: Layout = field(default_factory=Layout)
    output: str = how("runs/export")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.dtype in EXPORT_DTYPES, f"export_hf.dtype={self.dtype} is not known; use bf16 or fp32.")


@dataclass
class ReportRow:
    """One model of the report's table."""

    model: str = ""
    """Model artifact, such as ${distill.output}."""
    label: str | None = None
    """What the report calls it; null: the name of its folder."""
    teacher: bool = False
    """Whether the others are measured against it; of several, against the last one whose held-out loss is known."""
    optional: bool = False
    """Whether a run without it lacks nothing."""

    @property
    def title(self) -> str:
        return self.label if self.label is not None else Path(self.model).name


@dataclass
class ReportConfig:
    run_dir: Path
    """Where the chain of stages wrote its artifacts."""
    output: Path
    """The artifact to write: holds report.html and summary.json."""
    rows: list[ReportRow] = field(default_factory=list)
    """The table's models, in its order. Other models of run_dir are rows too, called as their folders are: teachers
    above these, the others below, each after those it was made from."""
    expected_order: list[str] = field(default_factory=list)
    """Labels or folder names of rows, from the lowest held-out loss to the highest; the report says whether it holds.
    Empty: none is claimed."""

    def __post_init__(self) -> None:
        self.run_dir, self.output = Path(self.run_dir), Path(self.output)
        output, run_dir = self.output.resolve(), self.run_dir.resolve()
        require(
            output != run_dir and output not in run_dir.parents,
            f"output={self.output} would take the place of run_dir={self.run_dir} and all it holds. "
            f"Set output={self.run_dir / 'report'}.",
        )
        for number, row in enumerate(self.rows):
            require(
                bool(row.model),
                f"report.rows[{number}] names no model. Give it one, such as model: ${{distill.output}}.",
            )
        titles, models = [row.title for row in self.rows], [Path(row.model) for row in self.rows]
        for title, model in zip(titles, models, strict=True):
            require(models.count(model) == 1, f"report.rows names {model} more than once; one row shows it.")
            require(
                titles.count(title) == 1,
                f"{titles.count(title)} of report.rows are called {title!r}. Give each a label of its own.",
            )


def runs_in_one_process(config: Any) -> bool:
    """Whether one process does all that a stage does, so that others would only wait for it."""
    return isinstance(config, PrepareDataConfig | PruneHfConfig | ReportConfig | ThroughputConfig) or (
        isinstance(config, PruneConfig) and config.offline
    )


@dataclass
class CompressConfig:
    steps: list[Any] = field(default_factory=list)
    """Steps in the order they run: the name of a section, or {stage, name, from} of one more (recipe.py)."""


@dataclass
class SubmitConfig:
    dry_run: bool = False
    """Write the sbatch scripts without submitting them."""
