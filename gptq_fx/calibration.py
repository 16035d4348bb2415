"""Calibrated quantization: run batches through the graphs of a model, and hand its weights to GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from gptq_fx.backend import make_plan
from gptq_fx.batches import Batch, check_batches, for_calibration, record
from gptq_fx.config import GPTQConfig
from gptq_fx.errors import CalibrationError, OutOfMemoryError
from gptq_fx.hessian import Hessian
from gptq_fx.job import Job, Key, Rows, Take
from gptq_fx.linear import Linear
from gptq_fx.names import names_by_id
from gptq_fx.observe import observe
from gptq_fx.passes.calibrate import Run, Stage, StagedGraph, WeightOf
from gptq_fx.passes.capture import capture
from gptq_fx.passes.plan import Plan
from gptq_fx.phases import Phases, measuring, phase, settle
from gptq_fx.progress import bar
from gptq_fx.ranks import ALONE, Ranks
from gptq_fx.resume import Store
from gptq_fx.split import local_parts
from gptq_fx.streaming import Mover


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: GPTQConfig,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    resume_dir: str | None = None,
    max_memory: int | None = None,
    ranks: Ranks = ALONE,
) -> tuple[dict[int, Linear], Phases]:
    """Quantize the linears that the batches reach. All weights of all graphs, by id of the parameter; and
    where the time went.

    The model is not changed. Beside it this holds what is quantized so far, the Hessian and the dense
    weights of one stage (all Hessians, if config.sequential is off), and the live activations of every
    batch.
    device: where Hessians are kept and weights are solved; None: where the weights are.
    resume_dir: where finished stages are kept, and taken from.
    max_memory: bytes of `device`, on which all is then computed: weights are copied there stage by stage, and
        activations are in host memory between stages.
    ranks: the processes that share the work; each gets the whole model, or its part, and all batches.
    Raises CalibrationError on batches that the model cannot take, WeightError on NaN or Inf in a weight,
    OutOfMemoryError, naming the stage.
    """
    with ranks.together():
        checked = check_batches(model, batches)
    ranks.check_replicas(model, checked)
    progress = progress and ranks.rank == 0
    mover = None if max_memory is None or device is None else Mover(torch.device(device), max_memory)
    if resume_dir is not None and not config.sequential:
        raise CalibrationError("resume_dir: without sequential there are no stages to resume from")

    with local_parts(model, ranks) as splits:
        job = Job(names_by_id(model), ranks.share(checked), config, device, progress, ranks, mover, splits)
        phases = _calibrate(model, job, resume_dir)
    # A table that is split and tied was found as what it is (refused), and as the head that it is too.
    found = sorted(job.linears.values(), key=lambda linear: not linear.refused)
    return {id(linear.whole): linear for linear in found}, phases


def _calibrate(model: nn.Module, job: Job, resume_dir: str | None) -> Phases:
    def staged(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> StagedGraph:
        if gm not in job.graphs:
            graph, values = capture(gm, inputs)
            job.graphs[gm] = job.stage(graph, make_plan(graph, values, job.config, root=model))
        return job.graphs[gm]

    def observed(index: int, take: Take) -> None:
        def run(gm: fx.GraphModule, args: tuple[Any, ...]) -> Any:
            return job.observe(staged(gm, args).start(args, index), take)

        observe(model, (), job.batches[index], run)

    device = job.device or next(model.parameters()).device
    phases = Phases(torch.device(device))
    with for_calibration(model), measuring(phases):
        if job.config.sequential:
            with job.ranks.forward():
                runs = record(model, job.batches, staged)
            _in_sequence(job, runs, Store(resume_dir, model, job.config, job.batches))
        else:
            _at_once(job, observed)
        settle()
    return phases


def calibrate_graph(
    graph: fx.GraphModule,
    plan: Plan,
    batches: Sequence[tuple[Batch, Sequence[Any]]],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[int, Linear]:
    """The same for a model that is one graph, of which each batch has the values of all placeholders."""
    names = {
        id(value): plan.names(node) for node, value in plan.values.items() if isinstance(value, nn.Parameter)
    }
    job = Job(names, [batch for batch, _ in batches], plan.config, device, progress)
    staged = job.stage(graph, plan)
    runs = [staged.start(values, i) for i, (_, values) in enumerate(batches)]
    if plan.config.sequential:
        _in_sequence(job, runs, Store(None, None, plan.config, job.batches))
    else:
        _at_once(job, lambda index, take: job.observe(runs[index], take))
    return job.linears


# --- stage by stage


def _in_sequence(job: Job, runs: Sequence[Run], store: Store) -> None:
    """Each stage is quantized on what the stages before it, quantized already, make of the batches."""
    # With gptaq each batch also runs through the dense model.
    originals = [run.again() for run in runs] if job.settings.gptaq else [None] * len(runs)
    stages = {run.graph: {_key(run, stage): stage for stage in run.graph.stages} for run in runs}
    with job.ranks.together():
        order = _order([list(path) for path in stages.values()])
    job.ranks.check_same("stages", [[job.linears[i].name for i in key] for key in order])
    dense = _Dequantized(job.linears, None if job.mover is None else job.mover.device)
    if job.mover is not None:
        job.mover.check(job.need(key) for key in order)
    with bar(len(order) * len(runs), "calibrating", show=job.progress) as shown:
        for number, key in enumerate(order):
            linears = [job.linears[i] for i in key]
            try:
                if job.mover is not None:
                    job.mover.begin(job.need(key))
                stored = store.load(number, linears)
                with job.ranks.forward():
                    for run, original in zip(runs, originals, strict=True):
                        if key in stages[run.graph]:
                            _advance(job, run, original, stages[run.graph][key], dense)
                        shown.update()
                dense.clear()
                if job.mover is not None:
                    job.mover.drop()
                if not stored:
                    job.solve(key, job.hessians.pop(key))
                    store.save(number, linears)
            except torch.OutOfMemoryError as error:
                place = f"stage {number + 1} of {len(order)} ({linears[0].name})"
                raise OutOfMemoryError(_what_to_set(place, store)) from error
            settle()
            shown.set_postfix_str(_losses(linears))


def _what_to_set(place: str, store: Store) -> str:
    kept = "those before it are kept in resume_dir" if store.folder else "resume_dir keeps finished stages"
    return (
        f"out of memory in {place}; the model is as it was, and {kept}. What helps: batches of fewer "
        "tokens; gptaq=0, which needs half the activations; max_memory and device, for a model on the host, "
        "of which one stage at a time is copied to the device"
    )


def _advance(job: Job, run: Run, original: Run | None, until: Stage, dense: WeightOf) -> None:
    """Bring a batch to the end of a stage, and add to Hessians what linears took on the way."""
    seen: list[tuple[Key, Rows]] = []
    before: list[Rows] = []
    with _moved(job.mover, run, ()), phase("forward"):
        run.graph.advance(run, until, job.tap(lambda key, x: seen.append((key, x))), dense)
    if original is not None:
        taken = [x for _, rows in seen for x in rows]
        with _moved(job.mover, original, taken), phase("forward"):
            tap = job.tap(lambda key, x: before.append(x))
            run.graph.advance(original, until, tap, lambda weight: weight)
    for i, (key, x) in enumerate(seen):
        job.add(key, run.index, x, before[i] if original is not None else None)


@contextmanager
def _moved(mover: Mover | None, run: Run, beside: Sequence[Tensor]) -> Iterator[None]:
    """With the activations of a batch on the device, if they are not always."""
    if mover is not None:
        mover.bring(run, beside)
    yield
    if mover is not None:
        mover.park(run)


def _key(run: Run, stage: Stage) -> Key:
    return tuple(map(id, run.weights(stage)))


def _losses(linears: Sequence[Linear]) -> str:
    return ", ".join(f"{x.name} loss {x.quantized.measured.loss:.1e}" for x in linears[:1] if x.quantized)


def _order(paths: Sequence[list[Key]]) -> list[Key]:
    """The stages of all graphs, so that each comes behind those before it in every graph.

    Graphs differ with the shapes of their inputs, and with what those leave out.
    """
    order: list[Key] = []
    while any(paths):
        heads = [path[0] for path in paths if path]
        key = next((h for h in heads if all(h not in path[1:] for path in paths)), None)
        if key is None:
            raise CalibrationError(
                "the batches run through the linears of the model in different orders. "
                "Legal: GPTQConfig(sequential=False), which needs no order"
            )
        order.append(key)
        paths = [path[1:] if path[:1] == [key] else path for path in paths]
    return order


class _Dequantized:
    """parameter -> what its linear multiplies by now: quantized and dequantized, where it is so far.

    Kept while the batches pass it.
    """

    def __init__(self, linears: dict[int, Linear], device: torch.device | None = None) -> None:
        self.linears, self.device = linears, device
        self.kept: dict[int, Tensor] = {}

    def __call__(self, parameter: Tensor) -> Tensor:
        linear = self.linears[id(parameter)]
        if linear.quantized is None:
            return parameter
        if id(parameter) not in self.kept:
            weight = linear.quantized.weight
            dense = (weight if self.device is None else weight.to(self.device)).dequantize()
            # Laid out as the parameter is: some CPUs multiply bf16 a dozen times slower otherwise.
            self.kept[id(parameter)] = (dense.mT if linear.transposed else dense).contiguous()
        return self.kept[id(parameter)]

    def clear(self) -> None:
        self.kept.clear()


# --- all at once


def _at_once(job: Job, observed: Callable[[int, Take], None]) -> None:
    """Every linear is quantized on what the dense model makes of the batches, whatever graphs it has."""
    with job.ranks.forward(), bar(len(job.batches), "observing", show=job.progress) as shown:
        for index in range(len(job.batches)):

            def take(key: Key, x: Rows, index: int = index) -> None:
                job.add(key, index, x)

            observed(index, take)
            shown.update()
    stages = _disjoint(job.hessians)
    job.ranks.check_same("weights with inputs", [[job.linears[i].name for i in key] for key in stages])
    with bar(len(stages), "quantizing", show=job.progress) as shown:
        for key, same in stages.items():
            shown.set_postfix_str(_losses(job.solve(key, same)))
            shown.update()


def _disjoint(hessians: dict[Key, list[Hessian]]) -> dict[Key, list[Hessian]]:
    """Each weight in one stage: one that took several inputs gets the sum of their Hessians."""
    inputs: dict[int, list[Key]] = {}
    for key in hessians:
        for weight in key:
            inputs.setdefault(weight, []).append(key)
    stages: dict[tuple[Key, ...], Key] = {}
    for weight, keys in inputs.items():
        stages[tuple(keys)] = (*stages.get(tuple(keys), ()), weight)
    return {
        weights: [Hessian.sum(same) for same in zip(*(hessians[key] for key in keys), strict=True)]
        for keys, weights in stages.items()
    }
