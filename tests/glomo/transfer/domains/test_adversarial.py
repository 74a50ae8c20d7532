"""The domain classifier's loss against its formula in loops, and an adaptation that works."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from glomo.transfer.domains import DomainAdversary, joint_features


def parts(*sizes, width=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(n, width, generator=generator, dtype=dtype, requires_grad=True) for n in sizes]


def oracle(adversary, features):
    """-log softmax in loops, each domain's mean counted 1 / K."""
    total = 0.0
    for domain, part in enumerate(features):
        of_domain = 0.0
        for row in part:
            x = row
            for layer in adversary.classifier:
                if isinstance(layer, nn.Linear):
                    x = (
                        torch.stack([sum(w * v for w, v in zip(ws, x, strict=True)) for ws in layer.weight])
                        + layer.bias
                    )
                else:
                    x = torch.stack([v if v > 0 else 0 * v for v in x])
            of_domain = of_domain + torch.log(sum(torch.exp(v) for v in x)) - x[domain]
        total = total + of_domain / len(part)
    return total / len(features)


@pytest.mark.parametrize(("sizes", "hidden"), [((4, 4), (5,)), ((1, 7), ()), ((2, 1, 5), (4, 6))])
def test_the_formula_with_unequal_sizes(sizes, hidden):
    torch.manual_seed(0)
    adversary = DomainAdversary(3, hidden, len(sizes), steps=10).double()
    for _ in range(3):
        adversary.advance()
    features = parts(*sizes)
    found = adversary(*features)
    expected = oracle(adversary, features)
    torch.testing.assert_close(found.loss, expected)
    assert found.chance == pytest.approx({2: 0.693147, 3: 1.098612}[len(sizes)], abs=1e-6)
    leaves = [*features, *adversary.parameters()]
    usual, turned = torch.autograd.grad(expected, leaves), torch.autograd.grad(found.loss, leaves)
    weight = 2 / (1 + math.exp(-10 * 0.3)) - 1
    for i, (new, old) in enumerate(zip(turned, usual, strict=True)):
        # features learn against the classifier; the classifier's own gradient is the usual one
        torch.testing.assert_close(new, -weight * old if i < len(sizes) else old, rtol=1e-6, atol=1e-9)


def test_each_domain_counts_the_same():
    """A domain with 9 of 10 examples would pull a plain mean, and its accuracy, to itself."""
    torch.manual_seed(0)
    adversary = DomainAdversary(3, (), 2, steps=1)
    with torch.no_grad():
        adversary.classifier[0].weight.zero_()
        adversary.classifier[0].bias.copy_(torch.tensor([2.0, 0.0]))  # always says domain 0
    found = adversary(torch.randn(9, 3), torch.randn(1, 3))
    low, high = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert found.loss.item() == pytest.approx((low + high) / 2, abs=1e-6)
    assert found.accuracy.item() == 0.5


def test_positions_count_as_examples():
    torch.manual_seed(0)
    adversary = DomainAdversary(3, (4,), 2, steps=1)
    source, target = torch.randn(2, 5, 3), torch.randn(1, 4, 3)
    found = adversary(source, target)
    torch.testing.assert_close(found.loss, adversary(source.reshape(10, 3), target.reshape(4, 3)).loss)


def test_batch_norm_sees_the_joint_batch():
    torch.manual_seed(0)
    source, target = torch.randn(6, 3), torch.randn(2, 3) + 5
    encoder = nn.BatchNorm1d(3, momentum=1.0)
    features = joint_features(encoder, source, target)
    assert [len(part) for part in features] == [6, 2]
    joint = torch.cat([source, target])
    torch.testing.assert_close(encoder.running_mean, joint.mean(0))
    torch.testing.assert_close(features[1], (target - joint.mean(0)) / (joint.var(0, unbiased=False) + 1e-5).sqrt())
    alone = encoder(target)  # by itself: the domain's own mean is taken away, and what tells it from the source
    assert (features[1].mean(0) - alone.mean(0)).abs().min() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    adversary = DomainAdversary(3, (4,), 2, steps=1).to(dtype)
    adversary.advance()
    features = parts(2, 3, dtype=dtype)
    found = adversary(*features)
    assert found.loss.dtype == torch.promote_types(dtype, torch.float32)
    found.loss.backward()
    assert features[0].grad.dtype == dtype
    assert features[0].grad.any()


def test_autocast():
    torch.manual_seed(0)
    adversary = DomainAdversary(3, (4,), 2, steps=1)
    features = parts(2, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = adversary(*features)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, adversary(*features).loss, rtol=0.02, atol=0.02)
    found.loss.backward()


def shifted_domains(n=256):
    """Two classes. The first input says which; so does the second, louder, but only in the source: in the target it is
    far away."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    signs = 2.0 * labels - 1

    def noise():
        return torch.randn(n, generator=generator) * 0.4

    source = torch.stack([signs + noise(), 2 * signs + noise()], 1)
    target = torch.stack([signs + noise(), noise() - 5], 1)
    return source, target, labels


def train(adversary, model, steps, adapt=True, start=0):
    encoder, head = model
    source, target, labels = shifted_domains()
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters(), *adversary.parameters()], 0.1)
    found = None
    for _ in range(start, start + steps):
        optimizer.zero_grad()
        features = joint_features(encoder, source, target[:100])
        found = adversary(*features) if adapt else adversary(*[part.detach() for part in features])
        (nn.functional.cross_entropy(head(features[0]), labels) + found.loss).backward()
        optimizer.step()
        adversary.advance()
    accuracy = (head(encoder(target)).argmax(1) == labels).float().mean().item()
    return found, accuracy


def new_model(steps):
    torch.manual_seed(1)
    return DomainAdversary(4, (16,), 2, steps), (nn.Linear(2, 4), nn.Linear(4, 2))


def test_an_adaptation():
    adversary, model = new_model(600)
    found, accuracy = train(adversary, model, 600, adapt=False)
    assert found.accuracy > 0.99  # the features tell the domains apart
    assert found.loss < 0.05
    assert accuracy < 0.7
    adversary, model = new_model(600)
    found, accuracy = train(adversary, model, 600)
    assert abs(found.loss.item() - found.chance) < 0.1  # the expected end
    assert accuracy > 0.9


def test_a_stopped_training_goes_on_identically(tmp_path):
    adversary, model = new_model(40)
    train(adversary, model, 40)
    first, first_model = new_model(40)
    train(first, first_model, 25)
    save_file(first.state_dict(), tmp_path / "adversary.safetensors")
    second, second_model = new_model(40)[0], copy.deepcopy(first_model)
    second.load_state_dict(load_file(tmp_path / "adversary.safetensors"))
    for other, other_model in ((copy.deepcopy(first), copy.deepcopy(first_model)), (second, second_model)):
        train(other, other_model, 15)
        assert other.reversal.step.item() == 40
        for found, expected in zip(other.state_dict().values(), adversary.state_dict().values(), strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(other_model, model, strict=True):
            assert torch.equal(found.weight, expected.weight)


def test_mistakes():
    adversary = DomainAdversary(3, (4,), 2, steps=1)
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"features of 3 domains are given; 2 are needed"):
        adversary(x, x, x)
    with pytest.raises(ValueError, match=r"domain 1 has no example in the batch \(the domains have 2, 0\)"):
        adversary(x, x[:0])
    with pytest.raises(ValueError, match=r"features of domain 1 have the shape \(2, 4\); \(\.\.\., 3\) is needed"):
        adversary(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"domains is 1; at least 2"):
        DomainAdversary(3, (4,), 1, steps=1)
    with pytest.raises(ValueError, match=r"features is 3 and hidden \(0,\)"):
        DomainAdversary(3, (0,), 2, steps=1)
    with pytest.raises(ValueError, match=r"steps is 0"):
        DomainAdversary(3, (4,), 2, steps=0)
    with pytest.raises(ValueError, match=r"given are \(2, 3\), \(2, 4\)"):
        joint_features(nn.Identity(), x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"given are none"):
        joint_features(nn.Identity())
    with pytest.raises(ValueError, match=r"the encoder gives 2 rows for 4 examples"):
        joint_features(lambda both: both[:2], x, x)
