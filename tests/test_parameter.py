"""QuantizedParameter: a Parameter in all that models do with one, and no dense weight in disguise."""

import copy
import gc
import io
import operator
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from tolerances import LINEAR, relative_error
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

import gptq_fx
from gptq_fx import DenseUseError, GPTQConfig, GPTQError, QuantizedParameter, Scheme
from gptq_fx.grid import round_to_nearest
from gptq_fx.kernels import cpu, get_kernel
from gptq_fx.merged import can_merge, merge
from gptq_fx.packed import PackedWeight, live

N, K = 128, 64

int4 = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))
every_layout = pytest.mark.parametrize("layout", ["reference", pytest.param("cpu_int4", marks=int4)])
every_grid = pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])


def make(layout="reference", dtype=torch.bfloat16, transposed=False, sym=True, size=32, name="layers.3.up"):
    """A quantized parameter [N, K] ([K, N] if transposed), and the dense weight it stands for, [N, K]."""
    W = torch.randn(N, K).to(dtype)
    packed = PackedWeight(round_to_nearest(W, Scheme(4, size, sym)), Scheme(4, size, sym), 0.1)
    packed.lower(get_kernel(layout))
    parameter = gptq_fx.parameter.as_parameter(QuantizedParameter(packed, name, transposed))
    return parameter, packed.unpacked().dequantize()


def quantized(model, layout="reference", **config):
    """The model, quantized in place, in some layout."""
    gptq_fx.quantize(model, GPTQConfig(group_size=32, **config), progress=False)
    for parameter in model.parameters():
        if isinstance(parameter, QuantizedParameter):
            parameter.packed.lower(get_kernel(layout))
    return model


def mlp(dtype=torch.bfloat16):
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).to(dtype)


def close(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert relative_error(found, expected) <= LINEAR[expected.dtype]


def same_numbers(a, b):
    """Whether two parameters hold the same integers and scales."""
    pairs = zip(a.quantized_weight().tensors, b.quantized_weight().tensors, strict=True)
    return all((s is None and t is None) or torch.equal(s, t) for s, t in pairs)


# --- what it is


@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_a_parameter_of_the_shape_and_dtype_of_the_dense_one(transposed):
    p, W = make(transposed=transposed)
    assert isinstance(p, nn.Parameter)
    assert isinstance(p, QuantizedParameter)
    assert is_traceable_wrapper_subclass(p)
    assert not p.requires_grad
    assert p.shape == ((K, N) if transposed else (N, K))
    assert (p.dtype, p.device, p.numel()) == (torch.bfloat16, torch.device("cpu"), N * K)
    assert torch.equal(p.dequantize(), W.mT if transposed else W)


def test_flatten_metadata_tells_schemes_shapes_and_dtypes_apart():
    """What Dynamo guards: layers that differ in it never share a graph."""
    base = make()[0].__tensor_flatten__()[1]
    assert make()[0].__tensor_flatten__()[1] == base
    if not cpu.available():
        assert make("cpu_int4")[0].__tensor_flatten__()[1] == base
    for other in (make(sym=False), make(size=64), make(dtype=torch.float32), make(transposed=True)):
        assert other[0].__tensor_flatten__()[1] != base


def test_repr_names_the_site_and_the_scheme():
    text = repr(make()[0])
    assert all(part in text for part in ("layers.3.up", "[128, 64]", "W4A16 g32 sym", "reference"))


# --- linear calls

SPELLINGS = {
    "F.linear": lambda x, p: F.linear(x, p),
    "F.linear keyword": lambda x, p: F.linear(x, weight=p),
    "x @ p.T": lambda x, p: x @ p.T,
    "x @ p.t()": lambda x, p: x @ p.t(),
    "x @ p.mT": lambda x, p: x @ p.mT,
    "transpose": lambda x, p: torch.matmul(x, p.transpose(0, 1)),
    "transpose negative": lambda x, p: x.matmul(p.transpose(-1, -2)),
    "permute": lambda x, p: x @ p.permute(1, 0),
    "einsum": lambda x, p: torch.einsum("...k,nk->...n", x, p),
    "einsum swapped": lambda x, p: torch.einsum("nk,bk->bn", p, x) if x.ndim == 2 else F.linear(x, p),
    "mm": lambda x, p: torch.mm(x.flatten(0, -2), p.t()).unflatten(0, x.shape[:-1]),
    "aten.linear": lambda x, p: torch.ops.aten.linear.default(x, p),
}


@every_layout
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("shape", [(3, K), (2, 3, K)], ids=["2d", "3d"])
def test_every_spelling_of_a_linear_works_in_eager(spelling, shape, layout):
    p, W = make(layout)
    x = torch.randn(shape, dtype=torch.bfloat16)
    close(SPELLINGS[spelling](x, p), F.linear(x, W))


@every_layout
def test_bias(layout):
    p, W = make(layout)
    x, bias = torch.randn(3, K, dtype=torch.bfloat16), torch.randn(N, dtype=torch.bfloat16)
    close(F.linear(x, p, bias), F.linear(x, W, bias))


TRANSPOSED_SPELLINGS = {
    "x @ p": lambda x, p, b: x @ p + b,
    "addmm": lambda x, p, b: torch.addmm(b, x, p),
    "bias.addmm": lambda x, p, b: b.addmm(x, p),
    "einsum": lambda x, p, b: torch.einsum("bk,kn->bn", x, p) + b,
    "F.linear(p.t())": lambda x, p, b: F.linear(x, p.t(), b),
}


@every_layout
@pytest.mark.parametrize("spelling", TRANSPOSED_SPELLINGS)
def test_a_weight_stored_as_inputs_by_outputs(spelling, layout):
    p, W = make(layout, transposed=True)
    x, bias = torch.randn(3, K, dtype=torch.bfloat16), torch.randn(N, dtype=torch.bfloat16)
    close(TRANSPOSED_SPELLINGS[spelling](x, p, bias), F.linear(x, W, bias))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_along_the_wrong_dimension_is_refused(transposed):
    square = torch.randn(64, 64)
    packed = PackedWeight(round_to_nearest(square, Scheme(4, 32)), Scheme(4, 32), None)
    p = QuantizedParameter(packed, "layers.3.up", transposed)
    x = torch.randn(3, 64)
    wrong = (lambda: F.linear(x, p)) if transposed else (lambda: x @ p)
    with pytest.raises(DenseUseError, match=r"layers\.3\.up: a weight \[64, 64\] quantized along its"):
        wrong()


DENSE_USES = {
    "add": lambda p: p + 1,
    "sum": lambda p: p.sum(),
    "norm": lambda p: p.norm(),
    "abs": lambda p: p.abs(),
    "index": lambda p: p[0],
    "compare": lambda p: p == 0,
    "cat": lambda p: torch.cat([p, p]),
    "stack behind a dense one": lambda p: torch.stack([torch.zeros(N, K, dtype=p.dtype), p]),
    "view": lambda p: p.view(-1),
    "embedding": lambda p: F.embedding(torch.tensor([1]), p),
    "as the left factor of a vector": lambda p: p @ torch.zeros(K, dtype=p.dtype),
    "by itself": lambda p: F.linear(p, p),
    "fill": lambda p: p.detach().zero_(),
    "in-place": lambda p: p.detach().mul_(2),
    "scaled addmm": lambda p: torch.addmm(torch.zeros(N), torch.zeros(3, K), p.t(), alpha=2),
    "permute to itself": lambda p: p.permute(0, 1),
    "copy to dense": lambda p: torch.zeros(N, K).copy_(p),
    "storage": lambda p: p.storage(),
}


@pytest.mark.parametrize("use", DENSE_USES)
def test_a_dense_use_names_the_weight_and_what_to_do(use):
    p, _ = make()
    with pytest.raises(DenseUseError) as error:
        DENSE_USES[use](p)
    message = str(error.value)
    assert "layers.3.up" in message
    assert "dequantize" in message or "Legal" in message


@pytest.mark.parametrize("shape", [(K, 3), (2, K, 3)])
def test_it_multiplies_from_the_left(shape):
    p, W = make("reference", torch.float32)
    x = torch.randn(shape)
    assert relative_error(p @ x, W @ x) <= LINEAR[torch.float32]


def test_a_dense_use_error_is_one_of_ours():
    assert issubclass(DenseUseError, GPTQError)


def test_the_gradient_reaches_x():
    p, W = make("reference", torch.float32)
    x = torch.randn(3, K, requires_grad=True)
    seed = torch.randn(3, N)
    F.linear(x, p).backward(seed)
    assert relative_error(x.grad, seed @ W) <= LINEAR[torch.float32]


# --- copies and conversions


@every_layout
@every_grid
@pytest.mark.parametrize(
    "copying", [torch.clone, copy.deepcopy, torch.Tensor.detach], ids=["clone", "deepcopy", "detach"]
)
def test_a_copy_is_quantized_and_the_same(copying, layout, sym):
    p, W = make(layout, sym=sym)
    new = copying(p)
    assert type(new) is type(p)
    assert (new.fqn, new.scheme, new.transposed) == (p.fqn, p.scheme, p.transposed)
    assert new.packed.kernel is p.packed.kernel
    assert same_numbers(new, p)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    close(F.linear(x, new), F.linear(x, W))


def test_detach_shares_the_bytes_and_copies_do_not():
    p, _ = make()
    assert p.detach().packed is p.packed
    for new in (p.clone(), copy.deepcopy(p)):
        assert new.packed is not p.packed
        assert new.packed.tensors[0].data_ptr() != p.packed.tensors[0].data_ptr()


@pytest.mark.parametrize("copying", [torch.clone, copy.deepcopy], ids=["clone", "deepcopy"])
def test_a_copy_has_a_handle_of_its_own(copying):
    p, _ = make()
    new = copying(p)
    assert live(p.packed.handle) is p.packed
    assert live(new.packed.handle) is new.packed
    assert live(new.handle) is new.packed


def test_deepcopy_keeps_parameters_and_ties():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    new = copy.deepcopy(quantized(model))
    assert isinstance(new[0].weight, nn.Parameter)
    assert new[0].weight is new[1].weight
    assert new[0].weight is not model[0].weight


@pytest.mark.parametrize("transposed", [False, True])
def test_t_twice_is_the_weight(transposed):
    p, _ = make(transposed=transposed)
    assert p.t().shape == p.shape[::-1]
    assert p.t().packed is p.packed
    assert p.t().t().transposed == transposed
    assert torch.equal(p.t().dequantize(), p.dequantize().mT)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_to_changes_the_dtype_of_the_scales_and_nothing_else(layout, dtype):
    model = quantized(mlp(), layout)
    codes = model[0].weight.quantized_weight().codes()
    model.to(dtype)
    p = model[0].weight
    assert isinstance(p, QuantizedParameter)
    assert isinstance(p, nn.Parameter)
    assert p.dtype == p.quantized_weight().scales.dtype == dtype
    assert p.fqn == "0"
    assert torch.equal(p.quantized_weight().codes(), codes)
    assert model(torch.randn(3, 64, dtype=dtype)).dtype == dtype


def test_to_another_device():
    p, _ = make()
    moved = p.to("meta")
    assert moved.device.type == "meta"
    assert all(t.device.type == "meta" for t in moved.packed.tensors if t is not None)


def test_a_deleted_parameter_frees_its_bytes():
    p, _ = make()
    packed = weakref.ref(p.packed)
    del p
    gc.collect()
    assert packed() is None


# --- state dicts and files


@every_layout
@every_grid
def test_state_dict_loads_into_a_quantized_model(layout, sym):
    source, target = quantized(mlp(), layout, sym=sym), quantized(mlp(), layout, sym=sym)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert relative_error(target(x), source(x)) > 0.1
    parameter = target[0].weight
    target.load_state_dict(source.state_dict())
    assert target[0].weight is parameter
    assert same_numbers(target[0].weight, source[0].weight)
    close(target(x), source(x))


@every_layout
def test_state_dict_is_assigned_to_a_dense_model(layout):
    source, target = quantized(mlp(), layout), mlp()
    target.load_state_dict(source.state_dict(), assign=True)
    assert isinstance(target[0].weight, QuantizedParameter)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    close(target(x), source(x))


def test_state_dict_into_a_dense_model_says_what_to_do():
    target = mlp()
    before = target[0].weight.clone()
    with pytest.raises(
        RuntimeError, match=r"a quantized weight cannot be copied into a dense parameter.*assign=True"
    ):
        target.load_state_dict(quantized(mlp()).state_dict())
    assert torch.equal(target[0].weight, before)


def test_a_dense_state_dict_into_a_quantized_model_says_what_to_do():
    target = quantized(mlp())
    with pytest.raises(
        RuntimeError, match=r"0: a dense weight cannot be copied into a quantized parameter.*Legal"
    ):
        target.load_state_dict(mlp().state_dict())


def test_a_state_dict_of_another_scheme_is_refused():
    source, target = quantized(mlp(), bits=8), quantized(mlp())
    with pytest.raises(RuntimeError, match=r"0: found W8A16 g32 sym \[128, 64\].*Legal here: W4A16 g32 sym"):
        target.load_state_dict(source.state_dict())
    assert target[0].weight.quantized_weight().bits == 4


def saved_and_loaded(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


@every_layout
@every_grid
def test_a_saved_state_dict_loads_with_weights_only(layout, sym):
    source = quantized(mlp(), layout, sym=sym)
    loaded = saved_and_loaded(source.state_dict())
    for name in ("0.weight", "2.weight"):
        p = source.get_parameter(name)
        assert same_numbers(loaded[name], p)
        assert (loaded[name].fqn, loaded[name].scheme) == (p.fqn, p.scheme)
        assert loaded[name].packed.error == p.packed.error
    target = mlp()
    target.load_state_dict(loaded, assign=True)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    close(target(x), source(x))


@every_layout
def test_a_whole_model_is_saved_and_loaded(layout):
    source = quantized(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16(), layout)
    source[1].weight = source[0].weight
    loaded = saved_and_loaded(source, weights_only=False)
    assert isinstance(loaded[0].weight, QuantizedParameter)
    assert isinstance(loaded[0].weight, nn.Parameter)
    assert loaded[0].weight is loaded[1].weight
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    close(loaded(x), source(x))


@every_layout
def test_the_file_is_as_small_as_the_bytes(layout):
    model = quantized(nn.Sequential(nn.Linear(1024, 1024, bias=False)).bfloat16(), layout)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file.tell() <= model[0].weight.nbytes + 8192


# --- merged packs


def merged(layout, sym=True, size=32):
    """Two parameters that are views of one pack, and their dense weights."""
    (q, Wq), (k, Wk) = make(layout, sym=sym, size=size, name="q"), make(layout, sym=sym, size=size, name="k")
    assert can_merge([q.packed.spec, k.packed.spec], get_kernel(layout))
    whole = merge([q.packed, k.packed], get_kernel(layout))
    return whole, (q, Wq), (k, Wk)


@every_layout
@every_grid
@pytest.mark.parametrize("rows", [3, 40])
def test_a_merged_pack_equals_its_parts(layout, sym, rows):
    whole, (q, Wq), (k, Wk) = merged(layout, sym)
    x = torch.randn(rows, K, dtype=torch.bfloat16)
    close(whole.linear(x, None), F.linear(x, torch.cat([Wq, Wk])))
    close(F.linear(x, q), F.linear(x, Wq))
    close(F.linear(x, k), F.linear(x, Wk))


@every_layout
@every_grid
def test_parts_of_a_merged_pack_are_views_and_counted_once(layout, sym):
    whole, (q, _), (k, _) = merged(layout, sym)
    assert q.nbytes + k.nbytes == whole.nbytes
    for part in (q, k):
        for mine, all_ in zip(part.packed.tensors, whole.tensors, strict=True):
            if mine is not None:
                assert mine.untyped_storage().data_ptr() == all_.untyped_storage().data_ptr()


@every_layout
@every_grid
def test_a_part_of_a_merged_pack_is_copied_and_saved_alone(layout, sym):
    _, _, (k, Wk) = merged(layout, sym)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    for new in (copy.deepcopy(k), k.clone(), saved_and_loaded(k, weights_only=True), k.to(torch.float32)):
        assert new.packed.merged is None
        assert same_numbers(new.to(k.dtype), k)
        close(F.linear(x, new.to(k.dtype)), F.linear(x, Wk))
    assert (
        sum(t.untyped_storage().nbytes() for t in copy.deepcopy(k).packed.tensors if t is not None)
        == k.nbytes
    )


@every_layout
@pytest.mark.parametrize("size", [32, -1])
def test_a_saved_part_is_as_small_as_its_bytes(layout, size):
    _, _, (k, _) = merged(layout, size=size)
    weight = saved_and_loaded(k, weights_only=True).packed
    assert sum(t.untyped_storage().nbytes() for t in weight.tensors if t is not None) == weight.nbytes


@every_layout
def test_merging_again_gives_the_same_pack(layout):
    whole, (q, _), (k, _) = merged(layout)
    assert merge([q.packed, k.packed], get_kernel(layout)) is whole
    again = merge([k.packed, q.packed], get_kernel(layout))
    assert again is not whole
    assert q.packed.merged is again


@every_layout
def test_a_loaded_part_leaves_the_merged_pack(layout):
    whole, (q, _), (k, Wk) = merged(layout)
    new, W = make(layout, name="q")
    with torch.no_grad():
        q.copy_(new)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    close(F.linear(x, q), F.linear(x, W))
    close(F.linear(x, k), F.linear(x, Wk))
    again = merge([q.packed, k.packed], get_kernel(layout))
    assert again is not whole
    close(again.linear(x, None), F.linear(x, torch.cat([W, Wk])))


# --- inside the modules of torch and transformers


@pytest.fixture
def llama():
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config).eval().bfloat16()


@every_layout
def test_get_memory_footprint_is_the_stored_bytes(llama, layout):
    dense = llama.get_memory_footprint()
    quantized(llama, layout)
    stored = sum(p.nbytes for p in llama.parameters())
    stored += sum(b.nbytes for b in llama.buffers())
    elements = sum(isinstance(p, QuantizedParameter) for p in llama.parameters())
    found = llama.get_memory_footprint()
    assert stored <= found <= stored + 2 * elements
    assert found < dense


@every_layout
@every_grid
def test_nbytes_is_the_sum_of_the_tensors(layout, sym):
    p, _ = make(layout, sym=sym)
    assert p.nbytes == sum(t.numel() * t.element_size() for t in p.packed.tensors if t is not None)
    assert 0 <= p.nelement() * p.element_size() - p.nbytes < p.element_size()


@pytest.mark.parametrize("skip", [None, {r"-:.*(k|v|o|gate|up|down)_proj": {}}], ids=["all", "one per layer"])
def test_save_pretrained_of_transformers_says_what_to_call(llama, tmp_path, skip):
    quantized(llama, dynamic=skip)
    with pytest.raises(DenseUseError, match=r"layers\.0.*Legal: torch\.save\(model\.state_dict\(\), path\)"):
        llama.save_pretrained(tmp_path)


def test_conv1d_of_transformers():
    model = nn.Sequential(Conv1D(128, 64))
    x = torch.randn(2, 3, 64)
    quantized(model)
    p = model[0].weight
    assert isinstance(p, QuantizedParameter)
    assert p.shape == (64, 128)
    with torch.no_grad():
        close(model(x), x @ p.dequantize() + model[0].bias)


def attention():
    return nn.MultiheadAttention(64, 4, batch_first=True).eval()


def encoder_layer():
    return nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()


@pytest.mark.parametrize("make_module", [attention, encoder_layer])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_modules_of_torch_run_in_eager(make_module, grad):
    model, x = make_module(), torch.randn(2, 5, 64)
    dense = copy.deepcopy(model)
    quantized(model)
    found = {name for name, p in model.named_parameters() if isinstance(p, QuantizedParameter)}
    assert found
    for name in found:
        dense.get_parameter(name).data = model.get_parameter(name).dequantize()
    args = (x, x, x) if make_module is attention else (x,)
    with torch.set_grad_enabled(grad):
        y, expected = model(*args), dense(*args)
    if make_module is attention:
        y, expected = y[0], expected[0]
    assert type(y) is torch.Tensor
    close(y, expected)


def test_results_are_plain_tensors():
    p, _ = make()
    x = torch.randn(3, K, dtype=torch.bfloat16)
    assert type(F.linear(x, p)) is torch.Tensor
    assert type(operator.matmul(x, p.t())) is torch.Tensor
