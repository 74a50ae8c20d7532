"""names.method = "attributes" in `glomo finetune`: classes that no training saw, and tables that do not do. The figures
and the loss against the formula are in test_names.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig
from glomo.training.adapted import Adapters
from glomo.training.attribute_labels import AttributeLabels
from glomo.training.compare import CompareConfig
from glomo.training.config import load_recipe
from glomo.training.distil import Distil
from glomo.training.documents import FinetuneData
from glomo.training.finetune import finetune
from glomo.training.finetune_config import ClassifierConfig, FinetuneConfig, check_together
from glomo.training.names import Names
from glomo.training.train_config import TrainConfig
from glomo.training.trained_classifier import load_classifier
from glomo.training.tune import Tune

COLOURS, SHAPES = ("red", "blue", "green", "black", "white"), ("ring", "cube", "star", "cone", "disc")
UNSEEN = tuple(f"{colour} {shape}" for colour, shape in zip(COLOURS, SHAPES, strict=True))
TRAIN = TrainConfig(
    steps=120, batch_size=32, lr=1e-2, eval_every=0, checkpoint_every=0, progress=0, device="cpu", threads=1
)
LSTM = replace(AWDLSTMConfig.preset("tiny", dim=16, hidden=16).scaled(0), activation_reg=0.0, temporal_reg=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two words of a text hint at the colour and the shape of its label, each at one alone."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    classes = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    for name, count in (("train", 500), ("test", 100)):
        rows = ["text,label"]
        for colour, shape in (classes * 20)[:count]:
            hints = [colour + generator.choice(["ish", "ness"]), shape + generator.choice(["s", "like"]), "it"]
            rows.append(f"{' '.join(generator.permutation(hints))},{colour} {shape}")
        (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")
    columns = (*COLOURS, *SHAPES)
    rows = [",".join([" ".join(name), *(str(int(column in name)) for column in columns)]) for name in classes]
    (folder / "table.csv").write_text("\n".join([",".join(["class", *columns]), *rows]) + "\n")
    return folder


def config(data, train=TRAIN, **names):
    task = FinetuneData(str(data / "train.csv"), str(data / "test.csv"))
    section = Names(**{"method": "attributes", "attributes": str(data / "table.csv"), "unseen": UNSEEN, **names})
    classifier = ClassifierConfig(drop_mult=0.0, dropout=0.0, dropout_last=0.0)
    return FinetuneConfig(task, classifier, lstm=LSTM, train=train, names=section)


def test_classes_without_examples_are_found(tmp_path, data):
    found = finetune(config(data), tmp_path)["zero_shot"]
    assert found["chance"] == 0.2
    assert found["accuracy"] > 0.6


def test_what_is_saved():
    """The prior is made anew from the signatures of the seen classes."""
    labels = AttributeLabels(["a", "b", "c"], torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 1, 1]]))
    assert list(labels.state_dict()) == ["signatures"]
    assert labels.seen_prior.tolist() == pytest.approx([1 / 3, 0.5, 1 / 3])
    logits = torch.zeros(1, 3)
    first = -3 * np.log(2) - np.log([1 / 3, 1 / 2, 2 / 3]).sum()
    assert labels(logits)[0, 0].item() == pytest.approx(first, rel=1e-5)
    assert labels(logits, torch.full((3,), 0.5))[0].tolist() == pytest.approx([0.0] * 3, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("blue cube,1,0,0,0,0,1,0,0,0,0", "two classes are called 'blue cube'; each needs a name of its own"),
        ("navy cube,0,1,0,0,0,0,1,0,0,0", "the classes 'blue cube' and 'navy cube' have the same signature; they need"),
        (
            "blue orb,0,1,0,0,0,0,2,0,0,0",
            "table.csv, line 27: the attribute 'cube' of the class 'blue orb' is '2'; 0 or",
        ),
        ("blue orb,0,1", "table.csv, line 27: 3 fields where the header has 11"),
    ],
)
def test_tables_that_do_not_do(tmp_path, data, row, sentence):
    """Also because of classes that the data does not have."""
    (tmp_path / "table.csv").write_text((data / "table.csv").read_text() + row + "\n")
    with pytest.raises(UserError, match=r"^names.attributes is '.*table.csv': .*" + sentence):
        finetune(config(data, attributes=str(tmp_path / "table.csv")), tmp_path / "run")


def test_names_without_a_row(tmp_path, data):
    finetune(config(data, replace(TRAIN, steps=1)), tmp_path)
    loaded = load_classifier(tmp_path)
    for names, sentence in (
        (["red cube", "red cub"], "there is no row for the class 'red cub'; the nearest known one is red cube"),
        (["red cube", "red cube"], "two classes are called 'red cube'"),
    ):
        with pytest.raises(UserError, match=r"^names.attributes is '.*table.csv': " + sentence):
            loaded.predict(["redish"], names=names)


def test_adapters_are_not_written_alone(tmp_path, data):
    """A file of them has no labels."""
    finetune(config(data, replace(TRAIN, steps=1)), tmp_path / "first")
    made = replace(config(data, replace(TRAIN, steps=1)), tune=Tune(str(tmp_path / "first")), adapter=Adapters("lora"))
    finetune(made, tmp_path / "second")
    assert not (tmp_path / "second" / "adapters.safetensors").exists()
    assert len(load_classifier(tmp_path / "second").predict(["redish cubes"], names=UNSEEN)) == 1


def test_sections_that_do_not_go_together(data):
    made = config(data)
    smoothed = replace(made, classifier=replace(made.classifier, smoothing=0.1))
    with pytest.raises(UserError, match=r"the loss of names.method = 'attributes' has none"):
        check_together(smoothed)
    with pytest.raises(UserError, match=r"names.attributes is '.*table.csv', which goes without distil.teachers"):
        check_together(replace(made, distil=Distil(("x",))))


def test_the_recipe_compares_all_methods():
    made = load_recipe("compare-zero-shot", {}, CompareConfig, "compare")
    sections = [
        {key.partition(".")[2]: value for key, value in way.options.items() if key.startswith("names.")}
        for way in made.compare.parsed()
    ]
    found = [replace(made.names, **section) for section in sections]
    assert [names.method for names in found] == ["devise", "hinge", "conse", "attributes"]
    assert [names.given for names in found] == ["names.vectors is 'glove-50d'"] * 3 + [
        "names.attributes is 'trec-fine'"
    ]
