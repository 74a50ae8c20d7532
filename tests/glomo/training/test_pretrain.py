"""GLoMo pre-training: held-out windows, the validation loss, and the graph that comes out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glomo.data import Vocabulary, Windows
from glomo.errors import UserError
from glomo.nn import GLoMo, GLoMoConfig, dead_row_rescue
from glomo.training import checkpoint
from glomo.training.models import load_graph
from glomo.training.pretrain import (
    Pace,
    PretrainConfig,
    PretrainData,
    _held_out,
    build_vocabulary,
    count_predictions,
    pretrain,
    start_from_vectors,
    validate,
)
from glomo.training.targets import words
from glomo.training.train_config import TrainConfig

HAMLET = Path(__file__).parents[2] / "data" / "hamlet-act-1.txt"
SMALL = GLoMoConfig(dim=16, layers=2, heads=2, head_dim=8, conv_blocks=1, decoder_layers=1, horizon=2)
DATA = PretrainData(text=(str(HAMLET),), vocab_size=500, length=32, valid=0.1, valid_windows=10)
TRAIN = TrainConfig(
    steps=4, batch_size=8, eval_every=2, checkpoint_every=2, progress=0, device="cpu", threads=1, lr=1e-2
)
CONFIG = PretrainConfig(DATA, SMALL, TRAIN)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain") / "run"
    pretrain(replace(CONFIG, train=replace(TRAIN, steps=1)), out)
    return out


@pytest.mark.parametrize("objective", ["unit", "sentence"])
def test_the_validation_loss_is_the_mean_over_all_predicted_units(objective):
    texts = HAMLET.read_text().splitlines()[:40]
    vocabulary = Vocabulary.build(texts, 200)
    windows = Windows(texts, vocabulary, 20, 3)
    torch.manual_seed(0)
    model = GLoMo(replace(SMALL, vocab_size=len(vocabulary), objective=objective, positions=2)).train()
    indices = [5, 0, 17, 11, 3]
    found = validate(model, windows, indices, 2, torch.device("cpu"))
    total, count = 0.0, 0
    model.eval()
    for index in indices:  # one by one, and the number of predicted units counted by hand
        tokens, lengths = windows.batch([index])
        n = int(lengths)
        if objective == "unit":
            terms = sum(1 for t in range(n) for d in (1, 2) if t + d < n)
        else:
            terms = n - max(1, n // 2)
        assert count_predictions(model.config, lengths) == terms
        total += float(model(tokens, lengths).detach()) * terms
        count += terms
    assert found["valid_loss"] == pytest.approx(total / count, rel=1e-5)
    assert 0 <= found["share_dead"] <= found["share_zero"] <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 10, 57, 1000])
def test_held_out_windows_are_few_spread_and_never_all(count):
    held = _held_out(count, replace(DATA, valid=0.05, valid_windows=20))
    assert len(held) == len(set(held)) == min(max(1, round(0.05 * count)), 20, count - 1)
    assert all(0 <= index < count for index in held)
    if count == 1000:
        assert held == list(range(25, 1000, 50))
    assert _held_out(count, replace(DATA, valid=0.0)) == []


def test_vocabularies_are_as_asked():
    texts = ["The year 1999", "the Rest"]
    words = build_vocabulary(texts, replace(DATA, lowercase=False, digits=False))
    assert {"The", "the", "1999"} <= set(words.words)
    assert "N" in build_vocabulary(texts, DATA).words
    assert (
        build_vocabulary(HAMLET.read_text().splitlines(), replace(DATA, vocabulary="subwords")).to_dict()["kind"]
        == "subwords"
    )


def test_the_graph_of_a_run_is_the_trained_one_with_its_vocabulary(tmp_path):
    row = pretrain(CONFIG, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert rows[-1] == row
    assert rows[0]["loss"] > rows[-1]["loss"]
    assert {"valid_loss", "share_zero", "share_dead"} <= rows[1].keys()
    saved = checkpoint.load(tmp_path / "run" / "final")
    model = GLoMo(GLoMoConfig.from_dict(saved.meta["model"]))
    model.load_state_dict(saved.weights)
    for path in ("run/final", "run/checkpoints/step-000004"):
        graph = load_graph(tmp_path / path)
        tokens = torch.tensor([graph.vocabulary.encode("to be or not to be")])
        lengths = torch.tensor([tokens.shape[1]])
        for mine, its in zip(
            model.eval().graph_predictor(tokens, lengths), graph.queries_keys(tokens, lengths), strict=True
        ):
            assert torch.equal(mine.materialise(), its.materialise())
    assert load_graph(tmp_path / "run").vocabulary.fingerprint == graph.vocabulary.fingerprint  # its best/


def test_graphs_that_do_not_fit_their_vocabulary_are_refused(tmp_path):
    pretrain(replace(CONFIG, train=replace(TRAIN, steps=1)), tmp_path / "run")
    file = tmp_path / "run" / "final" / "meta.json"
    meta = json.loads(file.read_text())
    other = Vocabulary.build(["some other words"], 100)
    file.write_text(json.dumps({**meta, "vocabulary": other.to_dict()}))
    sentence = f"{other.fingerprint[:12]} of 5 units.*trained with {meta['vocabulary_fingerprint'][:12]} of 500 units"
    with pytest.raises(UserError, match=sentence):
        load_graph(tmp_path / "run" / "final")
    file.write_text(json.dumps({**meta, "kind": "classifier"}))
    with pytest.raises(UserError, match="holds no graph"):
        load_graph(tmp_path / "run" / "final")
    with pytest.raises(UserError, match="no checkpoint folder"):
        load_graph(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a whole checkpoint: meta.json"):
        load_graph(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": None}, "meta.json is damaged"),
        ({"model": {}}, "meta.json is damaged"),
        ({"model": "x"}, "meta.json is damaged"),
        ({"model": {"vocab_size": 500, "dim": "16"}}, "meta.json is damaged"),
        ({"model": {"vocab_size": 500, "dim": 16.0}}, "meta.json is damaged"),
        ({"vocabulary_fingerprint": 5}, "meta.json is damaged"),
        ({"vocabulary": 5}, "'words', 'subwords' or 'pixels' is needed"),
        ({"model": {"vocab_size": 500, "dim": 0}}, "final: model.dim is 0"),
        ({"tied": 5}, "is damaged"),
        ({"tied": {"a": []}}, "is damaged"),
    ],
    ids=str,
)
def test_a_damaged_description_of_a_graph_is_told(a_run, tmp_path, changes, sentence):
    folder = tmp_path / "final"
    shutil.copytree(a_run / "final", folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))
    with pytest.raises(UserError, match=sentence):
        load_graph(folder)
    for key in changes.keys() - {"tied"}:
        (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != key}))
        with pytest.raises(UserError, match=r"meta.json is damaged.*Key|'words' or 'subwords'"):
            load_graph(folder)


@pytest.mark.parametrize("key", ["length", "valid_windows", "min_count"])
def test_settings_out_of_range(key):
    with pytest.raises(UserError, match=f"data.{key} is -1"):
        replace(DATA, **{key: -1})


def test_changed_text_is_noticed_when_the_run_is_taken_up_again(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("one two three four five six seven\n" * 20)
    config = replace(CONFIG, data=replace(DATA, text=(str(text),)))
    pretrain(config, tmp_path / "run")
    text.write_text("one two three four five seven six\n" * 20)  # the same words: the same vocabulary
    with pytest.raises(UserError, match="made with another text"):
        pretrain(config, tmp_path / "run")
    text.write_text("quite other words\n" * 20)
    with pytest.raises(UserError, match="made with another vocabulary"):
        pretrain(config, tmp_path / "run")


def test_too_little_text(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("a b\n")
    with pytest.raises(UserError, match="has 2 units, but at least 3 are needed"):
        pretrain(replace(CONFIG, data=replace(DATA, text=(str(text),))), tmp_path / "run")
    with pytest.raises(UserError, match="names no text"):
        pretrain(replace(CONFIG, data=PretrainData()), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    text.write_text("a b c\n")  # one window: trained on, nothing to validate with
    row = pretrain(replace(CONFIG, data=replace(DATA, text=(str(text),))), tmp_path / "run")
    assert "valid_loss" not in row
    assert load_graph(tmp_path / "run").config.vocab_size == 5


def test_the_graphs_networks_learn_at_a_pace_of_their_own(tmp_path):
    """Weights after 1, 2 and 4 steps: frozen for two steps, then learning; frozen for good; slower."""

    def weights(pace, steps, name):
        out = tmp_path / f"{name}-{steps}"
        pretrain(replace(CONFIG, train=replace(TRAIN, steps=steps, eval_every=0), pace=pace), out)
        found = checkpoint.load(out / "final").weights
        graph = {key: value for key, value in found.items() if key.startswith("graph_predictor.directions")}
        return graph, {key: value for key, value in found.items() if key not in graph}

    def equal(one, other):
        return all(torch.equal(value, other[key]) for key, value in one.items())

    late = {steps: weights(Pace(graph_from=2), steps, "late") for steps in (1, 2, 4)}
    assert equal(late[1][0], late[2][0])
    assert not equal(late[1][1], late[2][1])
    assert not equal(late[2][0], late[4][0])
    assert equal(weights(Pace(graph_rate=0.0), 4, "never")[0], late[2][0])
    start, slow, usual = late[1][0], weights(Pace(graph_rate=0.1), 1, "slow")[0], weights(Pace(), 1, "usual")[0]
    for key in start:  # AdamW's first step is as large as the rate
        torch.testing.assert_close(slow[key] - start[key], 0.1 * (usual[key] - start[key]), rtol=0.02, atol=1e-6)
    with pytest.raises(UserError, match=r"pace.graph_rate is -1"):
        Pace(graph_rate=-1)


def test_the_rescue_ends_step_by_step(tmp_path, monkeypatch):
    shares = []

    def noted(graphs, *args):
        shares.append(models[-1].rescue_share)
        return dead_row_rescue(graphs, *args)

    models = []
    create = GLoMo.__init__
    monkeypatch.setattr(GLoMo, "__init__", lambda self, config: models.append(self) or create(self, config))
    monkeypatch.setattr("glomo.nn.glomo.dead_row_rescue", noted)
    model = replace(CONFIG.model, rescue_weight=1.0)
    train = replace(TRAIN, steps=6)
    pretrain(replace(CONFIG, model=model, train=train, pace=Pace(rescue_until=4)), tmp_path / "run")
    assert shares == [0.75] * 2 + [0.5] * 2 + [0.25] * 2  # both directions, and none from step 4 on
    with pytest.raises(UserError, match=r"model.rescue_weight is 0: there is none"):
        pretrain(replace(CONFIG, pace=Pace(rescue_until=4)), tmp_path / "other")


def test_the_rescue_term_counts_by_its_share():
    torch.manual_seed(0)
    config = GLoMoConfig(vocab_size=9, dim=4, heads=2, layers=2, head_dim=2, conv_blocks=1, initial_bias=-1.0)
    model = GLoMo(replace(config, rescue_weight=3.0))
    batch = torch.randint(1, 9, (2, 5)), torch.tensor([5, 4])
    loss = []
    for model.rescue_share in (0.0, 0.5, 1.0):
        loss.append(model(*batch, torch.Generator().manual_seed(0)).item())
    assert loss[0] < loss[1] < loss[2]
    assert loss[1] - loss[0] == pytest.approx(loss[2] - loss[1], rel=1e-4)


def test_a_paced_run_goes_on_to_the_same_bits(tmp_path):
    pace = Pace(graph_rate=0.5, graph_from=2, rescue_until=3)
    config = replace(CONFIG, model=replace(CONFIG.model, rescue_weight=1.0), pace=pace)
    pretrain(config, tmp_path / "whole")
    pretrain(replace(config, train=replace(TRAIN, steps=2)), tmp_path / "parts")
    pretrain(config, tmp_path / "parts")
    one, other = (checkpoint.load(tmp_path / name / "final").weights for name in ("whole", "parts"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_embeddings_start_from_vectors(monkeypatch):
    vocabulary = Vocabulary.build(["a b c d"], 10)
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    monkeypatch.setattr(words, "_glove_cache", [({"c": 0, "a": 1, "other": 0}, table)])
    torch.manual_seed(0)
    weight = torch.randn(len(vocabulary), 5)
    before = weight.clone()
    assert start_from_vectors(weight, vocabulary) == 2
    rows = vocabulary.encode("c a")
    vectors = torch.from_numpy(table)
    expected = (vectors - vectors.mean(0)) * (before.std() / vectors.std())
    torch.testing.assert_close(weight[rows, :3], expected)
    weight[rows, :3] = before[rows, :3]
    assert torch.equal(weight, before)
    with pytest.raises(UserError, match=r"model.dim is 2; data.vectors has 3 columns"):
        start_from_vectors(torch.zeros(len(vocabulary), 2), vocabulary)


def test_a_sampled_softmax_and_buckets_in_a_recipe(tmp_path):
    data = replace(DATA, buckets=20, digits=False, vocab_size=100)
    row = pretrain(replace(CONFIG, data=data, model=replace(SMALL, sampled_softmax=10)), tmp_path / "run")
    assert row["valid_loss"] > 0
    vocabulary = load_graph(tmp_path / "run").vocabulary
    assert len(vocabulary) == 120
    assert vocabulary.unk_id not in vocabulary.encode("Rosencrantz zzz 1601")
    with pytest.raises(UserError, match="unknown to subwords"):
        PretrainData(text=("x",), vocabulary="subwords", buckets=3)
