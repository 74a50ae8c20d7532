import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as bound_early

import glomo
from glomo.kernels import use_backend
from parity import IMPLEMENTATIONS

BEST = IMPLEMENTATIONS[-1]
pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")


def encoder(**options):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0), 2, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(is_causal=True),
        dict(attn_mask=torch.ones(6, 6, dtype=torch.bool).tril(-1)),
        dict(attn_mask=torch.linspace(-1, 1, 36).view(6, 6), scale=0.3),
    ],
)
def test_every_name_of_the_function_is_reached(options):
    query, key, value = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    expected = bound_early(query, key, value, **options)
    with glomo.patch_sdpa() as patch, use_backend(BEST):
        outs = [F.scaled_dot_product_attention(query, key, value, **options), bound_early(query, key, value, **options)]
    assert patch.calls == {f"glomo: {BEST}": 2}
    for out in outs:
        torch.testing.assert_close(out, expected)
        for mine, other in zip(
            *(torch.autograd.grad(o.sum(), [query, key, value], retain_graph=True) for o in (out, expected)),
            strict=True,
        ):
            torch.testing.assert_close(mine, other)
    bound_early(query, key, value)
    assert patch.calls == {f"glomo: {BEST}": 2}, "outside of the context"


@pytest.mark.parametrize("training", [True, False])
def test_pytorchs_own_layers(training):
    model = encoder().train(training)
    x, padding = torch.randn(3, 6, 32), torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.set_grad_enabled(training):
        expected = model(x, src_key_padding_mask=padding)
        with glomo.patch_sdpa() as patch, use_backend(BEST):
            out = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out[~padding], expected[~padding])
    assert patch.calls == {f"glomo: {BEST}": 2}


def test_what_is_left_to_pytorch_and_why():
    class Marked(torch.Tensor):
        pass

    query = torch.randn(1, 2, 3, 8)
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)])
    with glomo.patch_sdpa() as patch:
        out = bound_early(nested, nested, nested)
        assert out.is_nested
        assert isinstance(bound_early(query.as_subclass(Marked), query, query), Marked)
        with pytest.raises(RuntimeError):  # PyTorch's own words for what both refuse
            bound_early(query, query[..., :3], query)
        assert len(patch.calls) == 3
        assert all(name.startswith("pytorch: ") for name in patch.calls)
        assert any("nested" in name for name in patch.calls)
        assert any("Marked" in name for name in patch.calls)
        assert not torch.equal(torch.sin(query), query), "other functions go on"


def test_a_forced_backend_that_cannot_leaves_the_call_to_pytorch():
    if BEST == "triton":
        pytest.skip("Triton can do this call here")
    query = torch.randn(1, 2, 3, 8)
    with glomo.patch_sdpa() as patch, use_backend("triton"):
        torch.testing.assert_close(
            bound_early(query, query, query), F.scaled_dot_product_attention(query, query, query)
        )
    (name,) = patch.calls
    assert name.startswith("pytorch: ")
    assert "triton" in name


def test_under_compile():
    model = encoder().eval()
    x = torch.randn(3, 6, 32)
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with glomo.patch_sdpa():
        out = compiled(x)
    torch.testing.assert_close(out, model(x))
    assert "glomo.attention_" in graphs[0]


def test_unflatten_under_compile():
    """PyTorch's own wrapper of this one method is beyond Dynamo wherever a mode is on."""
    compiled = torch.compile(
        lambda x: x.unflatten(-1, (2, -1)) + x.unflatten(dim=0, sizes=(-1, 3)).sum(), fullgraph=True, backend="eager"
    )
    x = torch.randn(3, 8)
    with glomo.patch_sdpa():
        out = compiled(x)
    torch.testing.assert_close(out, x.view(3, 2, 4) + x.sum())


def test_other_threads_are_left_alone():
    query, outs = torch.randn(1, 2, 3, 8), []
    with glomo.patch_sdpa() as patch:
        thread = threading.Thread(target=lambda: outs.append(bound_early(query, query, query)))
        thread.start()
        thread.join()
    assert len(outs) == 1
    assert not patch.calls
