import json
import warnings

import pytest
import torch

from glomo import plots
from glomo.cli.main import main
from glomo.data import Vocabulary
from glomo.nn import GLoMo, GLoMoConfig
from glomo.training import checkpoint
from glomo.training.comparison import Run, compare
from glomo.training.models import graph_meta


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000


@pytest.fixture
def graph_folder(tmp_path):
    vocabulary = Vocabulary.build(["the cat sat on the mat"], 20)
    config = GLoMoConfig(dim=8, layers=2, heads=2, head_dim=4, conv_blocks=1, vocab_size=len(vocabulary))
    model = GLoMo(config)
    checkpoint.save(tmp_path / "graph", model.state_dict(), {}, graph_meta(config, vocabulary, {}))
    return tmp_path / "graph"


def test_plot_draws_both_pictures(graph_folder, tmp_path, capsys):
    assert main(["plot", str(graph_folder), "--text", "the cat sat", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / "out" / name) for name in ("heat-maps.png", "arcs.png")]
    assert all(is_png(tmp_path / "out" / name) for name in ("heat-maps.png", "arcs.png"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs a graph and a sentence"),
        (["--text", "the"], "needs a graph and a sentence"),
        (["GRAPH", "--text", "the"], "the text has 1 unit; a picture"),
        (["GRAPH", "--text", "the " * 61], "the text has 61 units"),
        (["GRAPH", "--text", "the cat", "--size", "3"], "no option --size"),
        (["nowhere", "--text", "the cat"], "nowhere"),
    ],
)
def test_plot_refuses_in_one_sentence(arguments, words, graph_folder, capsys):
    arguments = [str(graph_folder) if a == "GRAPH" else a for a in arguments]
    assert main(["plot", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("directions", [1, 2])
def test_a_heat_map_for_each_direction_layer_and_head(directions, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    from glomo import plots

    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    graphs = torch.rand(directions, 6, 3, 3)
    plots.heat_maps(graphs, 3, ["a", "b", "c"], tmp_path / "x.png")
    (figure,) = figures
    shown = [torch.from_numpy(axis.get_images()[0].get_array().data) for axis in figure.axes]
    assert torch.equal(torch.stack(shown), graphs.flatten(0, 1))
    labels = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    both = ["target (reads what came before)"] * 2 + ["target (reads what comes after)"] * 2
    assert labels == (both if directions == 2 else ["target"] * 2)
    below = figure.axes[-1]
    assert [tick.get_text() for tick in below.get_xticklabels()] == ["a", "b", "c"]


def test_arcs_are_the_links_that_are_strong_enough():
    from glomo.plots import _links

    graphs = torch.zeros(2, 4, 3, 3)
    graphs[0, 2, 2, 0] = 0.9  # forward, layer 2, head 1: target 2 reads source 0
    graphs[1, 3, 0, 1] = 0.2
    graphs[1, 3, 0, 2] = 0.1
    assert _links(graphs, 0, 2, 0.15) == []
    assert _links(graphs, 1, 2, 0.15) == [(0, 0, 2, 0), (1, 1, 0, 1)]


def test_accuracies_and_report(graph_folder, tmp_path, capsys, monkeypatch):
    from glomo.cli import demo
    from glomo.cli import plot as plot_command

    runs = [Run(g, s, {"accuracy": 0.5 + 0.1 * s}, None, None, 1.0) for g in ("none", "learned") for s in (0, 1)]
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "results.json").write_text(json.dumps({"task": "x", **compare(runs)}))
    monkeypatch.setattr(plot_command, "draw", lambda *_: [])
    demo.report(tmp_path, {"a task": tmp_path / "task"})
    printed = capsys.readouterr().out
    assert "learned - it" in printed
    assert "55.0 ± 7.1" in printed
    assert is_png(tmp_path / "task" / "accuracies.png")


def test_info_names_every_op_and_why(capsys, monkeypatch):
    monkeypatch.setenv("GLOMO_BACKEND", "reference")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "relu2_graph_mix runs on 'reference', because GLOMO_BACKEND forces it." in printed
    assert torch.__version__ in printed
    assert main(["info", "x"]) == 2


def test_demo_refuses_unknown_options(capsys):
    assert main(["demo", "--quick", "yes"]) == 2
    assert "--out" in capsys.readouterr().err


def test_offsets_are_counted_from_the_target(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    graphs = torch.zeros(2, 2, 9, 9)  # 3 x 3 pixels
    graphs[0, 0, 4, 1] = 1.0  # the middle reads the pixel above it
    graphs[0, 0, 8, 5] = 1.0  # and the last one too
    graphs[0, 0, 5, 4] = 2.0  # another its neighbour on the left
    plots.offsets(graphs, 2, 3, tmp_path / "x.png")
    (figure,) = figures
    shown = figure.axes[0].get_images()[0].get_array().data
    expected = torch.zeros(5, 5)
    expected[1, 2], expected[2, 1] = 0.5**0.5, 0.5**0.5
    torch.testing.assert_close(torch.from_numpy(shown), expected)


def test_a_graph_of_words_has_no_pixels(graph_folder, capsys):
    assert main(["plot", str(graph_folder), "--images", "mnist"]) == 2
    assert "is a graph of words" in capsys.readouterr().err


def test_a_study_is_a_picture(tmp_path):
    from glomo.training.study import summary

    def run(variant, seed, score):
        figures = {"task": "t", "variant": variant, "seed": seed, "measure": "f1", "figures": {"f1": score}}
        return {**figures, "share_zero": 0.5, "share_dead": 0.0, "seconds": 1.0}

    runs = [run(name, seed, 0.1 * seed + place) for place, name in enumerate(("a", "b $x$")) for seed in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, part in (("both", runs), ("one", runs[:2])):
            plots.study(summary(part, {}), tmp_path / f"{name}.png")
            assert is_png(tmp_path / f"{name}.png")
