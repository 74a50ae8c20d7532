"""glomo.nn.MultiheadAttention beside torch.nn.MultiheadAttention, argument for argument."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

import glomo.nn.attention as module
from glomo.kernels import relu2_affinity, use_backend
from glomo.nn import MultiheadAttention
from parity import IMPLEMENTATIONS, widest

B, T, S, HEADS, WIDTH = 3, 5, 7, 4, 16
pytestmark = pytest.mark.filterwarnings("ignore:.*mismatched:UserWarning", "ignore:.*nested tensors:UserWarning")


def pair(**options):
    """PyTorch's module and ours with the same weights, every bias other than zero."""
    theirs = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    ours = MultiheadAttention(WIDTH, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def arguments(kind, batch_first, batched):
    """query, key and value: one tensor, two or three."""

    def sequence(length, width):
        if not batched:
            return torch.randn(length, width)
        return torch.randn(B, length, width) if batch_first else torch.randn(length, B, width)

    query = sequence(T, WIDTH)
    if kind == "self":
        return query, query, query
    if kind == "memory":
        memory = sequence(S, WIDTH)
        return query, memory, memory
    return query, sequence(S, 12), sequence(S, 20)


def masks(attn, padding, sources, batched):
    """The two masks; every target may read the first source."""
    attn_mask = {
        None: None,
        "bool": torch.rand(T, sources) < 0.3,
        "bool, each head": torch.rand((B if batched else 1) * HEADS, T, sources) < 0.3,
        "float": torch.randn(T, sources),
        "float, each head": torch.randn((B if batched else 1) * HEADS, T, sources),
        "causal": ~torch.ones(T, sources, dtype=torch.bool).tril(),
    }[attn]
    key_padding_mask = None if padding is None else torch.rand((B, sources) if batched else (sources,)) < 0.3
    for mask in (attn_mask, key_padding_mask):
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = False
    if padding == "float":
        key_padding_mask = torch.zeros(key_padding_mask.shape).masked_fill(key_padding_mask, -2.0)
    return attn_mask, key_padding_mask


def run(attention, query, key, value, **options):
    """Outputs, then the gradients of the inputs and of every parameter."""
    inputs = [t.clone().requires_grad_() for t in dict.fromkeys((query, key, value))]
    found = dict(zip(dict.fromkeys((query, key, value)), inputs, strict=True))
    out, weights = attention(found[query], found[key], found[value], **options)
    loss = out.square().sum() + (0 if weights is None else weights.square().sum())
    parameters = [p for p in attention.parameters() if p.requires_grad]
    return [out, weights, *torch.autograd.grad(loss, [*inputs, *parameters])]


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["self", "memory", "three"])
@pytest.mark.parametrize("attn", [None, "bool", "bool, each head", "float", "float, each head", "causal"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
def test_equals_pytorch(backend, kind, attn, padding):
    """Over the layouts, with and without weights, learned sources and zeros, in value and every gradient."""
    grid = [(first, batched, need) for first in (False, True) for batched in (True, False) for need in (False, True)]
    if IMPLEMENTATIONS[-1] == "triton":  # slow in the interpreter
        grid = [grid[0], grid[6]] if attn in (None, "float", "causal") and padding != "float" else []
    for number, (batch_first, batched, need_weights) in enumerate(grid):
        extra = number % 4 if attn != "causal" else 0
        options = dict(bias=number % 3 != 2, add_bias_kv=extra in (1, 3), add_zero_attn=extra in (2, 3))
        if kind == "three":
            options |= dict(kdim=12, vdim=20)
        theirs, ours = pair(batch_first=batch_first, **options)
        inputs = arguments(kind, batch_first, batched)
        attn_mask, key_padding_mask = masks(attn, padding, T if kind == "self" else S, batched)
        call = dict(attn_mask=attn_mask, key_padding_mask=key_padding_mask, need_weights=need_weights)
        call |= dict(is_causal=attn == "causal", average_attn_weights=number % 2 == 0)
        with use_backend(backend):
            found = run(ours, *inputs, **call)
        for mine, other in zip(found, run(theirs, *inputs, **call), strict=True):
            if mine is None or other is None:
                assert mine is other
            else:
                torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("floating", [False, True])
def test_relu2_is_the_graph_of_the_projected_inputs(backend, need_weights, floating):
    ours = MultiheadAttention(WIDTH, HEADS, batch_first=True, activation="relu2")
    nn.init.uniform_(ours.affinity_bias)
    x = torch.randn(B, T, WIDTH)
    mask = torch.randn(T, T) if floating else torch.rand(T, T) < 0.3
    with use_backend(backend):
        out, weights = ours(x, x, x, attn_mask=mask, need_weights=need_weights, average_attn_weights=False)
    packed = x @ ours.in_proj_weight.T + ours.in_proj_bias
    q, k, v = packed.view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    bias = ours.affinity_bias + mask if floating else ours.affinity_bias
    with use_backend("reference"):
        graph = relu2_affinity(q, k, bias, None if floating else ~mask, scale=(WIDTH // HEADS) ** -0.5)
    expected = ours.out_proj((graph @ v).transpose(1, 2).reshape(B, T, WIDTH))
    torch.testing.assert_close(out, expected)
    assert (weights is None) == (not need_weights)
    if need_weights:
        torch.testing.assert_close(weights, graph)


@pytest.mark.parametrize("activation", ["softmax", "relu2"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_target_without_a_source_gets_zeros(activation, need_weights):
    ours = MultiheadAttention(WIDTH, HEADS, bias=False, activation=activation)
    x = torch.randn(T, B, WIDTH, requires_grad=True)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    out.square().sum().backward()
    assert (out[:, 1] == 0).all()
    assert (x.grad[:, 1] == 0).all()
    assert x.grad.isfinite().all()
    assert not need_weights or (weights[1] == 0).all()


def test_dropout_is_of_the_weights_in_training_only():
    torch.manual_seed(3)
    ours = MultiheadAttention(WIDTH, HEADS, dropout=0.5)
    x = torch.randn(64, 8, WIDTH)
    _, weights = ours(x, x, x, average_attn_weights=False)
    assert abs(float((weights == 0).float().mean()) - 0.5) < 0.02
    with use_backend("blocked"):
        several = torch.stack([ours(x, x, x, need_weights=False)[0] for _ in range(200)])
        whole, _ = ours.eval()(x, x, x, need_weights=False)
    assert not torch.equal(several[0], several[1])
    torch.testing.assert_close(several.mean(0), whole, atol=0.15, rtol=0)


@pytest.mark.parametrize("activation", ["softmax", "relu2"])
@pytest.mark.parametrize("nested", [False, True])
def test_runs_inside_of_pytorchs_encoder_without_gradients(activation, nested):
    """PyTorch's fused layer would go past self_attn, and its encoder makes nested tensors of a padded batch."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2).eval()
    ours = copy.deepcopy(plain)
    for each in ours.layers:
        attention = MultiheadAttention(WIDTH, HEADS, batch_first=True, activation=activation)
        attention.load_state_dict(each.self_attn.state_dict(), strict=activation == "softmax")
        each.self_attn = attention.eval()
    x = torch.randn(B, T, WIDTH)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, 3:] = padding[2, 1:] = True
    name = {"softmax": "attention", "relu2": "relu2_attention"}[activation] + ("_varlen" if nested else "")
    if not nested:
        ours.use_nested_tensor = False
    with torch.no_grad(), mock.patch.object(module, name, wraps=getattr(module, name)) as called:
        out = ours(x, src_key_padding_mask=padding)
        assert called.call_count == 2
        if activation == "softmax":
            torch.testing.assert_close(out[~padding], plain(x, src_key_padding_mask=padding)[~padding])
        else:
            ours.use_nested_tensor = not nested
            torch.testing.assert_close(out[~padding], ours(x, src_key_padding_mask=padding)[~padding])


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_weights_of_a_nested_tensor(average, batch_first):
    theirs, ours = pair(batch_first=True)
    ours.batch_first = batch_first
    x = torch.nested.nested_tensor([torch.randn(4, WIDTH), torch.randn(2, WIDTH)])
    with torch.no_grad():  # PyTorch's own has nested tensors on its fused path alone
        expected, weights = theirs.eval()(x, x, x, average_attn_weights=average)
    out, found = ours(x, x, x, average_attn_weights=average)
    torch.testing.assert_close(found, weights)
    torch.testing.assert_close(out.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))


def test_a_jagged_tensor_can_be_added_to_the_result():
    ours = MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(4, WIDTH), torch.randn(2, WIDTH)], layout=torch.jagged)
    for need_weights in (False, True):
        out, _ = ours(x, x, x, need_weights=need_weights)
        for row, part in zip(x.unbind(), (x + out).unbind(), strict=True):
            torch.testing.assert_close(part, row + ours(row, row, row)[0])


def test_no_sequences():
    ours = MultiheadAttention(WIDTH, HEADS, batch_first=True)
    nested = torch.nested.nested_tensor([], dtype=torch.float32)
    for need_weights in (False, True):
        out, weights = ours(nested, nested, nested, need_weights=need_weights)
        assert out.size(0) == 0
        assert weights is None or weights.shape == (0, 0, 0)
    nothing = torch.nested.nested_tensor([torch.randn(0, WIDTH)])
    out, weights = ours(nothing, nothing, nothing)
    assert out.unbind()[0].shape == (0, WIDTH)
    assert weights.shape == (1, 0, 0)
    x = torch.randn(0, T, WIDTH)
    out, weights = ours(x, x, x, attn_mask=torch.zeros(0, T, T), key_padding_mask=torch.zeros(0, T))
    assert (out.shape, weights.shape) == ((0, T, WIDTH), (0, T, T))


def test_what_pytorchs_module_can_do_otherwise():
    dtype = widest(IMPLEMENTATIONS[-1])
    ours = MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=dtype)
    x = torch.randn(B, T, WIDTH, dtype=dtype)
    expected, _ = ours(x, x, x)
    assert isinstance(ours, nn.MultiheadAttention)
    torch.testing.assert_close(copy.deepcopy(ours)(x, x, x)[0], expected)
    before = ours.in_proj_weight.clone()
    ours._reset_parameters()
    assert not torch.equal(ours.in_proj_weight, before)
    with torch.device("meta"):
        assert MultiheadAttention(WIDTH, HEADS).out_proj.weight.is_meta
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: MultiheadAttention(16, 3), ValueError, "embed_dim .* 16 for 3 heads"),
        (lambda: MultiheadAttention(0, 1), ValueError, "embed_dim"),
        (lambda: MultiheadAttention(16, 4, dropout=1.5), ValueError, "dropout .* 1.5"),
        (lambda: MultiheadAttention(16, 4, activation="relu"), ValueError, "activation .* 'relu'"),
        (lambda: forward(query=torch.randn(5, 3, 8)), ValueError, r"query .*16.*\(5, 3, 8\)"),
        (lambda: forward(key=torch.randn(5, 16)), ValueError, r"key .*\(5, 16\)"),
        (lambda: forward(key=torch.randn(6, 3, 16)), ValueError, r"key \(6, 3, 16\) and value \(5, 3, 16\)"),
        (lambda: forward(query=torch.randn(5, 2, 16)), ValueError, "batch size"),
        (lambda: forward(attn_mask=torch.zeros(4, 5)), ValueError, r"attn_mask is \(4, 5\).*\(5, 5\) or \(12, 5, 5\)"),
        (lambda: forward(key_padding_mask=torch.zeros(5, 3)), ValueError, r"key_padding_mask .*\(3, 5\)"),
        (lambda: forward(attn_mask=torch.zeros(5, 5, dtype=torch.float64)), TypeError, "attn_mask is torch.float64"),
        (lambda: forward(attn_mask=torch.zeros(5, 5, dtype=torch.int64)), TypeError, "attn_mask is torch.int64"),
        (lambda: forward(is_causal=True), ValueError, "is_causal .* attn_mask"),
        (lambda: forward(nested=True, add_zero_attn=True), ValueError, "nested"),
        (lambda: forward(nested=True, is_causal=True), ValueError, "nested .* is_causal"),
    ],
)
def test_bad_input(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def forward(query=None, key=None, nested=False, add_zero_attn=False, **options):
    ours = MultiheadAttention(WIDTH, HEADS, add_zero_attn=add_zero_attn)
    x = torch.randn(T, B, WIDTH)
    if nested:
        x = torch.nested.nested_tensor([torch.randn(2, WIDTH), torch.randn(3, WIDTH)])
        return ours(x, x, x, need_weights=False, **options)
    return ours(x if query is None else query, x if key is None else key, x, **options)
