"""Labels as vectors of their names, or by attributes, in `glomo finetune`: against the formulas in numpy, on colours
and things."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from glomo.cli.main import main
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig
from glomo.training import checkpoint
from glomo.training.close import Close
from glomo.training.distil import Distil
from glomo.training.distributed import World
from glomo.training.documents import FinetuneData
from glomo.training.finetune import finetune, prepare
from glomo.training.finetune_config import ClassifierConfig, FinetuneConfig
from glomo.training.names import Names
from glomo.training.train_config import TrainConfig
from glomo.training.trained_classifier import load_classifier
from glomo.training.tune import Tune
from glomo.training.unlabelled import Unlabelled

COLOURS = {"red": ("rose", "blood"), "blue": ("sky", "sea"), "green": ("grass", "leaf")}
THINGS = {"ball": ("rolls", "bounces"), "car": ("drives", "brakes"), "bird": ("sings", "flies")}
CLASSES = sorted(f"{colour} {thing}" for colour in COLOURS for thing in THINGS)
WORDS = {word: np.eye(6)[n] + 0.1 * np.eye(6)[n - 1] for n, word in enumerate([*COLOURS, *THINGS])}
ATTRIBUTES = [*COLOURS, *THINGS, "coloured"]  # all classes of the data have the last one
UNSEEN = ("blue car", "red bird")
SEEN = [name for name in CLASSES if name not in UNSEEN]
TRAIN = TrainConfig(
    steps=6, batch_size=16, lr=1e-2, eval_every=3, checkpoint_every=3, progress=0, device="cpu", threads=1
)
LSTM = AWDLSTMConfig.preset("tiny", dim=16, hidden=16).scaled(0)
FREE = replace(LSTM, activation_reg=0.0, temporal_reg=0.0)
TRAINING, TESTING = (185, 0), (50, 1)  # how many, and the seed; some classes have one more than others
METHODS = ["devise", "hinge", "conse", "attributes"]


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


def texts(count, seed):
    """Texts that say neither word of their label, but what goes with each."""
    generator = np.random.default_rng(seed)
    found = []
    for n in range(count):
        colour, thing = CLASSES[n % len(CLASSES)].split()
        hints = [generator.choice(COLOURS[colour]), generator.choice(THINGS[thing]), "it", "then", "there"]
        found.append((" ".join(generator.permutation(hints)), f"{colour} {thing}"))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count, seed in (("train", *TRAINING), ("test", *TESTING)):
        lines = [f"{text},{label}" for text, label in texts(count, seed)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    rows = [" ".join([word, *map(str, row)]) for word, row in WORDS.items()]
    (folder / "vectors.txt").write_text("\n".join(rows) + "\n")
    rows = [",".join([name, *map(str, signature(name))]) for name in ["car", *reversed(CLASSES)]]
    (folder / "attributes.csv").write_text("\n".join([",".join(["class", *ATTRIBUTES]), *rows]) + "\n")
    return folder


def signature(name):
    return [int(attribute in name or (attribute == "coloured" and " " in name)) for attribute in ATTRIBUTES]


def config(data, train=TRAIN, task=None, lstm=LSTM, classifier=None, **names):
    tables = {"vectors": str(data / "vectors.txt")}
    if names.get("method") == "attributes":
        tables = {"attributes": str(data / "attributes.csv")}
    section = Names(**{**tables, "unseen": UNSEEN, **names})
    classifier = classifier or ClassifierConfig(drop_mult=0.0, hidden=12, dropout=0.0, dropout_last=0.0)
    task = task or FinetuneData(str(data / "train.csv"), str(data / "test.csv"))
    return FinetuneConfig(task, classifier, lstm=lstm, train=train, names=section)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """{method: (folder, results)}."""
    train = replace(TRAIN, steps=60, batch_size=32, lr=3e-2, eval_every=0, checkpoint_every=0)
    folders = {method: tmp_path_factory.mktemp("runs") / method for method in METHODS}
    return {
        method: (folder, finetune(config(data, train, lstm=FREE, method=method, top=2), folder))
        for method, folder in folders.items()
    }


def weights(path):
    return checkpoint.load(path / "final").weights


def unit(name):
    row = np.mean([WORDS[word] for word in name.split()], axis=0)
    return row / np.linalg.norm(row)


def said_by_the_head(model, vocabulary, examples):
    """What the last layer gives, read one by one."""
    model.eval()
    kept = []
    hook = model.head.register_forward_hook(lambda module, given, said: kept.append(said.detach().double().numpy()[0]))
    with torch.no_grad():
        for text, _ in examples:
            units = torch.tensor([vocabulary.encode(text)])
            model(units, torch.tensor([units.size(1)]))
    hook.remove()
    return np.array(kept)


def nearness(method, said, labels, weight=None, top=10):
    """Scores of labels, by the formulas of the papers."""
    if method == "attributes":
        p, prior = 1 / (1 + np.exp(-said)), np.mean([signature(name) for name in SEEN], axis=0)
        prior[-1] = 0.5  # all have it
        odds = [
            [p[:, m] / prior[m] if has else (1 - p[:, m]) / (1 - prior[m]) for m, has in enumerate(signature(name))]
            for name in labels
        ]
        return np.log(odds).sum(1).T
    table = np.array([unit(name) for name in labels])
    if method == "devise":
        return said @ table.T
    if method == "hinge":
        return said @ (table @ weight.T).T
    p = np.exp(said - said.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = []
    for row in p:
        best = sorted(range(len(SEEN)), key=lambda c: -row[c])[:top]
        mean = sum(row[c] * unit(SEEN[c]) for c in best) / sum(row[c] for c in best)
        rows.append([mean @ label / np.linalg.norm(mean) for label in table])
    return np.array(rows)


def mean_over_classes(chosen, right, classes):
    found = {c: [a == b for a, b in zip(chosen, right, strict=True) if b == c] for c in classes}
    return np.mean([np.mean(of) for of in found.values() if of])


@pytest.mark.parametrize("method", METHODS)
def test_the_figures_by_hand(trained, method):
    """Unseen examples of both files among the unseen names; all test and unseen ones among all names."""
    folder, results = trained[method]
    loaded = load_classifier(folder)
    (member,) = loaded.members
    weight = weights(folder)["labels.map.weight"].double().numpy() if method == "hinge" else None

    def scores(examples, labels):
        return nearness(method, said_by_the_head(member.model, member.vocabulary, examples), labels, weight, 2)

    def chosen(examples, labels):
        return [labels[n] for n in scores(examples, labels).argmax(1)]

    everything, test = [*texts(*TRAINING), *texts(*TESTING)], texts(*TESTING)
    unseen = [e for e in everything if e[1] in UNSEEN]
    examples = [*(e for e in test if e[1] in SEEN), *unseen]
    found, labels = results["zero_shot"], [label for _, label in examples]
    assert found["examples"] == len(unseen) == 52
    assert (found["classes"], found["chance"]) == (list(UNSEEN), 0.5)
    alone = mean_over_classes(chosen(unseen, UNSEEN), [label for _, label in unseen], UNSEEN)
    assert found["accuracy"] == pytest.approx(alone)
    among_all = chosen(examples, CLASSES)
    a, b = (mean_over_classes(among_all, labels, classes) for classes in (SEEN, UNSEEN))
    assert (found["seen"], found["unseen"]) == pytest.approx((a, b))
    assert found["harmonic"] == pytest.approx(2 * a * b / (a + b) if a + b else 0.0)
    assert json.loads((folder / "results.json").read_bytes())["zero_shot"] == found

    # and what is loaded says the same
    seen_test = [e for e in test if e[1] in SEEN]
    right = [a == b for a, (_, b) in zip(loaded.predict([t for t, _ in seen_test]), seen_test, strict=True)]
    assert np.mean(right) == pytest.approx(results["test_accuracy"])
    assert loaded.classes == SEEN
    assert loaded.predict([t for t, _ in unseen], names=UNSEEN) == chosen(unseen, UNSEEN)
    assert loaded.predict([], names=UNSEEN) == []
    few, others = [t for t, _ in examples[:3]], ["car", "blue ball", "red bird" if method == "attributes" else "Green"]
    expected = np.exp(scores(examples[:3], [name.lower() for name in others]))
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(loaded.probabilities(few, names=others).numpy(), expected, atol=1e-5)
    assert set(loaded.predict(few, names=others)) <= set(others)
    if method != "conse":
        torch.testing.assert_close(loaded.probabilities(few), loaded.probabilities(few, names=SEEN))


def loss_by_hand(method, said, weight, labels, margin):
    if method == "attributes":
        p = 1 / (1 + np.exp(-said))
        right = np.array([signature(SEEN[label]) for label in labels])
        return -np.mean(np.log(np.where(right, p, 1 - p)))
    own = [said[n] @ (weight @ unit(SEEN[label])) for n, label in enumerate(labels)]
    total = 0.0
    for n, label in enumerate(labels):
        if method == "devise":
            others = [said[n] @ unit(name) for c, name in enumerate(SEEN) if c != label]
            total += sum(max(0.0, margin - own[n] + other) for other in others)
        else:
            others = [said[n] @ (weight @ unit(SEEN[m])) for m in labels if m != label]
            total += max(0.0, margin - own[n] + max(others)) if others else 0.0
    return total / len(labels)


@pytest.mark.parametrize(
    ("method", "margin", "means"),
    [("devise", 0, 0.1), ("devise", 0.7, 0.7), ("hinge", 0, 1.0), ("attributes", 0, None)],
)
def test_the_loss_by_hand(data, method, margin, means):
    torch.manual_seed(0)
    task = FinetuneData(str(data / "train.csv"), str(data / "test.csv"), valid=0.0)  # all, in the file's order
    made = config(data, task=task, lstm=FREE, method=method, margin=margin)
    work = prepare(made, World(0, 1, torch.device("cpu")))
    kept = []
    work.model.head.register_forward_hook(lambda module, given, said: kept.append(said.detach().double().numpy()))
    work.model.train()
    indices = [0, 3, 9, 20, 21, 50]
    value, terms, _ = work.task.loss(indices, torch.Generator())
    trained = [label for _, label in texts(*TRAINING) if label in SEEN]
    labels = [SEEN.index(trained[n]) for n in indices]
    weight = work.model.labels.map.weight.detach().double().numpy() if method == "hinge" else np.eye(6)
    assert terms == 6
    assert value.item() == pytest.approx(loss_by_hand(method, kept[0], weight, labels, means), rel=1e-4)


def test_classes_without_examples_are_found(trained):
    """No text of a blue car or a red bird was read, but of other blue things and cars: that says enough."""
    _, results = trained["hinge"]
    assert results["zero_shot"]["accuracy"] > 0.8


@pytest.mark.parametrize("method", ["devise", "attributes"])
def test_nothing_of_an_unseen_class_is_learned_from(tmp_path, data, method):
    """Other texts in their place, in both files, give the same weights; the figures are of the seen classes."""
    for name in ("train", "test"):
        lines = (data / f"{name}.csv").read_text().splitlines()
        swapped = [f"never heard,{line.split(',')[1]}" if line.endswith(UNSEEN) else line for line in lines]
        (tmp_path / f"{name}.csv").write_text("\n".join(swapped) + "\n")
    other = FinetuneData(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"))
    one = finetune(config(data, method=method), tmp_path / "one")
    two = finetune(config(data, task=other, method=method), tmp_path / "two")
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert one["test_accuracy"] == two["test_accuracy"]
    assert one["valid_accuracy"] == two["valid_accuracy"]
    assert one["examples"] == 130  # nine tenths of 144
    row, key = (signature, "signatures") if method == "attributes" else (unit, "table")
    np.testing.assert_allclose(first[f"labels.{key}"].numpy(), [row(name) for name in SEEN], atol=1e-6)
    plain = finetune(config(data, method=method, unseen=()), tmp_path / "plain")
    assert plain["examples"] == 167
    assert "zero_shot" not in plain


def test_held_out_classes_are_drawn_by_the_seed(tmp_path, data):
    drawn = []
    for seed in (0, 1, 0):
        made = config(data, replace(TRAIN, steps=1, seed=seed), unseen=(), held_out=3)
        work = prepare(made, World(0, 1, torch.device("cpu")))
        drawn.append(work.named.unseen)
        assert work.task.meta["classes"] == [name for name in CLASSES if name not in drawn[-1]]
        assert {e[1] for e in work.named.withheld} == set(drawn[-1])
    assert drawn[0] == drawn[2] != drawn[1]
    assert len(drawn[0]) == 3


def test_a_class_of_the_test_file_alone(tmp_path, data):
    """A class may have no example at all to train on."""
    lines = (data / "train.csv").read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(line for line in lines if not line.endswith("red bird")) + "\n")
    task = FinetuneData(str(tmp_path / "few.csv"), str(data / "test.csv"))
    results = finetune(config(data, task=task, unseen=("red bird",)), tmp_path / "run")
    assert results["zero_shot"]["examples"] == 5
    with pytest.raises(UserError, match=r"the label 'red bird' is unknown"):
        finetune(config(data, task=task, unseen=("blue car",)), tmp_path / "other")


@pytest.mark.parametrize(
    ("key", "file", "change"),
    [
        ("vectors", "vectors.txt", ("red 1.0", "red 2.0")),
        ("attributes", "attributes.csv", ("red ball,1,0,0,1,0,0,1", "red ball,1,0,0,1,0,0,0")),
    ],
)
def test_a_run_goes_on_with_its_own_table(tmp_path, data, key, file, change):
    rows = (data / file).read_text()
    (tmp_path / file).write_text(rows)
    method = "attributes" if key == "attributes" else "devise"
    made = config(data, method=method, **{key: str(tmp_path / file)})
    finetune(made, tmp_path / "run")
    assert change[0] in rows
    (tmp_path / file).write_text(rows.replace(*change))
    with pytest.raises(UserError, match=r"was made with another names"):
        finetune(replace(made, train=replace(TRAIN, steps=7)), tmp_path / "run")
    if key == "attributes":  # nor are others' names compared by another table than that of the training
        sentence = (
            "the class 'red ball' has the attributes 1001000 in names.attributes, and had 1001001 when the classifier"
        )
        with pytest.raises(UserError, match=sentence):
            load_classifier(tmp_path / "run").predict(["sky"], names=["blue car", "car"])


def test_on_the_command_line(tmp_path, data, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'command = "finetune"\nabout = "x"\n[data]\ntrain = "{data / "train.csv"}"\ntest = "{data / "test.csv"}"\n'
        f'[names]\nvectors = "{data / "vectors.txt"}"\n[lstm]\npreset = "tiny"\n[train]\nsteps = 1\nprogress = 0\n'
        "threads = 1\n"
    )
    assert main(["finetune", str(recipe), "--names.unseen", "blue car, red bird", "--out", str(tmp_path / "run")]) == 0
    accuracy = json.loads((tmp_path / "run" / "results.json").read_bytes())["zero_shot"]["accuracy"]
    said = capsys.readouterr().out
    assert (
        f"zero-shot accuracy {100 * accuracy:.2f} % of 2 unseen classes (chance 50.00 %); the classifier is in" in said
    )


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            {"unseen": ("blue cat",)},
            r"names.unseen has 'blue cat', which is no class of the data; the nearest .* blue ca",
        ),
        ({"unseen": tuple(CLASSES[1:])}, "names.unseen names 8 of 9 classes, which leaves 1 to train on; at least 2"),
        ({"unseen": (), "held_out": 8}, "names.held_out draws 8 of 9 classes, which leaves 1 to train on; at least 2"),
        ({"unseen": (), "held_out": 12}, "names.held_out draws 12 of 9 classes, which leaves 0"),
        ({"vectors": "nowhere.txt"}, "names.vectors is 'nowhere.txt': nowhere.txt cannot be read"),
        (
            {"vectors": "glove-49d"},
            "names.vectors is 'glove-49d': there is no data set 'glove-49d', perhaps 'glove-50d'",
        ),
        ({"vectors": "trec"}, "the data set 'trec' holds labelled, where vectors are needed, such as glove-50d"),
        ({"held_out": 2}, "names.unseen has 2 classes, and names.held_out draws 2; give one of them"),
        ({"vectors": ""}, "names.vectors is empty; classes that are not trained on need vectors"),
        (
            {"attributes": "trec-fine"},
            r"'trec-fine', which .* 'devise' does not read; names.vectors \(now '.*vectors.txt",
        ),
        (
            {"method": "attributes", "vectors": "glove-50d"},
            r"names.vectors is 'glove-50d', which .* 'attributes' does not read; names.attributes \(now '.*csv",
        ),
        (
            {"method": "attributes", "attributes": "", "unseen": ()},
            r"names.method is 'attributes', and names.attributes is empty; a .csv file .* such as trec-fine",
        ),
        (
            {"method": "attributes", "attributes": "nowhere.csv"},
            "names.attributes is 'nowhere.csv': nowhere.csv does not exist",
        ),
        (
            {"method": "attributes", "attributes": "trec-fine"},
            "names.attributes is 'trec-fine': there is no row for the class 'blue ball'; ",
        ),
        ({"margin": -1}, "names.margin is -1"),
        ({"top": 0}, "names.top is 0"),
        ({"held_out": -1}, "names.held_out is -1"),
    ],
)
def test_mistakes(tmp_path, data, names, sentence):
    with pytest.raises(UserError, match=sentence):
        finetune(config(data, **names), tmp_path)


def test_sections_that_do_not_go_together(tmp_path, data):
    made = config(data)
    for change, sentence in (
        ({"distil": Distil(("x",))}, r"vectors.txt', which goes without distil.teachers; give one of them"),
        ({"unlabelled": Unlabelled("consistency", ("x.txt",))}, r"which goes without unlabelled.method"),
        ({"classifier": ClassifierConfig(smoothing=0.1)}, r"the loss of names.method = 'devise' has none; set it to 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            finetune(replace(made, **change), tmp_path)


def test_labels_without_a_vector(tmp_path, data):
    rows = (data / "vectors.txt").read_text().splitlines()
    (tmp_path / "few.txt").write_text("\n".join(row for row in rows if not row.startswith("bird")) + "\n")
    sentence = r"few.txt': the label 'blue bird' has no vector: looked up were .* without a vector are 'bird'"
    with pytest.raises(UserError, match=sentence):
        finetune(config(data, vectors=str(tmp_path / "few.txt")), tmp_path / "run")
    (tmp_path / "test.csv").write_text("text,label\nsky drives,blue car\n")
    only = FinetuneData(str(data / "train.csv"), str(tmp_path / "test.csv"))
    with pytest.raises(UserError, match=r"the test examples are all of the classes in names.unseen"):
        finetune(config(data, task=only), tmp_path / "run")
    finetune(replace(config(data), names=Names()), tmp_path / "plain")
    with pytest.raises(
        UserError, match=r"plain knows its classes only; names need a run with names.vectors or names.attr"
    ):
        load_classifier(tmp_path / "plain").predict(["sky"], names=["blue"])
    finetune(config(data), tmp_path / "named")
    with pytest.raises(UserError, match=r"the label 'yellow' has no vector"):
        load_classifier(tmp_path / "named").predict(["sky"], names=["blue", "yellow"])


@pytest.mark.parametrize("method", ["devise", "attributes"])
def test_a_head_of_names_is_no_old_head(tmp_path, data, method):
    """Learning without forgetting needs logits of an older head."""
    finetune(config(data, replace(TRAIN, steps=1), method=method), tmp_path / "named")
    plain = replace(config(data), names=Names(), tune=Tune(str(tmp_path / "named")), close=Close("lwf", 1.0))
    with pytest.raises(UserError, match=r"has labels of \[names\]; one without is needed"):
        finetune(plain, tmp_path / "out")
