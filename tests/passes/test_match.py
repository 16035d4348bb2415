"""match: every spelling of a linear is found, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import Call, after
from models import llama, logits, relative
from torch import Tensor, nn

import gptq_fx
from gptq_fx.grid import round_to_nearest
from gptq_fx.passes.plan import Site

Function = Callable[[Tensor, Tensor, Tensor], Tensor]

# W [N, K]
NK: dict[str, Function] = {
    "F.linear": lambda x, w, b: F.linear(x, w),
    "F.linear with bias": lambda x, w, b: F.linear(x, w, b),
    "F.linear by keywords": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "x @ w.T": lambda x, w, b: x @ w.T,
    "x @ w.t()": lambda x, w, b: x @ w.t(),
    "x @ w.mT": lambda x, w, b: x @ w.mT,
    "transpose(0, 1)": lambda x, w, b: x @ w.transpose(0, 1),
    "transpose(-1, -2)": lambda x, w, b: x @ w.transpose(-1, -2),
    "torch.transpose": lambda x, w, b: x @ torch.transpose(w, 0, 1),
    "permute": lambda x, w, b: x @ w.permute(1, 0),
    "transposed thrice": lambda x, w, b: x @ w.t().mT.T,
    "torch.matmul": lambda x, w, b: torch.matmul(x, w.t()),
    "x.matmul": lambda x, w, b: x.matmul(w.t()),
    "einsum bsk,nk": lambda x, w, b: torch.einsum("bsk,nk->bsn", x, w),
    "einsum ...k,nk": lambda x, w, b: torch.einsum("...k,nk->...n", x, w),
    "einsum nk,bsk": lambda x, w, b: torch.einsum("nk, bsk -> bsn", w, x),
    "einsum bsk,nk of a list": lambda x, w, b: torch.einsum("bsk,nk->bsn", [x, w]),
}
# W [K, N]
KN: dict[str, Function] = {
    "x @ w": lambda x, w, b: x @ w,
    "matmul": lambda x, w, b: torch.matmul(x, w),
    "method matmul": lambda x, w, b: x.matmul(w),
    "F.linear of w.t()": lambda x, w, b: F.linear(x, w.t(), b),
    "einsum ...k,kn": lambda x, w, b: torch.einsum("...k,kn->...n", x, w),
    "einsum kn,bsk": lambda x, w, b: torch.einsum("kn,bsk->bsn", w, x),
}
# 2-D x only
FLAT_NK: dict[str, Function] = {
    "torch.mm(w.t())": lambda x, w, b: torch.mm(x, w.t()),
    "einsum ik,jk": lambda x, w, b: torch.einsum("ik,jk->ij", x, w),
    "addmm(w.t())": lambda x, w, b: torch.addmm(b, x, w.t()),
}
FLAT_KN: dict[str, Function] = {
    "torch.mm": lambda x, w, b: torch.mm(x, w),
    "x.mm": lambda x, w, b: x.mm(w),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "b.addmm": lambda x, w, b: b.addmm(x, w),
    "addmm of a view": lambda x, w, b: torch.addmm(b, x.view(-1, 64), w),
}


def rows() -> list[object]:
    found = []
    for table, transposed, shapes in (
        (NK, False, [(2, 3, 64)]),
        (KN, True, [(2, 3, 64)]),
        (FLAT_NK, False, [(5, 64)]),
        (FLAT_KN, True, [(5, 64)]),
    ):
        for name, function in table.items():
            both = [*shapes, (5, 64)] if len(shapes[0]) == 3 and "bsk" not in name else shapes
            found += [pytest.param(function, transposed, s, id=f"{name}-{len(s)}d") for s in both]
    return found


@pytest.mark.parametrize("function, transposed, shape", rows())
def test_a_spelling_of_linear_is_matched(
    function: Function, transposed: bool, shape: tuple[int, ...]
) -> None:
    model, x = Call(function, (64, 96) if transposed else (96, 64)), torch.randn(shape)
    stage = after("match", model, x)
    assert stage.changes == 1
    assert stage.before == stage.after
    (site,) = [s for s in stage.plan.sites if not s.refusal]
    assert (site.name, site.kind, site.transposed) == ("weight", "linear", transposed)

    torch._dynamo.reset()
    found = torch.compile(model, backend="gptq", options={"inner_backend": "eager"})(x)
    dense = model.weight.mT if transposed else model.weight
    rounded = round_to_nearest(dense, gptq_fx.Scheme(group_size=64)).dequantize()
    wanted = function(x, rounded.mT if transposed else rounded, model.bias)
    assert relative(found, wanted) <= 1e-5
    assert relative(model(x), wanted) > 1e-3


LEFT: dict[str, tuple[Function, bool]] = {
    "w @ x": (lambda x, w, b: w @ x, False),
    "matmul": (lambda x, w, b: torch.matmul(w, x), False),
    "w.t() @ x": (lambda x, w, b: w.t() @ x, True),
    "w @ x.mT": (lambda x, w, b: w @ x.mT.contiguous().mT, False),
}


@pytest.mark.parametrize("shape", [(64, 3), (2, 64, 3)])
@pytest.mark.parametrize("name", LEFT)
def test_a_weight_on_the_left_is_turned_to_the_right(name: str, shape: tuple[int, ...]) -> None:
    function, transposed = LEFT[name]
    model, x = Call(function, (64, 96) if transposed else (96, 64)), torch.randn(shape)
    stage = after("match", model, x)
    assert stage.changes == 1
    assert "linear" in stage.after
    assert relative(stage.run(), model(x)) <= 1e-6
    (site,) = stage.plan.sites
    assert (site.kind, site.transposed, site.refusal) == ("linear", transposed, "")

    torch._dynamo.reset()
    found = torch.compile(model, backend="gptq", options={"inner_backend": "eager"})(x)
    dense = model.weight.mT if transposed else model.weight
    rounded = round_to_nearest(dense, gptq_fx.Scheme(group_size=64)).dequantize()
    assert relative(found, rounded @ x) <= 1e-5
    assert relative(model(x), rounded @ x) > 1e-3


NOT_LINEAR: dict[str, tuple[Function, tuple[int, ...], tuple[int, ...]]] = {
    "weight on the left of a vector": (lambda x, w, b: w @ x, (96, 64), (64,)),
    "weight on the left of a weight": (lambda x, w, b: (w @ w.t()).sum() + x, (96, 64), (64,)),
    "addmm with alpha": (lambda x, w, b: torch.addmm(b, x, w, alpha=2), (64, 96), (3, 64)),
    "addmm with beta": (lambda x, w, b: torch.addmm(b, x, w, beta=0), (64, 96), (3, 64)),
    "addmm onto a matrix": (lambda x, w, b: torch.addmm(x[:, :1], x, w), (64, 96), (3, 64)),
    "einsum to the transpose": (lambda x, w, b: torch.einsum("ik,nk->ni", x, w), (96, 64), (3, 64)),
    "einsum without a sum": (lambda x, w, b: torch.einsum("k,nk->nk", x, w), (96, 64), (64,)),
    "einsum over both": (lambda x, w, b: torch.einsum("ik,nk->i", x, w), (96, 64), (3, 64)),
    "einsum of a stack": (lambda x, w, b: torch.einsum("bk,bnk->bn", x, w), (3, 96, 64), (3, 64)),
    "einsum of three": (lambda x, w, b: torch.einsum("ik,nk,n->in", x, w, b), (96, 64), (3, 64)),
    "activation by activation": (lambda x, w, b: x @ x.mT + w.sum(), (96, 64), (2, 3, 64)),
    "weight by weight": (lambda x, w, b: F.linear(w, w) + x.sum(), (96, 64), (3, 64)),
    "stack on one row for all": (lambda x, w, b: x @ w, (2, 64, 96), (3, 64)),
    "stack on the left": (lambda x, w, b: torch.bmm(w, x), (2, 96, 64), (2, 64, 3)),
    "scaled weight": (lambda x, w, b: F.linear(x, w * 2), (96, 64), (3, 64)),
    "cast weight": (lambda x, w, b: F.linear(x.double(), w.double()), (96, 64), (3, 64)),
    "part of a weight": (lambda x, w, b: F.linear(x, w[:32]), (96, 64), (3, 64)),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b), (96, 64, 3), (1, 64, 9)),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_no_linear_stays_dense_and_says_why(name: str) -> None:
    function, weight, shape = NOT_LINEAR[name]
    model, x = Call(function, weight), torch.randn(shape)
    stage = after("match", model, x)
    assert stage.changes == 0
    (site,) = stage.plan.sites
    assert site.refusal
    torch._dynamo.reset()
    found = torch.compile(model, backend="gptq", options={"inner_backend": "eager"})(x)
    assert torch.equal(found, model(x))


def test_a_tied_projection_is_known_behind_a_graph_break() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body, self.last = nn.Embedding(96, 64), nn.Linear(64, 64), nn.Linear(64, 96)
            self.last.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.body(self.table(ids))
            torch._dynamo.graph_break()
            return self.last(x)

    model = Tied().requires_grad_(False)
    sites = {s.name: s for s in gptq_fx.explain(model, torch.tensor([[5, 7]])).sites if s.name != "table"}
    assert {name: site.kind for name, site in sites.items()} == {"body": "linear", "last": "lm_head"}
    assert sites["last"].scheme is None


class SelfAttention(nn.Module):
    """torch's own, which Dynamo keeps as one call on the weights."""

    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.inner, self.cross = nn.MultiheadAttention(64, 4, batch_first=True), cross

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[:, :2] if self.cross else x, x, x, need_weights=self.cross)[0]


def test_the_linears_of_torchs_attention_are_matched() -> None:
    model, x = SelfAttention().eval().requires_grad_(False), torch.randn(2, 5, 64)
    stage = after("match", model, x)
    assert "multi_head_attention_forward" in stage.before
    assert "multi_head_attention_forward" not in stage.after
    assert relative(stage.run(), model(x)) <= 1e-6
    found = {site.name: site.refusal for site in stage.plan.sites}
    assert found == {"inner.in_proj_weight": "", "inner.out_proj": ""}


def test_torchs_attention_is_calibrated_and_runs_without_compiling() -> None:
    model, x = SelfAttention().eval().requires_grad_(False), torch.randn(16, 8, 64)
    wanted = model(x)
    gptq_fx.quantize(model, gptq_fx.GPTQConfig(bits=8, group_size=32), [{"x": x}], progress=False)
    for weight in (model.inner.in_proj_weight, model.inner.out_proj.weight):
        assert isinstance(weight, gptq_fx.QuantizedParameter)
    assert 0 < relative(model(x), wanted) <= 0.02
    compiled = torch.compile(model, backend="gptq", options={"inner_backend": "eager"})
    assert relative(compiled(x), model(x)) <= 1e-5


def test_queries_apart_from_keys_leave_the_shared_projection_dense() -> None:
    model, x = SelfAttention(cross=True).eval().requires_grad_(False), torch.randn(2, 5, 64)
    stage = after("match", model, x)
    assert relative(stage.run(), model(x)) <= 1e-6
    found = {site.name: site.refusal for site in stage.plan.sites}
    assert found["inner.out_proj"] == ""
    assert "split" in found["inner.in_proj_weight"]


def test_a_linear_of_a_stack_is_reported_as_such() -> None:
    stage = after("match", Call(NOT_LINEAR["stack on the left"][0], (2, 96, 64)), torch.randn(2, 64, 3))
    (site,) = stage.plan.sites
    assert site.kind == "grouped_linear"
    assert "bmm" in site.refusal


def test_linears_one_behind_the_other() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).requires_grad_(False)
    stage = after("swap", model, torch.randn(3, 64))
    assert stage.after == ["gptq.linear"] * 2


# --- kinds


def kinds(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    return {site.name: site.kind for site in after("match", model, *inputs).plan.sites}


class Router(nn.Module):
    """Experts chosen by a linear; `path` says how the choice is made."""

    def __init__(self, path: Function) -> None:
        super().__init__()
        self.pick = nn.Linear(64, 8)
        self.body = nn.Linear(64, 64)
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.path(self.pick(x), x, x)
        return self.body(x) * weights.sum(-1, keepdim=True) + index.sum()


ROUTES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "topk": lambda y, *_: y.topk(2),
    "softmax, topk": lambda y, *_: torch.topk(F.softmax(y, -1, dtype=torch.float), 2),
    "sigmoid, bias, topk": lambda y, *_: (y.sigmoid() + 0.1).view(-1, 8).topk(2, dim=-1),
    "cast, softmax, topk": lambda y, *_: torch.topk(y.to(torch.float64).softmax(-1), 2),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_linear_that_chooses_experts_is_a_router(route: str) -> None:
    model = Router(ROUTES[route]).requires_grad_(False)
    assert kinds(model, torch.randn(3, 64)) == {"pick": "router", "body": "linear"}


def test_a_linear_behind_which_another_linear_chooses_is_no_router() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.pick = nn.Linear(64, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.pick(self.inner(x).relu()).topk(2).values

    assert kinds(Deep().requires_grad_(False), torch.randn(3, 64)) == {"inner": "linear", "pick": "router"}


class Language(nn.Module):
    """An embedding, a linear, and an output projection called `head`."""

    def __init__(self, rows: int = 96, head: str = "head", tied: bool = False, positions: int = 7) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 64)
        self.places = nn.Embedding(positions, 64)
        self.body = nn.Linear(64, 64)
        self.last = head
        self.add_module(head, nn.Linear(64, 96 if tied else rows, bias=False))
        if tied:
            getattr(self, head).weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.places(torch.arange(ids.shape[-1]))
        x = self.body(x).relu()
        return getattr(self, self.last)(x)


IDS = torch.tensor([[1, 2, 3]])


def test_an_output_projection_is_known_by_the_size_of_the_vocabulary() -> None:
    found = kinds(Language(80).requires_grad_(False), IDS)
    assert found == {"body": "linear", "head": "lm_head", "table": "embedding", "places": "embedding"}


def test_an_output_projection_is_known_by_its_tie() -> None:
    found = kinds(Language(tied=True, head="out").requires_grad_(False), IDS)
    assert found == {"body": "linear", "out": "lm_head", "places": "embedding"}


@pytest.mark.parametrize("name", ["lm_head", "embed_out"])
def test_an_output_projection_is_known_by_its_name(name: str) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(64, 32))

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, name)(x)

    assert kinds(Headed().requires_grad_(False), torch.randn(3, 64)) == {name: "lm_head"}


def test_a_last_linear_with_one_output_for_each_position_is_no_output_projection() -> None:
    """A table of positions with as many rows as the model is wide (bert with 512, gpt2 with 1024)."""

    class Encoder(Language):
        def forward(self, ids: Tensor) -> Tensor:
            return self.body(self.table(ids) + self.places(torch.arange(ids.shape[-1])))

    found = kinds(Encoder(rows=96, positions=64).requires_grad_(False), IDS)
    assert found["body"] == "linear"


@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_other_uses_are_named(kind: str) -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.stem = nn.Embedding(10, 64), nn.Conv1d(64, 8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.stem(self.table(ids).mT)

    assert kind in kinds(Stem().requires_grad_(False), torch.ones(1, 9, dtype=torch.long)).values()


def test_what_is_skipped_by_default_can_be_asked_for() -> None:
    model, x = Router(ROUTES["topk"]).requires_grad_(False), torch.randn(3, 64)
    rules = [gptq_fx.Rule("", "router", gptq_fx.W8A16)]
    chosen: list[Site] = after("choose", model, x, rules=rules).plan.sites
    assert {s.name: s.scheme.bits for s in chosen if s.scheme} == {"pick": 8, "body": 4}


def test_sites_of_a_whole_model_are_in_the_order_of_the_graph() -> None:
    model = llama(1)
    logits(model)
    stage = after("match", model, torch.tensor([[5, 6, 7]]))
    leaves = [site.name.rpartition(".")[2] for site in stage.plan.sites if not site.refusal]
    assert leaves == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    assert stage.changes == 8
