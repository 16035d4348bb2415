"""The registry: who is asked first, what a refusal says, and a kernel added in one place."""

from dataclasses import replace

import pytest
import torch
from tolerances import LINEAR, relative_error
from torch import fx, nn

import gptq_fx
from gptq_fx import ConfigError, GPTQConfig, KernelError, QuantizedWeight, Scheme
from gptq_fx.grid import round_to_nearest
from gptq_fx.kernels import (
    Kernel,
    LinearSpec,
    choose_kernel,
    get_kernel,
    kernels,
    measured,
    register,
    registry,
)
from gptq_fx.kernels.reference import REFERENCE
from gptq_fx.ops import define

SPEC = LinearSpec(64, 32, Scheme(4, 32), torch.float32, "cpu")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))


def stub(name, order=1, device=None, missing=None, refusal=None, note=None):
    """A kernel that is only asked, never run."""
    return register(
        Kernel(
            name=name,
            device=device,
            order=order,
            available=lambda: missing,
            supports=lambda spec: refusal,
            pack=REFERENCE.pack,
            unpack=REFERENCE.unpack,
            op=REFERENCE.op,
            op_args=REFERENCE.op_args,
            cut_at=REFERENCE.cut_at,
            cut=REFERENCE.cut,
            note=lambda spec: note,
        )
    )


def test_the_smallest_order_is_asked_first():
    late, early = stub("late", 3), stub("early", 2)
    assert [k for k in kernels() if k in (late, early)] == [early, late]
    assert choose_kernel(SPEC) == (early, "")


FAST, SLOW = dict.fromkeys(measured.MIX, 1.0), dict.fromkeys(measured.MIX, 2.0)


@pytest.mark.parametrize(
    ("times", "first"),
    [
        ({"a": SLOW, "b": FAST}, "b"),
        ({"a": FAST, "b": SLOW}, "a"),
        ({"a": SLOW, "b": {**FAST, 16: 9.0}}, "b"),  # 9^(1/4) < 2
        ({"a": SLOW, "b": {**FAST, 16: 17.0}}, "a"),
        ({"a": SLOW, "b": {1: 0.1}}, "a"),  # not the whole mix
        ({"b": FAST}, "a"),
    ],
)
def test_kernels_that_were_measured_change_places(monkeypatch, times, first):
    monkeypatch.setattr(measured, "capability", lambda: (9, 0))
    monkeypatch.setattr(measured, "TIMES", {((9, 0), 4): times})
    monkeypatch.setattr(measured, "BLOCKS", {})
    found = {name: stub(name, order, "cuda") for order, name in enumerate(("a", "between", "b"))}
    spec = replace(SPEC, device="cuda")
    names = [kernel.name for kernel in registry.ranked(spec) if kernel.name in found]
    assert (names[0], names[1]) == (first, "between")
    act_order = replace(spec, scheme=Scheme(4, 32, desc_act=True))
    for unmeasured in (SPEC, act_order, replace(spec, experts=2), replace(spec, scheme=Scheme(8, 32))):
        assert registry.ranked(unmeasured) == kernels()
    monkeypatch.setattr(measured, "capability", lambda: (8, 0))
    assert registry.ranked(spec) == kernels()


@pytest.mark.parametrize(("experts", "first"), [(8, "a"), (16, "a"), (60, "b"), (256, "b"), (None, "a")])
def test_a_stack_is_ranked_as_the_block_with_the_nearest_number_of_experts(monkeypatch, experts, first):
    monkeypatch.setattr(measured, "capability", lambda: (9, 0))
    monkeypatch.setattr(measured, "TIMES", {})
    blocks = {128: {"a": SLOW, "b": FAST}, 8: {"a": FAST, "b": SLOW}}
    monkeypatch.setattr(measured, "BLOCKS", {((9, 0), 4): blocks})
    found = {name: stub(name, order, "cuda") for order, name in enumerate(("a", "b"))}
    ranked = registry.ranked(replace(SPEC, device="cuda", experts=experts))
    assert next(kernel.name for kernel in ranked if kernel.name in found) == first


def test_the_tables_of_times_name_kernels():
    blocks = (entry for by_experts in measured.BLOCKS.values() for entry in by_experts.values())
    for entry in (*measured.TIMES.values(), *blocks):
        assert set(entry) <= {kernel.name for kernel in kernels()}


def test_on_hopper_our_marlin_comes_first_but_for_a_few_experts(monkeypatch):
    monkeypatch.setattr(measured, "capability", lambda: (9, 0))

    def first(**changes):
        ranked = registry.ranked(replace(SPEC, device="cuda", **changes))
        return next(kernel.name for kernel in ranked if kernel.device == "cuda")

    assert (first(), first(experts=128), first(experts=8)) == ("marlin", "marlin", "humming")
    assert first(scheme=Scheme(8, 32)) == first(scheme=Scheme(4, 32, desc_act=True)) == "humming"


def test_the_choice_says_why_others_were_passed_over():
    stub("broken", 1, missing="no driver")
    stub("picky", 2, refusal="64 inputs are too few")
    stub("elsewhere", 3, device="meta")  # of another device: of no interest to the user
    chosen = stub("good", 4, note="in 4 bits")
    assert choose_kernel(SPEC) == (chosen, "broken: no driver; picky: 64 inputs are too few; in 4 bits")


def test_no_kernel_lists_every_reason(monkeypatch):
    monkeypatch.setattr(registry, "_KERNELS", {})
    stub("broken", missing="no driver")
    stub("picky", refusal="too few")
    with pytest.raises(KernelError) as error:
        choose_kernel(SPEC, site="layers.0.up")
    assert str(error.value) == (
        "layers.0.up: no kernel runs [32, 64] W4A16 g32 sym torch.float32 on cpu. "
        "broken: no driver; picky: too few"
    )


def test_a_forced_kernel_that_refuses_lists_every_reason():
    stub("broken", missing="no driver")
    stub("elsewhere", device="meta")
    with pytest.raises(KernelError) as error:
        choose_kernel(SPEC, "elsewhere", "layers.0.up")
    message = str(error.value)
    assert message.startswith(
        "layers.0.up: kernel 'elsewhere' cannot run [32, 64] W4A16 g32 sym torch.float32"
    )
    assert "elsewhere: runs on meta, the weight is on cpu" in message
    assert "broken: no driver" in message
    assert "reference: could run it" in message
    assert all(f"{kernel.name}: " in message for kernel in kernels())


def test_a_forced_kernel_is_taken_whatever_the_order():
    stub("first", 1)
    assert choose_kernel(SPEC, "reference") == (get_kernel("reference"), "")


def test_an_unknown_kernel_names_the_legal_ones_and_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown kernel 'cpu_int'\. Did you mean 'cpu_int4'\?") as error:
        choose_kernel(SPEC, "cpu_int")
    assert all(name in str(error.value) for name in ("auto", "cpu_int4", "reference"))


def test_a_name_is_registered_once():
    first = stub("mine")
    with pytest.raises(KernelError, match="a kernel named 'mine' is registered already"):
        stub("mine")
    assert get_kernel("mine") is first


def test_reference_runs_everything_and_is_asked_last():
    assert kernels()[-1].name == "reference"
    for spec in (SPEC, LinearSpec(72, 5, Scheme(3, -1, False, True), torch.float16, "meta")):
        assert get_kernel("reference").refuses(spec) is None


# --- a kernel in one place

CALLS = []


@pytest.fixture(scope="module")
def toy_op():
    @define("toy_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int middle) -> Tensor")
    def toy_linear(x, codes, scales, bias, middle):
        CALLS.append(x.shape)
        per_input = scales.repeat_interleave(codes.shape[0] // scales.shape[0], 0)
        y = x @ ((codes.to(x.dtype) - middle) * per_input)
        return y if bias is None else y + bias

    return toy_linear


@pytest.fixture
def toy(toy_op):
    """All that somebody writes to add a kernel: codes as bytes, symmetric only."""
    CALLS.clear()
    return register(
        Kernel(
            name="toy",
            device="cpu",
            order=0,
            available=lambda: None,
            supports=lambda spec: None if spec.scheme.sym else "symmetric only",
            pack=lambda weight, spec: (weight.codes(), weight.scales),
            unpack=lambda tensors, spec: QuantizedWeight.from_codes(*tensors, None, spec.scheme.bits),
            op=toy_op,
            op_args=lambda spec: (2 ** (spec.scheme.bits - 1),),
            cut_at=lambda spec: 1,
            cut=lambda tensors, spec, start, stop: tuple(t[:, start:stop] for t in tensors),
        )
    )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(64, 32, bias=False), nn.Linear(64, 32)
        self.o = nn.Linear(32, 64)

    def forward(self, x):
        return self.o(self.q(x) * self.k(x))


def rounded(model, scheme):
    """The model with dense weights that hold the rounded numbers."""
    for linear in (model.q, model.k, model.o):
        linear.weight.data = round_to_nearest(linear.weight.detach(), scheme).dequantize()
    return model


OPTIONS = {"group_size": 32, "inner_backend": "eager"}


def test_a_kernel_added_in_one_place_runs_in_the_backend(toy):
    model, x = Block().requires_grad_(False), torch.randn(5, 64)
    y = torch.compile(model, backend=gptq_fx.backend, options=OPTIONS)(x)
    assert CALLS == [(5, 64), (5, 32)]  # q and k as one
    assert relative_error(y, rounded(model, Scheme(4, 32))(x)) <= LINEAR[torch.float32]


def test_a_kernel_added_in_one_place_runs_on_a_traced_graph(toy):
    model, x = Block().requires_grad_(False), torch.randn(5, 64)
    compiled = gptq_fx.backend(fx.symbolic_trace(model), [x], options=OPTIONS)
    CALLS.clear()
    y = compiled(x)
    assert len(CALLS) == 2
    y = y[0] if isinstance(y, tuple) else y
    assert relative_error(y, rounded(model, Scheme(4, 32))(x)) <= LINEAR[torch.float32]


def test_a_kernel_added_in_one_place_serves_quantized_parameters(toy):
    model, x = Block(), torch.randn(5, 64)
    dense = rounded(Block().requires_grad_(False), Scheme(4, 32))
    model.load_state_dict(dense.state_dict())
    report = gptq_fx.quantize(model, GPTQConfig(group_size=32), progress=False)
    assert {site.kernel for site in report.sites} == {"toy"}
    y = torch.compile(model, backend="gptq", options={"inner_backend": "eager"})(x)
    assert CALLS
    assert model.o.weight.packed.kernel is toy
    with torch.no_grad():
        assert relative_error(y, model(x)) <= LINEAR[torch.float32]
        expected = nn.functional.linear(x, model.q.weight.dequantize())
        assert relative_error(model.q(x), expected) <= LINEAR[torch.float32]


def test_explain_names_the_new_kernel_and_its_refusals(toy):
    model, x = Block(), torch.randn(5, 64)
    rules = {".*o": {"sym": False}}
    report = gptq_fx.explain(model, x, config=GPTQConfig(group_size=32, dynamic=rules))
    found = {site.name: site for site in report.sites}
    assert {name: site.kernel for name, site in found.items()} == {"q": "toy", "k": "toy", "o": "reference"}
    assert "toy: symmetric only" in found["o"].reason
