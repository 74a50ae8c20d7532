"""Hugging Face models with random weights: glomo's attention gives what theirs gives."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

from glomo.integrations.transformers import padding_or_full_mask, register  # noqa: E402
from glomo.kernels import relu2_attention, use_backend  # noqa: E402
from parity import IMPLEMENTATIONS  # noqa: E402

SIZES = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
HALVES = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
TOKENS = torch.randint(5, 90, (3, 12), generator=torch.Generator().manual_seed(0))
RIGHT = (torch.arange(12) < torch.tensor([[12], [8], [4]])).long()
"""Padding behind the sequences; flipped, before them."""

MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=100, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, **HALVES
        )
    ),
}


@pytest.fixture(autouse=True)
def _registered():
    register()


def run(model, implementation, mask):
    """The model's result where there is no padding, and the gradient of its first weight."""
    model.set_attn_implementation(implementation)
    halves = {"labels": TOKENS} if model.config.is_encoder_decoder else {}
    out = model(TOKENS, attention_mask=mask, **halves)
    result = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
    if mask is not None and not halves:
        result = result * mask[..., None]
    (gradient,) = torch.autograd.grad(result.square().sum(), [next(model.parameters())])
    return result, gradient


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_equals_their_own_attention(name, padding):
    mask = {"none": None, "right": RIGHT, "left": RIGHT.flip(-1)}[padding]
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    theirs = run(model, "sdpa", mask)
    with use_backend(IMPLEMENTATIONS[-1]):
        ours = run(model, "glomo", mask)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, dict(cache_implementation="static"), dict(num_beams=3)])
def test_generates_the_same(options):
    torch.manual_seed(1)
    model, outs = MODELS["llama"]().eval(), []
    for implementation in ("eager", "glomo"):
        model.set_attn_implementation(implementation)
        mask = RIGHT.flip(-1)
        outs.append(model.generate(TOKENS, attention_mask=mask, max_new_tokens=8, do_sample=False, **options))
    assert torch.equal(*outs)


def test_masks_of_padding_stay_small():
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    for function in (bidirectional_mask_function, causal_mask_function):
        mask = padding_or_full_mask(3, 12, 12, mask_function=function, attention_mask=RIGHT)
        assert mask.shape == (3, 1, 1, 12)
    cached = dict(q_offset=6, mask_function=causal_mask_function, attention_mask=RIGHT)
    assert torch.equal(padding_or_full_mask(3, 6, 12, **cached), sdpa_mask(3, 6, 12, **cached))


def test_relu2():
    """The same model with ReLU²-normalised weights, and with a learned bias a head."""
    torch.manual_seed(1)
    model = MODELS["bert"]().eval()
    outs = [run(model, implementation, RIGHT)[0] for implementation in ("glomo", "glomo_relu2")]
    assert not torch.allclose(*outs)
    forward = transformers.AttentionInterface()["glomo_relu2"]
    module = model.encoder.layer[0].attention.self
    module.affinity_bias = torch.nn.Parameter(torch.rand(4, 1, 1))
    q, k, v = (torch.randn(3, 4, 12, 8) for _ in range(3))
    allowed = RIGHT[:, None, None].bool()
    out, _ = forward(module, q, k, v, allowed, scaling=0.5)
    expected = relu2_attention(q, k, v, module.affinity_bias, allowed, scale=0.5)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("option", ["softcap", "s_aux"])
def test_what_it_cannot_do_it_says(option):
    forward = transformers.AttentionInterface()["glomo"]
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=f"no {option}, which Linear asks for"):
        forward(torch.nn.Linear(1, 1), q, q, q, None, **{option: 30.0})
