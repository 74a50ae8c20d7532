"""Transfer with controls on small files: what is compared, what is paired, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glomo.data import Vocabulary
from glomo.errors import UserError
from glomo.nn import FrozenGraph, GLoMoConfig, NoGraph, UniformGraph, random_graph
from glomo.training import checkpoint
from glomo.training.models import load_graph
from glomo.training.pretrain import PretrainConfig, PretrainData, pretrain
from glomo.training.targets import classifier, words
from glomo.training.targets.target import statistics
from glomo.training.targets.texts import Examples
from glomo.training.targets.words import WordFeatures, word_table
from glomo.training.train_config import TrainConfig
from glomo.training.transfer import transfer
from glomo.training.transfer_config import Compare, Features, GraphOptions, Head, TransferConfig, TransferData
from glomo.training.tune import Tune

HERE = Path(__file__).parents[2] / "data"
DATA = TransferData(str(HERE / "speeches-train.csv"), str(HERE / "speeches-test.csv"), length=20)
TRAIN = TrainConfig(
    steps=3, batch_size=8, eval_every=0, checkpoint_every=0, progress=0, device="cpu", threads=1, keep=1
)
CONFIG = TransferConfig(DATA, Features(dim=8), GraphOptions(), Head(hidden=8), Compare(seeds=1), TRAIN)


@pytest.fixture(scope="module")
def graph_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("graph") / "run"
    model = GLoMoConfig(dim=16, layers=2, heads=2, head_dim=8, conv_blocks=1, decoder_layers=1)
    data = PretrainData(text=(str(HERE / "hamlet-act-1.txt"),), vocab_size=300, length=32)
    pretrain(PretrainConfig(data, model, replace(TRAIN, steps=2)), out)
    return str(out)


def test_every_graph_with_every_seed(tmp_path, graph_folder):
    config = replace(CONFIG, graph=GraphOptions(path=graph_folder), compare=Compare(seeds=2))
    results = transfer(config, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    names = ["none", "uniform", "band", "random", "learned"]
    assert [(r["graph"], r["seed"]) for r in results["runs"]] == [(n, s) for s in (0, 1) for n in names]
    assert list(results["differences"]) == [f"learned - {n}" for n in names[:-1]]
    graphs = results["graphs"]
    assert graphs["none"]["share_zero"] is None
    assert graphs["uniform"]["share_zero"] == 0
    assert 0 <= graphs["learned"]["share_zero"] <= 1
    assert graphs["band"]["share_zero"] > 0.3
    assert all(0 <= r["figures"]["accuracy"] <= 1 for r in results["runs"])

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    original, classifier.TextClassifier.forward = classifier.TextClassifier.forward, fail
    try:  # a finished comparison is read back, and one more seed trains that seed only
        again = transfer(config, tmp_path / "out")
    finally:
        classifier.TextClassifier.forward = original
    assert again == results
    more = transfer(replace(config, compare=Compare(("none", "learned"), 3)), tmp_path / "out")
    assert [r for r in more["runs"] if r["seed"] < 2] == [
        r for r in results["runs"] if r["graph"] in ("none", "learned")
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"features": Features(states=True, dim=6), "head": Head("bigru", 8)},
        {"features": Features("random", 8), "graph": GraphOptions(weights="target", layers="last", fusion="concat")},
        {"graph": GraphOptions(chains=False, fusion="none", mixtures=1)},
    ],
)
def test_options_train(tmp_path, graph_folder, changes):
    config = replace(CONFIG, compare=Compare(("learned", "uniform"), 1), **changes)
    transfer(replace(config, graph=replace(config.graph, path=graph_folder)), tmp_path)


def test_a_learned_task_is_learned_and_the_frozen_graph_is_not_touched(tmp_path, graph_folder):
    files = []
    for part in ("train", "test"):
        file = tmp_path / f"{part}.csv"
        file.write_text("text,label\n" + "".join(f"{a} good sir,yes\n{a} bad man,no\n" for a in "abcdefgh"))
        files.append(str(file))
    config = replace(
        CONFIG,
        data=TransferData(*files),
        graph=GraphOptions(path=graph_folder),
        compare=Compare(("learned", "none"), 1),
        train=replace(TRAIN, steps=60, lr=1e-2),
    )
    results = transfer(config, tmp_path / "out")
    assert [r["figures"]["accuracy"] for r in results["runs"]] == [1.0, 1.0]


def test_a_graph_that_is_tuned_learns_with_the_task(tmp_path, graph_folder):
    def weights(name, **graph):
        options = GraphOptions(path=graph_folder, **graph)
        config = replace(CONFIG, graph=options, compare=Compare(("none", "learned"), 1), train=replace(TRAIN, steps=1))
        transfer(config, tmp_path / name)
        return checkpoint.load(tmp_path / name / "learned-0" / "final").weights

    before = {f"graph.{key}": value for key, value in load_graph(graph_folder).state_dict().items()}
    fast, slow = weights("fast", rate=1.0), weights("slow", rate=0.1)
    moved = 0
    for key, old in before.items():  # AdamW's first step is as large as the rate, and decay is a share of it
        torch.testing.assert_close(slow[key] - old, 0.1 * (fast[key] - old), rtol=0.05, atol=1e-6)
        moved += int((fast[key] != old).any())
    assert moved > len(before) / 2
    frozen = weights("frozen")
    assert not any(key.startswith("graph.") for key in frozen)
    for key, value in frozen.items():  # one step from the same start, whatever the graph does
        torch.testing.assert_close(fast[f"task.{key}"], value)
    config = replace(CONFIG, graph=GraphOptions(path=graph_folder, rate=1.0), tune=Tune(method="top"))
    with pytest.raises(UserError, match=r"graph.rate needs tune.method full"):
        transfer(config, tmp_path / "out")


def test_a_tuned_run_goes_on_to_the_same_bits_and_its_graphs_move(tmp_path, graph_folder):
    graph = GraphOptions(path=graph_folder, rate=1.0)
    compare = Compare(("learned",), 1)
    config = replace(CONFIG, graph=graph, compare=compare, train=replace(TRAIN, steps=4, lr=1e-2))
    transfer(config, tmp_path / "whole")
    transfer(replace(config, train=replace(config.train, steps=2)), tmp_path / "parts")
    transfer(config, tmp_path / "parts")
    files = [tmp_path / name / "learned-0" / "final" for name in ("whole", "parts")]
    whole, parts = (checkpoint.load(file).weights for file in files)
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    # what the task sees is the graph as it is now: of the first step's weights alone the second one's would be others
    still = replace(config, graph=GraphOptions(path=graph_folder), train=replace(config.train, steps=4))
    transfer(still, tmp_path / "still")
    frozen = checkpoint.load(tmp_path / "still" / "learned-0" / "final").weights
    assert any(not torch.equal(whole[f"task.{key}"], value) for key, value in frozen.items())


@pytest.mark.parametrize("name", ["learned", "random"])
def test_a_recipe_cuts_its_graph(tmp_path, graph_folder, name):
    dead = []
    for cut in (0.0, 1e3):
        graph = GraphOptions(path=graph_folder, cut=cut)
        results = transfer(replace(CONFIG, graph=graph, compare=Compare((name,), 1)), tmp_path / str(cut))
        dead.append(results["graphs"][name]["share_dead"])
    assert dead[0] < 1
    assert dead[1] == 1


def test_a_run_goes_on_with_its_graph_alone(tmp_path, graph_folder):
    config = replace(CONFIG, graph=GraphOptions(path=graph_folder), compare=Compare(("none", "learned"), 1))
    folder = tmp_path / "graph"
    shutil.copytree(graph_folder, folder)
    config = replace(config, graph=GraphOptions(path=str(folder)))
    transfer(config, tmp_path / "out")
    shutil.rmtree(folder)
    data = PretrainData(text=(str(HERE / "hamlet-act-1.txt"),), vocab_size=300, length=32)
    model = GLoMoConfig(dim=16, layers=2, heads=2, head_dim=8, conv_blocks=1, decoder_layers=1)
    pretrain(PretrainConfig(data, model, replace(TRAIN, steps=3)), folder)
    with pytest.raises(UserError, match="was made with another graph"):
        transfer(config, tmp_path / "out")


def test_texts_become_units_of_the_graphs_vocabulary():
    vocabulary = Vocabulary.build(["to be or not"], 100)
    examples = Examples.of([("To be 3 times", "x"), ("or", "y")], vocabulary, ["x", "y"], 3)
    assert examples.words == [["to", "be", "3"], ["or"]]
    assert examples.ids == [vocabulary.encode("to be 3"), vocabulary.encode("or")]
    assert examples.labels == [0, 1]
    with pytest.raises(UserError, match="label 'z' is unknown"):
        Examples.of([("a", "z")], vocabulary, ["x", "y"], 3)


def test_word_tables(monkeypatch):
    train, test = [["a"], ["b"]], [["b", "C"]]
    table = word_table(Features("learned", 4), train, test, 0)
    assert table.rows == {"a": 2, "b": 3}
    assert table.encode(["b", "C"]) == [3, 1]
    assert table.vectors.shape == (4, 4)
    assert not table.vectors[:2].any()
    table = word_table(Features("random", 4), train, test, 0)
    assert set(table.rows) == {"a", "b", "C"}
    assert not torch.equal(table.vectors, word_table(Features("random", 4), train, test, 1).vectors)
    monkeypatch.setattr(words, "_glove_cache", [({"b": 0, "c": 1}, torch.tensor([[1.0, 2], [3, 4]]).numpy())])
    table = word_table(Features("glove-50d"), train, test, 0)
    assert table.vectors[table.rows["C"]].tolist() == [3, 4]
    assert "a" not in table.rows
    # with characters every word has a row: one that GloVe lacks is told by them alone
    table = word_table(Features("glove-50d", chars=3), train, test, 0)
    assert table.vectors[table.rows["a"]].tolist() == [0, 0]
    assert table.characters[table.rows["a"]].tolist() == [2] + [0] * 15
    assert table.characters[table.rows["C"]].tolist() == [1] + [0] * 15
    assert table.unseen_characters == 1


def test_character_features_are_those_of_the_formula():
    torch.manual_seed(0)
    table = word_table(Features("random", 4, chars=3), [["ab", "bcd", "abcdefghijklmnopqrst"]], [], 0)
    features = WordFeatures(table, False, 3).double()
    rows = torch.tensor([[3, 2, 0], [4, 2, 1]])
    found = features(rows)
    assert found.shape == (2, 3, 7)
    assert torch.equal(found[..., :4], table.vectors.double()[rows])
    weight, bias = features.conv.weight, features.conv.bias
    for place in ((0, 0), (0, 1), (1, 0)):
        spelled = features.characters(table.characters[rows[place]].long())
        around = torch.nn.functional.pad(spelled, (0, 0, 2, 2))
        windows = torch.stack([torch.einsum("fck,kc->f", weight, around[i : i + 5]) + bias for i in range(16)])
        torch.testing.assert_close(found[place][4:], windows.relu().amax(0))


def test_statistics_are_those_of_the_graphs_in_full():
    vocabulary = Vocabulary.build(["a b c d e f"], 100)
    graph = random_graph(
        GLoMoConfig(vocab_size=len(vocabulary), dim=8, layers=2, heads=2, head_dim=4, initial_bias=-0.05), vocabulary, 0
    )
    assert isinstance(graph, FrozenGraph)
    ids = [[2, 3, 4, 5, 6], [7, 3], [4]]
    zero, dead = statistics(graph, ids, torch.device("cpu"))
    pairs = zeros = rows = deads = 0
    for units in ids:  # alone, without padding
        for graphs in graph.queries_keys(torch.tensor([units]), torch.tensor([len(units)])):
            for matrix in graphs.materialise()[0]:
                for t in range(1, len(units)):
                    pairs, zeros = pairs + t, zeros + int((matrix[t, :t] == 0).sum())
                    rows, deads = rows + 1, deads + int(not matrix[t].any())
    assert 0 < zeros < pairs
    assert (zero, dead) == (zeros / pairs, deads / rows)
    assert statistics(NoGraph(), ids, torch.device("cpu")) == (None, None)
    assert statistics(UniformGraph(), ids, torch.device("cpu")) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        (Head, {"dropout": 2.0}, "head.dropout"),
        (Head, {"hidden": 0}, "head.hidden"),
        (Head, {"hidden": 1, "kind": "bigru"}, "head.hidden"),
        (Features, {"dim": 0}, "features.dim"),
        (Features, {"dim": 1, "states": True}, "features.dim"),
        (TransferData, {"length": 0}, "data.length"),
        (TransferData, {"length": -1}, "data.length"),
        (TransferData, {"labels": -1}, "data.labels"),
        (Compare, {"seeds": 0}, "compare.seeds"),
        (GraphOptions, {"band": 0}, "graph.band"),
        (GraphOptions, {"mixtures": 0}, "graph.mixtures"),
        (Compare, {"graphs": ()}, "compare.graphs"),
    ],
    ids=str,
)
def test_settings_out_of_range(section, values, key):
    with pytest.raises(UserError, match=f"{key} is .*(needed|must)"):
        section(**values)


def test_a_draw_of_one_class_is_refused_before_anything_is_trained(tmp_path):
    config = replace(CONFIG, data=replace(DATA, labels=1), compare=Compare(("none",), 1))
    with pytest.raises(UserError, match=r"data.labels is 1; .* the seed 0 are all of the class"):
        transfer(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_slips_in_a_recipe(tmp_path):
    with pytest.raises(UserError, match=r"compare\.graphs names 'learnt'; the nearest known one is learned"):
        transfer(replace(CONFIG, compare=Compare(("learnt",))), tmp_path)
    with pytest.raises(UserError, match=r"needs --graph\.path"):
        transfer(CONFIG, tmp_path)
    without = replace(CONFIG, compare=Compare(("none",), 1))
    with pytest.raises(UserError, match="two files"):
        transfer(replace(without, data=TransferData(train=DATA.train)), tmp_path / "a")
    with pytest.raises(UserError, match="names no task"):
        transfer(replace(without, data=TransferData()), tmp_path / "a")


@pytest.mark.parametrize("kind", ["learned", "random"])
@pytest.mark.parametrize(
    "tune",
    [
        Tune(method="gradual-unfreeze", stage_steps=1, factor=2.6),
        Tune(method="chain-thaw", patience=0),
        Tune(method="top"),
    ],
    ids=lambda tune: tune.method,
)
def test_stages(tmp_path, graph_folder, kind, tune):
    """Techniques of fine-tuning drive the classifier on a graph as well; fixed vectors stay as they are."""
    features = Features(kind, dim=8, states=True)
    train = replace(TRAIN, steps=8, checkpoint_every=1, keep=99)
    graph, comparison = GraphOptions(path=graph_folder), Compare(("none", "learned"), 1)
    config = replace(CONFIG, features=features, graph=graph, compare=comparison, tune=tune, train=train)
    if kind == "random" and tune.method == "chain-thaw":
        with pytest.raises(UserError, match="'embedding' trains nothing that can learn: embedding"):
            transfer(config, tmp_path)
        return
    transfer(config, tmp_path)
    for name in ("none-0", "learned-0"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        folders = checkpoint.step_folders(tmp_path / name / "checkpoints")
        weights = [checkpoint.load(folder).weights for folder in folders]
        fixed = [n for n in weights[0] if n.startswith("embedding")] if kind == "random" else []
        assert all(torch.equal(weights[0][n], weights[-1][n]) for n in fixed)
        for row, before, after in zip(rows[1:], weights, weights[1:], strict=False):
            if row["stage"] in ("last", "top", "head"):
                moved = {n for n, value in after.items() if not torch.equal(value, before[n])}
                assert moved
                assert all(n.startswith(("head", "out")) for n in moved)


def test_a_language_model_is_no_graph(tmp_path):
    with pytest.raises(UserError, match=r"tune.init is the language model .* a graph is named by graph.path"):
        transfer(replace(CONFIG, compare=Compare(("none",)), tune=Tune("runs/x")), tmp_path)
