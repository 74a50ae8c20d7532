"""Graphs in half precision: written, read back, and those that come with the package."""

from pathlib import Path

import pytest
import torch

import glomo
from glomo.cli.main import main
from glomo.data import pad
from glomo.errors import UserError
from glomo.nn import GLoMoConfig
from glomo.pretrained import FOLDER, pretrained_names
from glomo.training.models import export_graph, load_graph
from glomo.training.pretrain import PretrainConfig, PretrainData, pretrain
from glomo.training.train_config import TrainConfig

HAMLET = Path(__file__).parents[1] / "data" / "hamlet-act-1.txt"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("graph") / "run"
    model = GLoMoConfig(dim=16, layers=2, heads=2, head_dim=8, conv_blocks=1, decoder_layers=1)
    data = PretrainData(text=(str(HAMLET),), vocab_size=300, length=32)
    train = TrainConfig(steps=2, batch_size=8, eval_every=0, checkpoint_every=0, progress=0, device="cpu", threads=1)
    pretrain(PretrainConfig(data, model, train), out)
    return out


def test_an_exported_graph_is_the_graph_in_half_precision(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "small")]) == 0
    assert "MB in" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["meta.json", "model.safetensors"]
    whole, small = load_graph(run), load_graph(tmp_path / "small")
    assert small.vocabulary.fingerprint == whole.vocabulary.fingerprint
    for name, value in whole.state_dict().items():
        assert torch.equal(small.state_dict()[name], value.half().float()), name
    with pytest.raises(UserError, match="exists already"):
        export_graph(run, tmp_path / "small")
    assert main(["export", str(run)]) == 2


@pytest.mark.parametrize("name", pretrained_names())
def test_what_comes_with_the_package(name):
    size = sum(file.stat().st_size for file in (FOLDER / name).iterdir())
    assert size <= 8e6
    graph = glomo.load_pretrained(name)
    texts = ["Who built the first bridge over the river?", "The bridge was built by the king ."]
    units, lengths = pad([graph.vocabulary.encode(text) for text in texts])
    assert (units != graph.vocabulary.unk_id).all()
    graphs = graph.graph_predictor.graphs(units, lengths)
    rows = graphs.sum(-1)
    assert graphs.isfinite().all()
    assert (((rows - 1).abs() < 1e-3) | (rows == 0)).all()
    named = load_graph(name)  # as --graph.path takes it
    assert torch.equal(named.graph_predictor.embedding.weight, graph.graph_predictor.embedding.weight)
    card = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    for part in ("CC BY-SA", "seed", "glomo pretrain"):
        assert part in card


def test_the_graph_of_the_readme_is_there():
    assert "graph-en-small" in pretrained_names()


def test_an_unknown_name_is_a_sentence():
    with pytest.raises(UserError, match="there is no graph 'graph-de' in this package"):
        glomo.load_pretrained("graph-de")
