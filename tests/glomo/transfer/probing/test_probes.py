"""Probes: what they can and cannot read, their figures counted by hand, and that nothing but the arguments matters."""

import copy
import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from glomo.transfer.probing import (
    LINEAR,
    MLP,
    Probe,
    ProbeSettings,
    Split,
    control_labels,
    probe,
    probe_layers,
    probe_table,
    regression_probe,
    selectivity,
    shift_task,
    split_documents,
    word_majority,
)
from glomo.transfer.probing.splits import seeded

SMALL = ProbeSettings(epochs=8, lr=5e-2)


def data(rows=300, dim=8, dtype=torch.float32, seed=0):
    """Features of very different scales, one of them constant; linear labels, and labels that are an exclusive or."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    linear = torch.bucketize(x[:, 0] - x[:, 1], torch.tensor([-0.7, 0.7], dtype=torch.float64))
    xor = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()
    x = x * torch.logspace(-3, 3, dim, dtype=torch.float64) + torch.linspace(-50, 50, dim, dtype=torch.float64)
    x[:, -1] = 0.1
    return x.to(dtype), linear, xor


def test_published_defaults():
    assert ProbeSettings("linear", 1024, 1e-3, 80, 50, 3, 0) == LINEAR
    assert ProbeSettings("mlp", 1024, 1e-3, 80, 50, 3, 0) == MLP
    assert [type(part) for part in Probe(4, 3, settings=MLP).network] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(p.shape) for p in Probe(4, 3, settings=MLP).network.parameters()] == [
        *((1024, 4), (1024,), (3, 1024), (3,))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_a_linear_and_an_mlp_probe_can_read(dtype):
    x, linear, xor = data(1500, dtype=torch.float64)
    x = (x - x.mean(0)).to(dtype)
    assert probe(x, linear, settings=SMALL).accuracy > 0.9
    assert probe(x, xor, settings=SMALL).accuracy < 0.65
    assert probe(x, xor, settings=ProbeSettings("mlp", hidden=64, lr=1e-2, epochs=20)).accuracy > 0.9


def test_figures_counted_by_hand():
    x, y, _ = data()
    split = split_documents(len(y), seed=3)
    result = probe(x, y, split=split, settings=SMALL)
    predicted = result.probe(x).argmax(-1)
    right = [int(predicted[i]) == int(y[i]) for i in split.test.tolist()]
    assert result.accuracy == sum(right) / len(right)
    right = [int(predicted[i]) == int(y[i]) for i in split.valid.tolist()]
    assert result.valid_accuracy == sum(right) / len(right)
    most = Counter(y[split.train].tolist()).most_common(1)[0][0]
    assert result.majority == sum(int(y[i]) == most for i in split.test.tolist()) / len(split.test)
    assert (result.classes, result.examples) == (3, (240, 30, 30))
    labels = torch.tensor([0, 0, 1, *[1] * 9])  # the most frequent label of the training rows is not that of all
    rows = Split(torch.arange(3), torch.arange(3, 7), torch.arange(7, 12))
    assert probe(x[:12], labels, split=rows, settings=SMALL).majority == 0


def test_features_are_standardised_by_the_training_rows():
    x, y, _ = data(dtype=torch.float64)
    split = split_documents(len(y), seed=1)
    model = probe(x, y, split=split, settings=SMALL).probe
    known = x[split.train].numpy()
    mean, std = known.mean(0), known.std(0)
    std[-1] = 1  # does not vary: it is not blown up
    np.testing.assert_allclose(model.mean[0].numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(model.std[0].numpy(), std, rtol=1e-9)
    layer = model.network[0]
    expected = ((x - torch.tensor(mean)) / torch.tensor(std)) @ layer.weight.T + layer.bias
    torch.testing.assert_close(model(x), expected)
    other = x.clone()
    other[split.test] *= 100  # rows to test on have no part in the statistics
    again = probe(other, y, split=split, settings=SMALL).probe
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_nothing_but_the_arguments_matters():
    x, y, _ = data()
    torch.manual_seed(1)
    first = probe(x, y, settings=MLP)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    with torch.no_grad():
        second = probe(x, y, settings=MLP)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == second
    for a, b in zip(first.probe.state_dict().values(), second.probe.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    other = probe(x, y, split=split_documents(len(y)), settings=ProbeSettings("mlp", seed=1))
    assert not torch.equal(first.probe.network[0].weight, other.probe.network[0].weight)


def test_early_stopping_goes_back_to_the_best_epoch(monkeypatch):
    """Against a loop of the same steps, scores and weights written out here."""
    x, y, _ = data(130)
    split, settings = split_documents(130), ProbeSettings(lr=0.3, batch_size=16, epochs=30, patience=3)
    result = probe(x, y, split=split, settings=settings)
    model = Probe(8, 3, settings=settings)
    model.standardise_by(x[split.train])
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=0.3), seeded(0, "order")
    history, weights = [], []
    for _ in range(30):
        order = split.train[torch.randperm(len(split.train), generator=generator)]
        for start in range(0, len(order), 16):
            part = order[start : start + 16]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
        history.append(float((model(x[split.valid]).argmax(-1) == y[split.valid]).float().mean()))
        weights.append(copy.deepcopy(model.state_dict()))
        best = history.index(max(history))  # the first of equal ones
        if len(history) - 1 - best == 3:
            break
    assert len(history) < 30
    assert history.count(max(history)) > 1  # an equal score is no gain
    assert result.epochs == len(history)
    assert result.valid_accuracy == pytest.approx(max(history))
    for name, value in result.probe.state_dict().items():
        assert torch.equal(value, weights[best][name])


def test_a_mixture_of_layers_finds_the_one_that_knows():
    generator = torch.Generator().manual_seed(5)
    y = torch.randint(3, (400,), generator=generator)
    noise = [torch.randn(400, 6, generator=generator) * 50 for _ in range(2)]
    knows = torch.randn(400, 6, generator=generator) + 3 * nn.functional.one_hot(y, 6)
    settings = ProbeSettings(lr=2e-2, epochs=20)
    result = probe([noise[0], knows, noise[1]], y, settings=settings)
    assert result.accuracy > 0.8
    assert int(result.probe.mix.weights.argmax()) == 1
    mixed = sum(
        w * (layer - mean) / std
        for w, layer, mean, std in zip(
            result.probe.mix.weights.softmax(0),
            [noise[0], knows, noise[1]],
            result.probe.mean,
            result.probe.std,
            strict=True,
        )
    )
    layer = result.probe.network[0]
    expected = result.probe.mix.gamma * mixed @ layer.weight.T + layer.bias
    torch.testing.assert_close(result.probe([noise[0], knows, noise[1]]), expected)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_saved_copied_and_loaded(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    x, y, _ = data()
    settings = ProbeSettings(kind, hidden=16, epochs=3)
    model = probe([x, x * 2], y, settings=settings).probe
    save_file(model.state_dict(), tmp_path / "probe.safetensors")
    other = Probe(8, 3, 2, settings)
    other.load_state_dict(load_file(tmp_path / "probe.safetensors"))
    assert torch.equal(other([x, x * 2]), model([x, x * 2]))
    assert torch.equal(copy.deepcopy(model)([x, x * 2]), model([x, x * 2]))


def test_regression():
    x, _, _ = data(500)
    z = (x - x.mean(0)) / x.std(0).clamp(min=1e-3)
    y = 1000 + 20 * (z[:, 0] - 2 * z[:, 1]) + torch.randn(500, generator=torch.Generator().manual_seed(1))
    split = split_documents(500)
    result = regression_probe(x, y, split=split, settings=ProbeSettings(lr=2e-2, epochs=40))
    assert result.r2 > 0.95
    assert result.spearman > 0.95
    known, test = y[split.train].double().numpy(), y[split.test].double().numpy()
    predicted = result.probe(x[split.test])[:, 0].detach().double().numpy() * known.std() + known.mean()
    r2 = 1 - ((test - predicted) ** 2).sum() / ((test - test.mean()) ** 2).sum()
    assert result.r2 == pytest.approx(r2, abs=1e-4)
    order = np.corrcoef(predicted.argsort().argsort(), test.argsort().argsort())[0, 1]
    assert result.spearman == pytest.approx(order, abs=1e-6)
    high = Split(*y.argsort().split([300, 100, 100]))  # the mean is that of the test rows
    result = regression_probe(x.double(), y, split=high, settings=SMALL)
    test = y[high.test].double()
    known = y[high.train].double()
    predicted = result.probe(x[high.test].double())[:, 0].detach() * known.std(correction=0) + known.mean()
    off = float((test - predicted).square().sum() / (test - test.mean()).square().sum())
    assert result.r2 == pytest.approx(1 - off)
    noise = torch.randn(500, generator=torch.Generator().manual_seed(2))
    assert regression_probe(x, noise, settings=SMALL).r2 < 0.2
    constant = regression_probe(x, torch.ones(500), settings=SMALL)
    assert np.isnan(constant.r2)
    assert constant.spearman == 0


def test_documents_are_never_cut():
    documents = [f"d{i // 7}" for i in range(140)]
    split = split_documents(documents, seed=4)
    where = [{documents[i] for i in part.tolist()} for part in split]
    assert [len(names) for names in where] == [16, 2, 2]
    assert not where[0] & where[1] | where[0] & where[2] | where[1] & where[2]
    assert sorted(torch.cat(split).tolist()) == list(range(140))
    as_numbers = split_documents(torch.arange(140) // 7, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(split, as_numbers, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(split, split_documents(documents, seed=5), strict=True))
    assert [len(part) for part in split_documents(3)] == [1, 1, 1]


def test_a_split_does_not_follow_a_task_of_the_same_seed():
    texts = [f"one two{i} three four{i}" for i in range(100)]
    for seed in range(5):
        labels = torch.tensor(shift_task(texts, torch.Generator().manual_seed(seed)).labels)
        for part in split_documents(100, valid=0.3, test=0.3, seed=seed):
            assert 0.25 < float(labels[part].double().mean()) < 0.75


def test_a_probe_of_units_holds_out_whole_documents():
    """Every document has its own direction: only a probe that knows the document beforehand does well."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.arange(400) // 10
    of_document = torch.randint(2, (40,), generator=generator)
    x = nn.functional.one_hot(documents, 40).float() + 0.01 * torch.randn(400, 40, generator=generator)
    by_document = probe(x, of_document[documents], documents, settings=SMALL)
    by_unit = probe(x, of_document[documents], settings=SMALL)
    assert by_unit.accuracy == 1
    assert by_document.accuracy < 0.9


def test_control_labels_are_a_function_of_the_word():
    words = [w for w in ("the", "cat", "sat", "mat", "dog", "ran") for _ in range(5)]
    labels = torch.arange(30) % 3
    found = control_labels(words, labels, seed=7)
    shares = [1 / 3, 2 / 3, 1]
    for word, label in zip(words, found.tolist(), strict=True):
        digest = hashlib.sha256(f"7\0str\0{word}".encode()).hexdigest()
        u = int(digest[:12], 16) / 2**48
        assert label == next(i for i, share in enumerate(shares) if u < share)
    backwards = control_labels(words[::-1], labels, seed=7)
    assert torch.equal(backwards.flip(0), found)
    assert len({tuple(control_labels(words, labels, seed=s).tolist()) for s in range(5)}) > 1


def test_control_labels_are_as_frequent_as_the_tasks():
    types = [f"w{i}" for i in range(3000)]
    labels = torch.tensor([0] * 300 + [1] * 600 + [3] * 2100)
    counts = control_labels(types, labels).bincount(minlength=4) / 3000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.0, 0.7]), atol=0.03, rtol=0)


def test_selectivity_of_features_that_only_know_the_word():
    """One-hot words: the control task is learned as well as the task, for words that are seen."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(12, (600,), generator=generator)
    x = nn.functional.one_hot(ids, 12).float()
    found = selectivity(x, ids % 2, [str(i) for i in ids.tolist()], settings=ProbeSettings(lr=2e-2))
    assert found.task.accuracy == found.control.accuracy == 1
    assert found.selectivity == 0
    parity = nn.functional.one_hot(ids % 2, 2).float()
    found = selectivity(parity, ids % 2, ids.tolist(), settings=ProbeSettings(lr=2e-2))
    assert found.task.accuracy == 1
    assert found.selectivity == 1 - found.control.accuracy > 0.1
    control = control_labels(ids.tolist(), ids % 2)
    assert found.control == probe(parity, control, settings=ProbeSettings(lr=2e-2))


def test_word_majority_counted_by_hand():
    words = ["a", "a", "a", "b", "b", "new", "a", "b"]
    labels = torch.tensor([1, 1, 0, 2, 0, 0, 0, 0])
    split = Split(torch.tensor([0, 1, 2, 3, 4]), torch.tensor([6]), torch.tensor([5, 7]))
    # b: 2 and 0 once each: the smaller; new: the most frequent of all is 0 and 1 (two each), the smaller 0
    assert word_majority(words, labels, split=split) == 1
    split = Split(torch.tensor([0, 1, 2]), torch.tensor([3]), torch.tensor([5, 6]))
    assert word_majority(words, labels, split=split) == 0  # new: 1, the most frequent of all; a: 1


def test_layers_beside_each_other():
    x, y, _ = data()
    features = {"first": x, "second": x[:, [1, 0, 2, 3, 4, 5, 6, 7]] * 3}
    results = probe_layers(features, y, settings=SMALL)
    assert list(results) == ["first", "second", "mix"]
    assert results["first"] == probe(x, y, settings=SMALL)
    assert results["mix"] == probe(list(features.values()), y, settings=SMALL)
    assert list(probe_layers({"a": x, "b": x[:, :5]}, y, settings=SMALL)) == ["a", "b"]
    lines = probe_table(results).splitlines()
    assert lines[0].split() == ["layer", "accuracy", "majority", "classes", "tested"]
    first = results["first"]
    assert lines[1].split() == ["first", f"{100 * first.accuracy:.2f}", f"{100 * first.majority:.2f}", "3", "30"]
    assert len({len(line) for line in lines}) == 1
    both = probe_layers({"a": x}, y, settings=SMALL, words=[str(i % 20) for i in range(300)])
    assert probe_table(both).splitlines()[0].split()[-2:] == ["control", "selectivity"]


def test_mistakes():
    x, y, _ = data(30)
    for features, words in (
        (x[0], r"the features are \(8,\)"),
        ([x, x[:, :2]], r"\(30, 8\), \(30, 2\); \(N, dim\), or several layers of one such shape"),
        ([], "the features are none"),
        (x.log(), "layer 0 are torch.float32 or not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            probe(features, y)
    with pytest.raises(TypeError, match=r"the labels are torch\.float32; whole numbers"):
        probe(x, y.float())
    for labels, words in (
        (y[:4], r"the labels are \(4,\) for 30 rows"),
        (y - 1, "a label is -1; numbers from 0 on"),
    ):
        with pytest.raises(ValueError, match=words):
            probe(x, labels)
    with pytest.raises(ValueError, match="there are 2 documents for 30 rows"):
        probe(x, y, documents=["a", "b"])
    with pytest.raises(ValueError, match="there are 2 documents, of which 1 and 1 are held out"):
        probe(x, y, documents=[i % 2 for i in range(30)])
    with pytest.raises(ValueError, match=r"valid is 0 and test 0\.1"):
        split_documents(10, valid=0)
    a, b, c = torch.arange(10), torch.arange(10, 20), torch.arange(20, 30)
    for split, words in (
        (Split(a, b, c[:0]), "the split has 10, 10 and 0 rows"),
        (Split(a, a, c), "names a row twice"),
        (Split(a, b, c + 1), "rows from 0 to 30; from 0 to 29"),
    ):
        with pytest.raises(ValueError, match=words):
            probe(x, y, split=split)
    with pytest.raises(ValueError, match="the document 0 is in two parts"):
        probe(x, y, documents=[0] * 30, split=Split(a, b, c))
    with pytest.raises(ValueError, match=r"the targets are \(2,\); 30 finite numbers"):
        regression_probe(x, [1.0, 2.0])
    with pytest.raises(ValueError, match="patience is 0"):
        ProbeSettings(patience=0)
    with pytest.raises(ValueError, match="kind is 'deep'"):
        ProbeSettings("deep")
    with pytest.raises(ValueError, match="a layer is called 'mix'"):
        probe_layers({"mix": x}, y)
    with pytest.raises(ValueError, match="there is no layer"):
        probe_layers({}, y)
    with pytest.raises(ValueError, match=r"the labels are \(30,\) for 1 rows"):
        control_labels(["a"], y)
    with pytest.raises(ValueError, match=r"the labels are \(0,\) for 0 rows; one each is needed, and at least one row"):
        control_labels([], [])
