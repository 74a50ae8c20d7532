"""Attribute zero-shot against the product of probabilities in numpy, and animals that were never seen."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from glomo.transfer.zero_shot import AttributeTable

ANIMALS = {  # stripes, mane, hooves, hunts, black and white, tail
    "horse": (0, 1, 1, 0, 0, 1),
    "tiger": (1, 0, 0, 1, 0, 1),
    "panda": (0, 0, 0, 0, 1, 1),
    "lion": (0, 1, 0, 1, 0, 1),
    "cow": (0, 0, 1, 0, 1, 1),
    "zebra": (1, 1, 1, 0, 1, 1),
    "orca": (0, 0, 0, 1, 1, 1),
}
SEEN = [0, 1, 2, 3, 4]


def animals():
    return AttributeTable(list(ANIMALS), list(ANIMALS.values()))


def test_the_product_of_probabilities():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    p = 1 / (1 + np.exp(-logits.numpy()))
    prior = [0.2, 0.4, 0.4, 0.4, 0.4, 0.5]  # of the five seen; all have a tail, which counts as a half
    plain, corrected = np.ones((4, 7)), np.ones((4, 7))
    for b in range(4):
        for c, signature in enumerate(ANIMALS.values()):
            for m, has in enumerate(signature):
                plain[b, c] *= p[b, m] if has else 1 - p[b, m]
                corrected[b, c] *= (p[b, m] / prior[m]) if has else (1 - p[b, m]) / (1 - prior[m])
    table = animals()
    np.testing.assert_allclose(table(logits).exp().numpy(), plain, rtol=1e-12)
    found = table.prior(SEEN)
    assert found.tolist() == pytest.approx(prior, abs=1e-7)
    np.testing.assert_allclose(table(logits, found).exp().numpy(), corrected, rtol=1e-5)
    np.testing.assert_allclose(
        table(logits, torch.tensor(prior, dtype=torch.float64)).exp().numpy(), corrected, rtol=1e-6
    )


def test_a_prior_of_a_half_changes_no_order():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    table = animals()
    torch.testing.assert_close(table(logits, torch.full((6,), 0.5)), table(logits) + 6 * np.log(2))
    assert table.prior([0]).tolist() == [0.5] * 6  # of one class nothing is known


def test_large_logits_stay_numbers():
    scores = animals()(torch.tensor([[1e4, 1e4, 1e4, -1e4, 1e4, 1e4]]))
    assert scores.argmax().item() == 5
    assert scores[0, 5].item() == 0
    assert scores[0, 6].item() == -4e4  # four of the orca's attributes are wrong
    assert scores.isfinite().all()


def test_the_loss():
    table, logits = animals(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([5, 0, 5])
    rows = np.array(list(ANIMALS.values()))[labels.numpy()]
    p = 1 / (1 + np.exp(-logits.detach().numpy()))
    expected = -np.mean(rows * np.log(p) + (1 - rows) * np.log(1 - p))
    loss = table.loss(logits, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(logits.grad.numpy(), (p - rows) / 18, atol=1e-12)


def test_classes_that_were_never_seen():
    """Attributes are learned from five animals; zebra and orca are found by their rows."""
    generator, table = torch.Generator().manual_seed(0), animals()
    looks = torch.randn(6, 20, generator=generator)  # how an attribute looks

    def examples(classes, n):
        labels = torch.tensor(classes).repeat_interleave(n)
        return table.signatures[labels] @ looks + 0.5 * torch.randn(len(labels), 20, generator=generator), labels

    torch.manual_seed(0)
    model = nn.Linear(20, 6)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    inputs, labels = examples(SEEN, 30)
    for _ in range(150):
        optimizer.zero_grad()
        table.loss(model(inputs), labels).backward()
        optimizer.step()
    inputs, labels = examples([5, 6], 50)
    for prior in (None, table.prior(SEEN)):
        scores = table(model(inputs), prior)
        assert ((scores[:, 5:].argmax(1) + 5) == labels).float().mean() > 0.9


def test_dtypes_and_autocast():
    table, logits = animals(), torch.randn(3, 6)
    half = table(logits.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, table(logits), rtol=0.05, atol=0.05)
    exact = table(logits, table.prior(SEEN))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(table(logits, table.prior(SEEN)), exact)
    assert table(logits[:0]).shape == (0, 7)


def test_saved_and_copied(tmp_path):
    table, logits = animals(), torch.randn(3, 6)
    save_file(table.state_dict(), tmp_path / "table.safetensors")
    restored = AttributeTable(list(ANIMALS), torch.tensor([[int(b) for b in f"{n:06b}"] for n in range(7)]))
    restored.load_state_dict(load_file(tmp_path / "table.safetensors"))
    for other in (restored, copy.deepcopy(table)):
        assert torch.equal(other(logits), table(logits))
    assert list(table.state_dict()) == ["signatures"]


def test_mistakes():
    with pytest.raises(ValueError, match=r"classes 'lion' and 'puma' have the same signature"):
        AttributeTable(["lion", "horse", "puma"], [[0, 1], [1, 1], [0, 1]])
    with pytest.raises(ValueError, match=r"two classes are called 'lion'"):
        AttributeTable(["lion", "horse", "lion"], [[0, 1], [1, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"attribute 1 of the class 'horse' is 0.5; 0 or 1"):
        AttributeTable(["lion", "horse"], [[0, 1], [1, 0.5]])
    with pytest.raises(ValueError, match=r"shape \(2, 2\) and there are 1 classes"):
        AttributeTable(["lion"], [[0, 1], [1, 0]])
    table = animals()
    with pytest.raises(ValueError, match=r"logits have the shape \(2, 5\); \(examples, 6\)"):
        table(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"labels have the shape \(3,\) and logits \(2, 6\)"):
        table.loss(torch.zeros(2, 6), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"at least 1"):
        table.loss(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))
    for prior in (torch.zeros(6), torch.full((5,), 0.5)):
        with pytest.raises(ValueError, match=r"6 probabilities above 0 and below 1"):
            table(torch.zeros(2, 6), prior)
    for seen in ([], [7], [-1]):
        with pytest.raises(ValueError, match=r"ids from 0 to 6"):
            table.prior(seen)
