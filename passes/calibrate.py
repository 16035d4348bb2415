"""calibrate: run a graph stage by stage, so that each linear is quantized on what really reaches it.

A stage ends where linears take their input. When all calibration batches have come so far, the linears
are quantized, and every batch goes on with their new weights: each activation is computed once. Values
that no later node needs are dropped on the way.

A weight with several linears (a layer that is run again and again) is quantized at the last of them, on
the inputs of all; the ones before it run dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from gptq_fx.parameter import QuantizedParameter
from gptq_fx.passes.experts import CASTS, moves_to
from gptq_fx.passes.match import call_name, read
from gptq_fx.passes.plan import Plan, Site
from gptq_fx.passes.writes import writes_before

# Calls that leave the features of each position together: their result is the same input.
SAME_INPUT = ("view", "reshape", "contiguous", "flatten", "view_as", "reshape_as")


@dataclass(eq=False)
class Stage:
    """Linears that take the same inputs: one Hessian and one factorization serve all.

    sites: in the order of the graph; the first one of a weight that several linears use.
    end: the node before which the last of the inputs is known.
    shareable: its linears are experts, the first ones behind their routing: what one expert takes, others
        might have taken.
    """

    sites: list[Site]
    end: fx.Node
    shareable: bool = False


@dataclass(eq=False)
class Run:
    """A batch on its way through a graph.

    index: number of the batch. inputs: the values of the placeholders. env: the values that nodes from
    `place` on need. tokens: by what tells the experts of rows, how many tokens there are, and which of them
    each row is (int32 [S]), where that is known.
    """

    graph: StagedGraph
    index: int
    inputs: dict[fx.Node, Any]
    env: dict[fx.Node, Any]
    place: int = 0
    tokens: dict[fx.Node, tuple[int, Tensor]] = field(default_factory=dict)

    def again(self) -> Run:
        """The same batch, at the start."""
        return self.graph.start(list(self.inputs.values()), self.index)

    def weights(self, stage: Stage) -> list[Tensor]:
        """The parameters that the sites of a stage are called with."""
        return [self.inputs[site.weight] for site in stage.sites]


# tap(run, stage, x): what is done where the linears of a stage take their input x [*, K].
Tap = Callable[[Run, Stage, fx.Node], None]
# What a linear multiplies by in place of its dense parameter: quantized and dequantized, or itself.
WeightOf = Callable[[Tensor], Tensor]
# A weight or input of the model -> the same where the graph runs.
Here = Callable[[Tensor], Tensor]
# What a linear is to become; None leaves it.
Wanted = Callable[[Site], object]


class StagedGraph:
    """A graph that can be run as far as any of its stages.

    here: applied to placeholders where they are read. count: told of the values that are held, after each
    node.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        plan: Plan,
        wanted: Wanted,
        here: Here | None = None,
        count: Callable[[dict[fx.Node, Any]], None] | None = None,
    ) -> None:
        self.here, self.count = here, count
        self.placeholders = list(plan.values)  # the values, parameters among them, are not kept
        linears = _agreeing(plan, wanted)
        # Where a linear reads its weight: at its own node, or at a transpose in front of it.
        readers = {_reader(gm, site): site for sites in linears.values() for site in sites}
        self.weight_read_at = {node: site.weight for node, site in readers.items()}
        self.stages, self.inputs_at = _stages(gm, linears, {site: node for node, site in readers.items()})
        nodes = list(gm.graph.nodes)
        self.nodes = [n for n in nodes if n.op not in ("placeholder", "output")]
        self.output = next(n for n in nodes if n.op == "output")
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.moves = _moves(plan.sites)
        self.dead_after = _dead_after(self.nodes, self.output)
        self.interpreter = fx.Interpreter(gm)
        self._descendants: dict[tuple[fx.Node, ...], frozenset[fx.Node]] = {}

    def start(self, args: Sequence[Any], index: int = 0) -> Run:
        """A run of the graph on one value for each placeholder."""
        inputs = dict(zip(self.placeholders, args, strict=True))
        return Run(self, index, inputs, {node: value for node, value in inputs.items() if node.users})

    def advance(self, run: Run, until: Stage | None, tap: Tap, weight_of: WeightOf) -> Any:
        """Go on to the end of a stage, or (None) of the graph, whose outputs are returned."""
        stop = len(self.nodes) if until is None else self.position[until.end]
        if run.place == 0:
            self._see(run, 0, tap)
        while run.place < stop:
            self._run_node(run, self.nodes[run.place], weight_of)
            run.place += 1
            self._see(run, run.place, tap)
        if until is not None:
            return None
        return fx.node.map_arg(self.output.args[0], run.env.__getitem__)

    def descendants(self, nodes: tuple[fx.Node, ...]) -> frozenset[fx.Node]:
        """All that depends on these nodes."""
        if nodes not in self._descendants:
            found = set(nodes)
            for node in self.nodes if nodes else ():
                if not found.isdisjoint(node.all_input_nodes):
                    found.add(node)
            self._descendants[nodes] = frozenset(found)
        return self._descendants[nodes]

    def _see(self, run: Run, place: int, tap: Tap) -> None:
        seen = self.inputs_at.get(self.nodes[place]) if place < len(self.nodes) else None
        if seen is not None:
            stage, x = seen
            tap(run, stage, x)

    def _run_node(self, run: Run, node: fx.Node, weight_of: WeightOf) -> None:
        env = run.env
        weight = self.weight_read_at.get(node)
        taken = {n: env[n] for n in node.all_input_nodes}
        if weight is not None:
            taken[weight] = weight_of(taken[weight])
        if self.here is not None:
            for n, value in taken.items():
                if n.op == "placeholder" and isinstance(value, Tensor):
                    taken[n] = self.here(value)
        self.interpreter.env = taken
        env[node] = self.interpreter.run_node(node)
        if self.count is not None:
            self.count(env)
        if node in self.moves:
            self._number(run, node, taken)
        for gone in self.dead_after.get(node, ()):
            del env[gone]
            run.tokens.pop(gone, None)

    def _number(self, run: Run, node: fx.Node, taken: dict[fx.Node, Any]) -> None:
        """Do to the numbers of tokens what a call does to tokens; taken: what it was called with."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        x = taken[source]
        if source in run.tokens:
            count, numbers = run.tokens[source]
        else:
            count = x.shape[:-1].numel()
            numbers = torch.arange(count, dtype=torch.int32, device=x.device)
            numbers = numbers.view(*x.shape[:-1], 1).expand_as(x)
        if call_name(node) not in CASTS:
            self.interpreter.env = {**taken, source: numbers}
            numbers = self.interpreter.run_node(node)
        run.tokens[node] = count, numbers
        for which in self.moves[node]:
            run.tokens[which] = count, numbers.flatten(1)[:, 0].contiguous()


def _moves(sites: Iterable[Site]) -> dict[fx.Node, list[fx.Node]]:
    """The calls that make rows of experts out of tokens; for the last of them, what tells those experts."""
    moves: dict[fx.Node, list[fx.Node]] = {}
    known: set[fx.Node] = set()
    for call in (site.experts for site in sites):
        if call is not None and call.which is not None and call.which not in known:
            known.add(call.which)
            path = moves_to(call.x)
            for node in path:
                moves.setdefault(node, [])
            if path:
                moves[path[-1]].append(call.which)
    return moves


def _agreeing(plan: Plan, wanted: Wanted) -> dict[fx.Node, list[Site]]:
    """Dense weights that are to be quantized -> their linears, which all must want the same."""
    linears: dict[fx.Node, list[Site]] = {}
    for site in plan.sites:
        if site.node is not None and not isinstance(plan.tensor(site.weight), QuantizedParameter):
            linears.setdefault(site.weight, []).append(site)
    wishes = {w: {(wanted(site), site.transposed) for site in sites} for w, sites in linears.items()}
    return {w: s for w, s in linears.items() if len(wishes[w]) == 1 and wanted(s[0]) is not None}


def _reader(gm: fx.GraphModule, site: Site) -> fx.Node:
    """The node that reads the weight for this linear; transposes between are made its own."""
    assert site.node is not None
    chain: list[fx.Node] = []
    node: Any = _weight(site)
    while node is not site.weight:
        chain.append(node)
        node = node.args[0]
    if not chain:
        return site.node
    copies: list[fx.Node] = [site.weight]
    with gm.graph.inserting_before(site.node):
        for old in reversed(chain):
            source = old.args[0]
            copies.append(
                gm.graph.node_copy(old, lambda n, source=source: copies[-1] if n is source else n)  # type: ignore[misc]
            )
    site.node.replace_input_with(chain[0], copies[-1])
    for old in chain:
        if not old.users:
            gm.graph.erase_node(old)
    return copies[1]


def _weight(site: Site) -> fx.Node:
    """What the call multiplies by: the weight, or transposes and picked experts of it."""
    assert site.node is not None
    if site.experts is None:
        spelled = read(site.node)
        assert spelled is not None and isinstance(spelled.weight, fx.Node)
        return spelled.weight
    others = [n for n in site.node.all_input_nodes if n not in (site.experts.x, site.experts.which)]
    (weight,) = others
    return weight


def _stages(
    gm: fx.GraphModule, linears: dict[fx.Node, list[Site]], reader: dict[Site, fx.Node]
) -> tuple[list[Stage], dict[fx.Node, tuple[Stage, fx.Node]]]:
    """The stages in the order of their ends; and, by the node before which it is seen, each input."""
    writes = writes_before(gm)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    by_inputs: dict[object, list[list[Site]]] = {}
    for sites in linears.values():
        same = tuple((_origin(_x(site)), site.experts, writes[site.node]) for site in sites if site.node)
        by_inputs.setdefault(same, []).append(sites)
    stages, inputs_at = [], {}
    for group in by_inputs.values():
        # The first linear of the group at each of its inputs.
        firsts = [min(uses, key=lambda site: position[reader[site]]) for uses in zip(*group, strict=True)]
        stage = Stage([sites[0] for sites in group], reader[firsts[-1]])
        stages.append(stage)
        inputs_at.update({reader[site]: (stage, _x(site)) for site in firsts})
    stages.sort(key=lambda stage: position[stage.end])
    routings: set[fx.Node | None] = {None}
    for stage in stages:
        call = stage.sites[0].experts
        stage.shareable = call is not None and call.which not in routings
        routings.add(call.which if call is not None else None)
    return stages, inputs_at


def _x(site: Site) -> fx.Node:
    if site.experts is not None:
        return site.experts.x
    assert site.node is not None
    spelled = read(site.node)
    assert spelled is not None and isinstance(spelled.x, fx.Node)
    return spelled.x


def _origin(x: fx.Node) -> fx.Node:
    """The node behind calls that only change how positions are laid out."""
    while x.op in ("call_method", "call_function") and call_name(x) in SAME_INPUT:
        source = x.args[0]
        if not isinstance(source, fx.Node) or _features(source) != _features(x):
            break
        x = source
    return x


def _features(node: fx.Node) -> object:
    example = node.meta.get("example_value")
    return example.shape[-1] if isinstance(example, Tensor) and example.ndim else None


def _dead_after(nodes: Iterable[fx.Node], output: fx.Node) -> dict[fx.Node, list[fx.Node]]:
    """Node -> what nothing needs once it has run."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last.update(dict.fromkeys(node.all_input_nodes, node))
        last[node] = node  # until something uses it
    for node in output.all_input_nodes:
        last.pop(node, None)
    dead: dict[fx.Node, list[fx.Node]] = {}
    for node, at in last.items():
        dead.setdefault(at, []).append(node)
    return dead
