"""Sequential refit: student beside teacher, layer by layer; what reads and what writes the stream is fitted anew.

    teacher's stream  ->  layer as it is                  ->  its stream in the middle of the layer, and behind it
    student's stream  ->  norm: A  ->  attention          ->  linear_proj: least squares of the teacher's in the middle
                      ->  norm: A  ->  MLP                ->  linear_fc2: least squares of the teacher's behind

Each fit (refits.py) sees what the student's own layers below really say, so that it mends what they lost. Layers are
changed in place in the teacher's shape: dropped channels are silent, dropped neurons and heads have columns of 0 in
what reads them, gammas are 1 where their readers have taken them in. So surgery then cuts a model that computes the
same. A layer before dropped ones is asked for the stream behind those. Micro-batches that are held out pass through the
student and nothing is fitted to them: they tell what it misses, and can choose how near to plain selection a fit stays.

Communication: see two_streams.py and refits.py; pipeline stages work one after the other. Where several ranks fit one
thing, the first of them does. Memory: the streams of the calibration set four times, on the host where there is an
accelerator; of one linear at a time what compensation needs, twice with tokens held out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from minitron_nemo.activations.hooks import evaluating, hooks_until_the_end, on_input
from minitron_nemo.activations.routing import Routing
from minitron_nemo.axes import norm_of, parameter_axes
from minitron_nemo.axis_expressions import Named
from minitron_nemo.checks import require
from minitron_nemo.config.pruning import CompensationConfig, SequentialConfig
from minitron_nemo.least_squares.elimination import inputs_of
from minitron_nemo.least_squares.fits import eliminate_and_refit, refit
from minitron_nemo.parallel import Groups, gather_objects, group_rank, group_size, is_rank_zero, told_by
from minitron_nemo.places import (
    EXPERT,
    FINAL_NORM,
    INPUT_NORM,
    OUTPUT,
    PRE_MLP_NORM,
    READERS,
    BuiltNorm,
    NormOfLayer,
    final_norm_in,
    in_layer,
    layer_of,
    norm_in,
    with_layer,
)
from minitron_nemo.plan import PruningPlan
from minitron_nemo.progress import Reporter
from minitron_nemo.pruning.compensation import (
    is_cut,
    pools_of,
    refit_experts,
    require_no_problem,
    say_what_was_not_refitted,
)
from minitron_nemo.pruning.depth_correction import dropped_runs
from minitron_nemo.pruning.kept_stream import KeptStream
from minitron_nemo.pruning.refits import Fit, Reader, Writer
from minitron_nemo.pruning.second_moments import CalibrationPass, ExpertInputs, announced_batch
from minitron_nemo.pruning.two_streams import FITTED, TwoStreams, capture
from minitron_nemo.shape import DIM_OF_AXIS
from minitron_nemo.weights import bare_gpt, local_parameters

Through = Callable[[Any, Tensor, dict[str, Any]], Tensor]
"""(layer, stream entering, what layers are called with beside it) -> stream behind: of a half of a layer."""

Kept: TypeAlias = dict[str, dict[int | tuple[int, int], tuple[int, ...]]]
"""Axis -> layer, or layer and expert -> the neurons or heads that stay, where some were cut."""


@dataclass(frozen=True)
class RefittedPlace:
    """A norm whose readers were refitted, or a linear that writes."""

    name: str
    plain_error: float
    """Share of the teacher's sum of squares there that the student misses with plain selection (of a writer: of what it
    would have to add to the stream), over the calibration tokens."""
    error: float
    """The same of the refitted one. Of the final norm before tied embeddings, where the error of logits is made small,
    it is that of what the output layer reads."""
    held_out_error: float | None
    """The same over the held-out tokens; None: there are none, or it is an expert's."""
    ridge: float


@dataclass(frozen=True)
class SequentialRefit:
    """The outcome."""

    plan: PruningPlan
    """What to cut the model by: other neurons and heads where they were chosen anew, and the norms' scales."""
    places: tuple[RefittedPlace, ...]
    """In the order of the forward pass; equal on every rank."""
    output: Tensor | None
    """Of a student whose output layer is parted from the embedding, on the last stage: this rank's rows of its weight,
    [v/tp, k]."""
    exponents: dict[str, Tensor]
    """By refitted norm of the teacher, powers of two [k] near the gammas its readers took in; equal on every rank."""

    def finish(self, student: nn.Module) -> None:
        """Set, in what surgery cut by `plan`, what had no place in the teacher; and let the norms have the size of the
        teacher's gammas again, and what reads them that of its weights: an optimizer's steps are as large for a weight
        of any size. By powers of two, so that no bit of what the student computes is another; so not of gammas that are
        stored less 1, whose sums round."""
        parameters, layers = local_parameters(student), self.plan.layer.tolist()
        if self.output is not None:
            parameters[OUTPUT].data.copy_(self.output)
        if bare_gpt(student).config.layernorm_zero_centered_gamma:
            return
        for name, parameter in parameters.items():
            norm, layer = norm_of(name), layer_of(name)
            weight = norm or name  # of the norm that it reads, or is
            if layer is not None:
                weight = with_layer(weight, layers[layer])
            exponents = self.exponents.get(weight.removesuffix(".weight"))
            if exponents is None:
                continue
            exponents = exponents.to(parameter.device)
            if norm is None:
                parameter.data.copy_(torch.ldexp(parameter.data, exponents))
            else:
                sign = 1 if name.endswith(".bias") else -1
                parameter.data.copy_(torch.ldexp(parameter.data, sign * exponents))


@torch.no_grad()
def refit_sequentially(
    model: nn.Module, plan: PruningPlan, groups: Groups, run: CalibrationPass, config: SequentialConfig | None = None
) -> SequentialRefit:
    """Refit, in place, all of a model that reads or writes its residual stream to the cut that is to come.

    Args:
        model: GPTModel of shape plan.source on this rank, bare or wrapped. Afterwards it computes what the student
            will, after the embedding.
        run: called once.
    Communicates: see the module's text; every rank takes part.
    Raises: ValueError, on every rank: a plan that merges heads, or keeps channels of a LayerNorm's stream; activations
        are not finite, or a second moment not positive definite (names the place).
    """
    config = config or SequentialConfig()
    _require_supported(plan)
    gpt = bare_gpt(model)
    stream = KeptStream(plan.hidden, plan.source.hidden_size, next(gpt.parameters()).device)
    with evaluating(gpt):
        streams = capture(gpt, list(dropped_runs(plan)), groups, run, stream.within, config.held_out)
        places: list[RefittedPlace] = []
        kept: list[Kept] = []
        exponents: dict[str, Tensor] = {}
        with Reporter("refitting layers", len(plan.layer), show=is_rank_zero()) as reporter:
            mine, layers = _Stage(gpt, plan, groups, stream, streams, config, reporter.update), 0
            for stage in range(group_size(groups.pp)):
                problem = mine.problem_of_refitting() if stage == group_rank(groups.pp) else None
                said = problem, mine.places, mine.kept, mine.exponents, mine.layers
                problem, of_stage, kept_there, exponents_there, done = told_by(said, source=stage, group=groups.pp)
                require(problem is None, problem or "")
                exponents |= exponents_there
                places += of_stage
                kept.append(kept_there)
                layers += done
                if stage > 0:
                    reporter.update(layers)
                streams.hand_student_over(stage, groups)
    return SequentialRefit(_plan_of(plan, kept), tuple(places), mine.output, exponents)


def _require_supported(plan: PruningPlan) -> None:
    source = plan.source
    require(
        plan.head_partner is None,
        "plan.head_partner merges dropped heads into kept ones, and prune.surgery.refit=sequential refits what the "
        "kept heads alone say. Use one of them: prune.merge_heads=false, or prune.surgery.refit=none.",
    )
    require(
        plan.has_basis or source.normalization == "RMSNorm" or not is_cut(plan, "hidden"),
        f"{source.normalization} takes off the mean over all channels, which a student of some of them does not: "
        "prune.surgery.refit=sequential needs the axes of the stream there. Set prune.surgery.basis=rotation, or "
        "prune.surgery.refit=none.",
    )


def _plan_of(plan: PruningPlan, kept: Sequence[Kept]) -> PruningPlan:
    """`plan` with the neurons and heads that stayed, and norms that divide by what the student's divide by."""
    entries: dict[str, Any] = {}
    for of_stage in kept:
        for axis, rows in of_stage.items():
            entry = entries.setdefault(axis, getattr(plan, axis).clone())
            for place, row in rows.items():
                entry[place] = torch.tensor(row)
    have, keep, norms = plan.source.hidden_size, plan.target.hidden_size, 2 * plan.source.num_layers + 1
    scale = None if have == keep else torch.full((norms,), (have / keep) ** 0.5, dtype=torch.float64)
    return dataclasses.replace(plan, norm_scale=scale, **entries)


class _Stage:
    """The refit of this pipeline stage's layers."""

    def __init__(
        self,
        gpt: Any,
        plan: PruningPlan,
        groups: Groups,
        stream: KeptStream,
        streams: TwoStreams,
        config: SequentialConfig,
        gets_on: Callable[[int], None],
    ) -> None:
        """
        Args:
            gets_on: told how many layers are done, after each.
        """
        self._gpt, self._plan, self._groups, self._config = gpt, plan, groups, config
        self._gets_on = gets_on
        self.layers = 0
        """How many were refitted."""
        self._stream, self._streams = stream, streams
        self._parameters = local_parameters(gpt)
        self.places: list[RefittedPlace] = []
        self.kept: Kept = {}
        self.output: Tensor | None = None
        self.exponents: dict[str, Tensor] = {}

    def problem_of_refitting(self) -> str | None:
        """Refit; what stands in the way, in words, where something does. Communicates: tp, cp and dp."""
        try:
            self._refit()
        except ValueError as problem:
            return str(problem)
        return None

    def _refit(self) -> None:
        layers, kept = list(self._gpt.decoder.layers), set(self._plan.layer.tolist())
        runs: list[list[Any]] = [[]]  # the dropped layers at the beginning; then each kept one, and those after it
        for layer in layers:
            if layer.layer_number - 1 in kept:
                runs.append([])
            runs[-1].append(layer)
        if runs[0]:
            self._streams.advance_teacher(partial(_through, runs[0]))
        for layer, *dropped in runs[1:]:
            self._refit_layer(layer, dropped)
            self.layers += 1
            self._gets_on(self.layers)
        final = final_norm_in(self._gpt)
        if final is not None:
            self._refit_output(final)

    def _refit_layer(self, layer: Any, dropped: Sequence[Any]) -> None:
        """
        Args:
            dropped: the layers of this stage after it, up to the next kept one.
        """
        index, streams = layer.layer_number - 1, self._streams
        reader = self._reader(layer, INPUT_NORM)
        middle, behind = [], []
        for batch, teacher, student, current in streams.announced():
            reader.see(teacher, student, current, batch.part)
            half = attend(layer, teacher, batch.beside)
            middle.append(half.cpu())
            behind.append(_through(dropped, think(layer, half, batch.beside), batch.beside).cpu())
        self._silence_writers(index)
        self._set_readers(reader)
        self._refit_writer(layer, "head", attend, middle)
        reader = self._reader(layer, PRE_MLP_NORM)
        for (batch, _, student, current), half in zip(streams.announced(), middle, strict=True):
            student = attend(layer, student, batch.beside)
            reader.see(half.to(student.device), student, current, batch.part)
            batch.student = student.cpu()
        self._set_readers(reader)
        wanted = streams.behind.get(index, behind)
        with self._experts_of(layer):
            if not self._plan.source.has_experts(index):
                self._refit_writer(layer, "ffn", think, wanted)
            elif self._plan.source.moe_shared_expert_intermediate_size is not None:
                self._refit_writer(layer, "shared_expert_ffn", think, wanted)
            for (batch, _, student, _), end in zip(streams.announced(), behind, strict=True):
                batch.teacher, batch.student = end, think(layer, student, batch.beside).cpu()

    def _reader(self, layer: Any, norm: NormOfLayer) -> Reader:
        name = in_layer(layer.layer_number - 1, norm.name)
        return Reader(name, norm_in(layer, norm), self._stream, self._groups, self._streams.parts)

    def _silence_writers(self, index: int) -> None:
        """Let all that writes to the stream in a layer leave dropped channels alone."""
        if self._stream.is_whole:
            return
        for name, parameter in self._parameters.items():
            row = parameter_axes(name)
            writes = layer_of(name) == index and row.axes[0] == Named("hidden") and row.norm is None
            if writes:
                parameter.data.copy_(self._stream.within(parameter.data.t()).t())

    def _set_readers(self, reader: Reader) -> None:
        fit, stream = reader.solve(self._config.reader_ridge), self._stream
        self._note(reader.name, fit)
        if stream.is_whole and not bool(fit.solution.any()):
            return
        gamma, readers = reader.norm.gamma().double(), self._readers_of(reader.name)
        self._set_bias(reader.name, _map(gamma, fit.solution, stream), readers)
        for weight in readers.values():
            weight.copy_(stream.spread(_read(weight, gamma, fit.solution, stream)))
        self._fold(reader, gamma)

    def _readers_of(self, norm: str) -> dict[str, Tensor]:
        """The matrices on this rank that read a norm."""
        return {
            name: parameter.data
            for name, parameter in self._parameters.items()
            if norm_of(name) == f"{norm}.weight" and name.endswith(".weight")
        }

    def _fold(self, reader: Reader, gamma: Tensor) -> None:
        """Gammas of 1, as what reads them has taken them in."""
        self.exponents[reader.name] = _exponents(gamma, self._stream)
        self._set_gamma(reader, torch.ones_like(gamma))

    def _set_gamma(self, reader: Reader, gamma: Tensor) -> None:
        stored = self._parameters[f"{reader.name}.weight"]
        stored.data.copy_(gamma - float(reader.norm.config.layernorm_zero_centered_gamma))

    def _set_bias(self, norm: str, read: Tensor, readers: dict[str, Tensor]) -> None:
        """Let a norm's bias, if it has one, come through A [h, k] as it came through gamma; what A cannot say, its
        readers' biases do.

        Args:
            readers: by name, as they were.
        """
        bias = self._parameters.get(f"{norm}.bias")
        if bias is None:
            return
        said = torch.linalg.lstsq(read, bias.data.double().unsqueeze(1)).solution
        left = bias.data.double() - (read @ said).squeeze(1)
        bias.data.copy_(self._stream.spread(said.squeeze(1)))
        for name, weight in readers.items():
            of_reader = self._parameters.get(name.removesuffix("weight") + "bias")
            if of_reader is not None:
                of_reader.data.add_((weight.double() @ left).to(of_reader.dtype))

    @contextmanager
    def _experts_of(self, layer: Any) -> Iterator[None]:
        """The layer's experts as the student has them: none but the kept ones, and these refitted to their neurons."""
        index, plan = layer.layer_number - 1, self._plan
        if not plan.source.has_experts(index):
            yield
            return
        assert plan.expert is not None
        with routed_among(layer.mlp, plan.expert[index].tolist()):
            if is_cut(plan, "expert_ffn"):
                self._refit_experts(layer)
            yield

    def _refit_experts(self, layer: Any) -> None:
        """Each to what it says with all its neurons, on the student's tokens that come to it, as compensation does."""
        index, plan, groups, current = layer.layer_number - 1, self._plan, self._groups, announced_batch()
        routing = Routing(index, layer.mlp, groups, current, sequence_parallel=layer.config.sequence_parallel)
        seen = ExpertInputs(routing, layer.mlp, plan.source, groups)
        with hooks_until_the_end() as handles:
            routing.show(seen.see, handles)
            for batch, _, student, _ in self._streams.announced():
                # ranks that share experts pass together, and another's micro-batch may be one that is fitted
                current.announce(batch.mask if batch.part == FITTED else batch.mask.of_nothing())
                think(layer, student, batch.beside)
        config = CompensationConfig(selection=self._config.selection)
        if self._config.writer_ridge is not None:
            config = dataclasses.replace(config, ridge=self._config.writer_ridge)
        everyone = gather_objects(refit_experts(seen, plan, groups, config), group=groups.ep)
        outcomes = sorted((each for some in everyone for each in some), key=lambda each: each.linear.expert or 0)
        require_no_problem(outcomes, groups)
        say_what_was_not_refitted(outcomes, plan, self._config)
        for outcome in outcomes:
            linear = outcome.linear
            assert linear.expert is not None
            name = in_layer(index, f"mlp.{EXPERT.replace('{e}', str(linear.expert))}linear_fc2")
            self.places.append(RefittedPlace(name, linear.plain_error, linear.error, None, config.ridge))
            self.kept.setdefault("expert_ffn", {})[index, linear.expert] = outcome.kept

    def _refit_writer(self, layer: Any, axis: str, through: Through, wanted: Sequence[Tensor]) -> None:
        """
        Args:
            wanted: the teacher's stream behind it, of every micro-batch.
        """
        index, plan, linear = layer.layer_number - 1, self._plan, layer.get_submodule(READERS[axis])
        current = announced_batch()
        blocks = getattr(plan.source, DIM_OF_AXIS[axis])
        name = in_layer(index, READERS[axis])
        writer = Writer(name, linear, blocks, self._stream, self._groups, current, self._streams.parts)
        handle = linear.register_forward_pre_hook(on_input(writer.see_input))
        try:
            for (batch, _, student, _), teacher in zip(self._streams.announced(), wanted, strict=True):
                current.announce(batch.mask)
                behind = through(layer, student, batch.beside)
                writer.see_output(teacher.to(student.device), behind, batch.part)
        finally:
            handle.remove()

        def choose(best: Tensor, moment: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
            if not is_cut(plan, axis):
                return torch.arange(blocks), best
            if self._config.chooses and bool(moment.diagonal().sum() > 0):
                kept, refitted = eliminate_and_refit(best, moment, *pools_of(axis, index, plan), ridge)
            else:
                kept = getattr(plan, axis)[index]
                refitted = refit(best, moment, inputs_of(kept, len(moment) // blocks), ridge)
            return kept, refitted.weight

        fit = writer.solve(self._config.writer_ridge, choose)
        self._note(name, fit)
        if is_cut(plan, axis):
            self.kept.setdefault(axis, {})[index] = fit.kept

    def _refit_output(self, norm: BuiltNorm) -> None:
        """What reads the final norm: the output layer, or before tied embeddings the norm's own weights."""
        reader, stream = Reader(FINAL_NORM, norm, self._stream, self._groups, self._streams.parts), self._stream
        for batch, teacher, student, current in self._streams.announced():
            reader.see(teacher, student, current, batch.part)
        if not self._plan.source.share_embeddings_and_output_weights:
            self._set_readers(reader)
            return
        output, gamma = self._gpt.shared_embedding_or_output_weight(), norm.gamma().double()
        if self._plan.unties:
            fit = reader.solve(self._config.reader_ridge)
            self.output = _read(output, gamma, fit.solution, stream).to(output.dtype)
            self._set_bias(reader.name, _map(gamma, fit.solution, stream), {})
            self._fold(reader, gamma)
        else:
            fit = reader.solve_tied(output, self._config.reader_ridge)
            self._set_gamma(reader, gamma + stream.spread(fit.solution))
        self._note(reader.name, fit)

    def _note(self, name: str, fit: Fit) -> None:
        self.places.append(RefittedPlace(name, fit.plain_error, fit.error, fit.held_out_error, fit.ridge))


def _exponents(gamma: Tensor, stream: KeptStream) -> Tensor:
    """Powers of two near a norm's gammas [h], int16 [k] on the host: of axes, all near the root mean square."""
    typical = gamma.square().mean().sqrt().clamp(min=2.0**-14)
    sizes = typical.expand(stream.keep) if stream.is_basis else stream.coordinates(gamma).abs()
    return sizes.clamp(min=typical / 16).log2().round().short().cpu()


def attend(layer: Any, stream: Tensor, beside: dict[str, Any]) -> Tensor:
    """The stream behind a layer's attention: [s/cp, b, h]. Communicates: as the layer."""
    return _added(stream, layer.self_attention(layer.input_layernorm(stream), **beside))


def think(layer: Any, stream: Tensor, beside: dict[str, Any]) -> Tensor:
    """The stream behind a layer's MLP, from that behind its attention. Communicates: as the layer."""
    return _added(stream, layer.mlp(layer.pre_mlp_layernorm(stream)))


@contextmanager
def routed_among(mlp: Any, experts: Sequence[int]) -> Iterator[None]:
    """Inside, a layer of experts routes tokens as if it had no others than these."""
    gating, dropped = mlp.router.gating, sorted(set(range(mlp.config.num_moe_experts)) - set(experts))

    def gate(tokens: Tensor) -> Tensor:
        logits: Tensor = gating(tokens)
        return logits.index_fill(-1, torch.tensor(dropped, dtype=torch.int64, device=logits.device), -torch.inf)

    mlp.router.gating = gate
    try:
        yield
    finally:
        del mlp.router.gating


def _added(stream: Tensor, output_and_bias: tuple[Tensor, Tensor | None]) -> Tensor:
    output, bias = output_and_bias
    return stream + (output if bias is None else output + bias)


def _through(layers: Iterable[Any], stream: Tensor, beside: dict[str, Any]) -> Tensor:
    for layer in layers:
        stream = think(layer, attend(layer, stream, beside), beside)
    return stream


def _read(weight: Tensor, gamma: Tensor, change: Tensor, stream: KeptStream) -> Tensor:
    """W A, [o, k] float64, of a matrix [o, h] that reads a norm: A = diag(gamma) P + change."""
    whole = weight.detach().double()
    return stream.coordinates(whole * gamma) + whole @ change


def _map(gamma: Tensor, change: Tensor, stream: KeptStream) -> Tensor:
    """A [h, k] float64."""
    return _read(torch.eye(len(gamma), dtype=torch.float64, device=gamma.device), gamma, change, stream)
