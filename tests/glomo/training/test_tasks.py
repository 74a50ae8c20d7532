"""[tasks] of `glomo finetune`: which task a step is for, what it moves, its loss, and what is refused."""

import copy
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from glomo.cli.main import main
from glomo.data import Subwords, Vocabulary, vocabulary_from_dict
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig
from glomo.nn.transformer_config import TransformerConfig
from glomo.training import checkpoint
from glomo.training.adapted import Adapters
from glomo.training.close import Close
from glomo.training.distil import Distil
from glomo.training.distributed import World
from glomo.training.documents import FinetuneData, evaluate
from glomo.training.finetune import finetune, prepare
from glomo.training.finetune_config import ClassifierConfig, FinetuneConfig
from glomo.training.models import load_language_weights
from glomo.training.tasks import TaskBatches, TaskClassifier, Tasks
from glomo.training.train_config import TrainConfig
from glomo.training.trained_classifier import load_classifier
from glomo.training.tune import Tune
from glomo.training.unlabelled import Unlabelled, UnlabelledTexts

HERE = Path(__file__).parents[2] / "data"
DATA = FinetuneData(str(HERE / "speeches-train.csv"), str(HERE / "speeches-test.csv"), length=20)
TRAIN = TrainConfig(steps=8, batch_size=16, lr=1e-2, eval_every=4, checkpoint_every=3, progress=0, threads=1)
LSTM = replace(AWDLSTMConfig.preset("tiny", dim=16, hidden=16).scaled(0), activation_reg=0.0, temporal_reg=0.0)
HEAD = ClassifierConfig(hidden=8, chunk=12, window=2, drop_mult=0.0, dropout=0.0, dropout_last=0.0)
ALONE = World(0, 1, torch.device("cpu"))
ANIMALS = [
    (text + " now" * (number % 7), label)  # so that no row is as another one nearby
    for number in range(9)
    for text, label in (("the horse eats grass", "horse"), ("a dog barks", "dog"), ("cats , and cats again", "cat"))
]
WEATHER = [("rain falls", "wet"), ("the sun is out today", "dry")] * 20


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture
def files(tmp_path):
    found = []
    for name, examples in (("animals", ANIMALS), ("weather", WEATHER)):
        path = tmp_path / f"{name}.csv"
        path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in examples))
        found.append(str(path))
    return tuple(found)


def config(tasks, train=TRAIN, classifier=HEAD, **sections):
    return FinetuneConfig(DATA, classifier, lstm=LSTM, train=train, tasks=tasks, **sections)


def steps_of(out):
    """The weights after every step."""
    return [checkpoint.load(folder).weights for folder in checkpoint.step_folders(out / "checkpoints")]


def moved(before, after):
    """Which heads a step has moved."""
    names = {name for name in after if not torch.equal(after[name], before[name])}
    assert any(name.startswith("language_model.") for name in names)
    return {name.split(".")[1] if name.startswith("others.") else "own" for name in names if "language" not in name}


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_which_documents_a_step_reads(alpha):
    """Each task's in batches of its own, none of them left out, and as many steps as its share says."""
    lengths = {"a": [3] * 50, "b": [5] * 200, "c": [4] * 11}
    batches = TaskBatches(lengths, 8, 3, Tasks(alpha=alpha), 100)
    assert len(batches) == 7 + 25 + 2
    bounds = {"a": range(50), "b": range(50, 250), "c": range(250, 261)}
    powers = np.array([50.0, 200.0, 11.0]) ** alpha
    shares = dict(zip("abc", powers / powers.sum(), strict=True))
    seen = {task: [] for task in bounds}
    for step in range(5 * len(batches)):
        batch = batches.batch(step)
        (task,) = (task for task, bound in bounds.items() if set(batch) <= set(bound))
        assert batches.place(batch[0]) == (task, bounds[task].start)
        seen[task].append(batch)
    for task, of in seen.items():
        assert len(of) == pytest.approx(5 * 34 * shares[task], abs=5)
        passes = len(of) // -(-len(lengths[task]) // 8)
        read = sorted(number for batch in of[: passes * -(-len(lengths[task]) // 8)] for number in batch)
        assert read == sorted([*bounds[task]] * passes)
    anew = TaskBatches(lengths, 8, 3, Tasks(alpha=alpha), 100)
    assert [anew.batch(step) for step in (61, 5, 140)] == [batches.batch(step) for step in (61, 5, 140)]


def test_shares_that_are_annealed():
    """N^1 in the first epoch of all tasks and N^0.2 in the last, whatever alpha is."""
    lengths = {"a": [3] * 1000, "b": [5] * 10}
    batches = TaskBatches(lengths, 5, 0, Tasks(alpha=0.0, anneal=True), 3 * 202)
    for epoch, alpha in enumerate((1.0, 0.6, 0.2, 0.2)):
        count = sum(batches.batch(202 * epoch + n)[0] >= 1000 for n in range(202))
        assert count == pytest.approx(202 * 10**alpha / (1000**alpha + 10**alpha), abs=1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_is_of_one_task(tmp_path, files, optimizer):
    """It moves the language model and its own head; the others stay as they are, whatever the momentum and decay."""
    train = replace(
        TRAIN, steps=12, checkpoint_every=1, keep=99, optimizer=optimizer, momentum=0.9 * (optimizer == "sgd")
    )
    made = config(Tasks(train=files, alpha=0.0), replace(train, weight_decay=0.1))
    results = finetune(made, tmp_path / "out")
    plan = prepare(made, ALONE).task.batches
    bounds = [("own", results["examples"]), ("animals", results["examples"] + 27), ("weather", 999)]
    expected = [next(name for name, end in bounds if plan.batch(step)[0] < end) for step in range(12)]
    assert set(expected) == {"own", "animals", "weather"}
    states = steps_of(tmp_path / "out")
    assert [moved(*pair) for pair in pairwise(states)] == [{name} for name in expected[1:]]
    assert results["tasks"] == {}  # files of one's own have no test
    heads = [v for n, v in states[-1].items() if n.startswith("others.") and "running" not in n and v.dim()]
    assert results["trainable"] == results["parameters"] + sum(v.numel() for v in heads)


def test_the_loss_by_its_formula(files):
    """weight CE(head_task(the language model's pooled states)), document by document."""
    made = config(Tasks(train=files, weight=0.25), classifier=replace(HEAD, smoothing=0.1))
    work = prepare(made, ALONE)
    model = work.model.train()
    rows = [2, 9, 13, 22]
    documents = [ANIMALS[row] for row in rows]
    value, terms, units = work.task.loss([work.examples + row for row in rows], torch.Generator())
    vocabulary = vocabulary_from_dict(work.task.meta["vocabulary"])
    pooled = []
    for text, _ in documents:
        states = model.language_model.encoder(torch.tensor([vocabulary.encode(text)])).raw[0]
        pooled.append(torch.cat([states[-1], states.amax(0), states.mean(0)]))
    x = torch.stack(pooled)
    head = model.others["animals"]
    for norm, linear in ((head[0], head[2]), (head[4], head[6])):
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
        x = x @ linear.weight.T + linear.bias
        x = x.relu() if linear is head[2] else x
    classes = ["cat", "dog", "horse"]
    logs = x.log_softmax(-1)
    right = torch.stack([row[classes.index(label)] for row, (_, label) in zip(logs, documents, strict=True)])
    expected = 0.25 * (-0.9 * right - 0.1 * logs.mean(-1)).mean()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    assert (terms, units) == (4, sum(len(text.split()) for text, _ in documents))
    value.backward()
    assert all(p.grad is None for p in [*model.head.parameters(), *model.others["weather"].parameters()])


def test_no_other_task_is_no_change(tmp_path, files):
    """The steps of [data]'s own task are as without the section, as long as no other task had one."""
    train = replace(TRAIN, lr=0.0)
    finetune(config(Tasks(), train), tmp_path / "alone")
    finetune(
        replace(config(Tasks(train=files, weight=0.0), train), tune=Tune(str(tmp_path / "alone"))), tmp_path / "with"
    )
    finetune(replace(config(Tasks(), train), tune=Tune(str(tmp_path / "alone"))), tmp_path / "without")
    alone, along = rows_of(tmp_path / "without"), rows_of(tmp_path / "with")
    own = [row["loss"] for row in along if row["loss"]]
    assert 0 < len(own) < len(along)  # the others' have no weight
    assert own == [row["loss"] for row in alone][: len(own)]


def test_one_vocabulary(tmp_path, files):
    finetune(config(Tasks(train=files)), tmp_path / "new")
    made = load_language_weights(tmp_path / "new").vocabulary
    assert {"horse", "rain"} <= set(made.units())
    finetune(config(Tasks()), tmp_path / "init")
    given = replace(config(Tasks(train=files)), tune=Tune(str(tmp_path / "init")))
    finetune(given, tmp_path / "tuned")
    after = load_language_weights(tmp_path / "tuned").vocabulary
    assert after.fingerprint == load_language_weights(tmp_path / "init").vocabulary.fingerprint != made.fingerprint
    loaded = load_classifier(tmp_path / "tuned")
    assert loaded.classes == ["As You Like It", "Hamlet"]
    assert loaded.probabilities(["rain"]).sum().item() == pytest.approx(1.0)


def test_figures_of_the_catalogues_tasks(tmp_path, files, monkeypatch):
    """Accuracy and nats on the test split, from the weights that are kept; best/ goes by the task of [data]."""
    test = [("a dog and a dog", "dog"), ("rain on the cats", "cat"), ("grass", "horse"), ("the sun", "cat")]
    splits = {"train": ANIMALS, "test": test}
    monkeypatch.setattr("glomo.data.catalogue.load_labelled", lambda name, split: splits[split])
    results = finetune(config(Tasks(("zoo",), files[1:], weight=3.0), replace(TRAIN, steps=30)), tmp_path / "out")
    assert results["tasks"].keys() == {"zoo"}
    loaded = load_classifier(tmp_path / "out").members[0]
    kept = checkpoint.load(tmp_path / "out" / "final").weights
    head = loaded.model.head  # of as many classes as zoo's, with zoo's weights
    head[6] = torch.nn.Linear(8, 3)
    head.load_state_dict({n.removeprefix("others.zoo."): t for n, t in kept.items() if n.startswith("others.zoo.")})
    found = loaded.probabilities([text for text, _ in test])
    places = [["cat", "dog", "horse"].index(label) for _, label in test]
    assert results["tasks"]["zoo"]["test_accuracy"] == (found.argmax(-1) == torch.tensor(places)).float().mean()
    nats = -np.mean([np.log(row[place]) for row, place in zip(found.tolist(), places, strict=True)])
    assert results["tasks"]["zoo"]["test_loss"] == pytest.approx(nats, rel=1e-5)
    assert results["valid_loss"] == pytest.approx(rows_of(tmp_path / "out")[-1]["valid_loss"])


def test_other_tasks_use_no_teacher_and_no_unlabelled_text(tmp_path, files, monkeypatch):
    finetune(config(Tasks()), tmp_path / "teacher")
    asked = []
    original = UnlabelledTexts.loss

    def loss(stream, *arguments):
        asked.append(stream.step)
        return original(stream, *arguments)

    monkeypatch.setattr(UnlabelledTexts, "loss", loss)
    section = Unlabelled("mean-teacher", (str(HERE / "hamlet-act-1.txt"),))
    made = config(Tasks(train=files), distil=Distil((str(tmp_path / "teacher"),)), unlabelled=section)
    work = prepare(made, ALONE)
    own = [step + 1 for step in range(8) if work.task.batches.batch(step)[0] < work.examples]
    finetune(made, tmp_path / "out")
    assert asked == own
    assert 0 < len(own) < 8


OWN_UNITS = "words", "subwords"


@pytest.mark.parametrize("units", OWN_UNITS)
def test_units_of_a_tasks_own(tmp_path, files, units):
    """The classifier's vocabulary knows nothing of the other tasks' texts; a step of one of them moves its embedding,
    its head and the layers, and no other embedding."""
    train = replace(TRAIN, steps=12, checkpoint_every=1, keep=99, weight_decay=0.1)
    made = config(Tasks(train=files, alpha=0.0, vocabulary=units), train)
    results = finetune(made, tmp_path / "out")
    assert not {"dog", "cats"} & set(load_language_weights(tmp_path / "out").vocabulary.units())
    plan = prepare(made, ALONE).task.batches
    tasks = [plan.place(plan.batch(step)[0])[0] or "own" for step in range(12)]
    states = steps_of(tmp_path / "out")
    tables = {"own": "language_model.encoder.embedding.weight"}
    tables |= {name: f"embeddings.{name}.weight" for name in ("animals", "weather")}
    for task, (before, after) in zip(tasks[1:], pairwise(states), strict=True):
        assert [name for name, key in tables.items() if not torch.equal(before[key], after[key])] == [task]
        layers = [name for name in after if name.startswith("language_model.encoder.layers.")]
        assert not any(torch.equal(before[name], after[name]) for name in layers)
        heads = {
            name.split(".")[1] for name in after if "others" in name and not torch.equal(before[name], after[name])
        }
        assert heads == {task} - {"own"}
    assert set(tasks) == {"own", "animals", "weather"}
    learn = [v for n, v in states[-1].items() if n.split(".")[0] in ("others", "embeddings")]
    learn = sum(v.numel() for v in learn if v.is_floating_point()) - 2 * 2 * (8 + 48)  # of BatchNorms' statistics
    assert results["trainable"] == results["parameters"] + learn
    assert load_classifier(tmp_path / "out").probabilities(["rain"]).shape == (1, 2)


@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
def test_the_loss_in_units_of_its_own(files, architecture):
    """That of a classifier whose language model has the task's embedding."""
    classifier = replace(HEAD, model=architecture)
    made = config(Tasks(train=files, vocabulary="words"), classifier=classifier)
    made = replace(made, model=TransformerConfig(dim=16, heads=2, layers=1, ff=16, dropout=0.0, max_length=64))
    work = prepare(made, ALONE)
    rows = [2, 9, 13, 22]
    value = work.task.loss([work.examples + row for row in rows], torch.Generator())[0]
    own, vocabulary = work.model.embeddings["animals"], Vocabulary.build([text for text, _ in ANIMALS], 99)
    assert own.weight.shape == (len({word for text, _ in ANIMALS for word in text.split()}) + 3, 16)
    other = copy.deepcopy(work.model)
    model = other.language_model.encoder if architecture == "lstm" else other.language_model
    model.embedding.weight = own.weight
    encoded = [torch.tensor([vocabulary.encode(ANIMALS[row][0])]) for row in rows]
    features = [other.pooled(units, torch.tensor([units.size(1)]))[0] for units in encoded]
    logits = other.others["animals"](torch.cat(features))
    labels = torch.tensor([["cat", "dog", "horse"].index(ANIMALS[row][1]) for row in rows])
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(logits, labels), rtol=1e-4, atol=1e-6)


def test_where_units_of_ones_own_start(tmp_path, files):
    """Units that the language model knows from their vectors, the others from the mean one; without one, drawn."""
    finetune(config(Tasks(train=files)), tmp_path / "init")
    text = Path(files[0])
    text.write_text(text.read_text().replace("horse", "zebra"))
    tasks = Tasks(train=files[:1], vocabulary="words")
    model = prepare(replace(config(tasks), tune=Tune(str(tmp_path / "init"))), ALONE).model
    found = load_language_weights(tmp_path / "init")
    weight = found.weights["encoder.embedding.weight"]
    rows, mean = dict(zip(found.vocabulary.units(), weight, strict=False)), weight[1:].mean(0)
    units = Vocabulary.build([text.replace("horse", "zebra") for text, _ in ANIMALS], 99).units()
    table = dict(zip(units, model.embeddings["animals"].weight, strict=False))
    torch.testing.assert_close(table["zebra"], mean)
    assert all(torch.equal(table[word], rows[word]) for word in ("dog", "cats", "grass"))
    drawn = prepare(config(tasks), ALONE).model.embeddings["animals"].weight
    assert not drawn[0].any()
    assert len(drawn[1:].unique(dim=0)) == len(drawn) - 1


def test_where_subwords_start(tmp_path, files):
    """A piece that begins a word from the vector of that word, one within words from the mean."""
    finetune(config(Tasks(train=files)), tmp_path / "init")
    tasks = Tasks(train=files[:1], vocabulary="subwords")
    made = replace(
        config(tasks, classifier=HEAD), data=replace(DATA, vocab_size=300), tune=Tune(str(tmp_path / "init"))
    )
    weight = prepare(made, ALONE).model.embeddings["animals"].weight
    found = load_language_weights(tmp_path / "init")
    words = dict(zip(found.vocabulary.units(), found.weights["encoder.embedding.weight"], strict=False))
    mean = found.weights["encoder.embedding.weight"][1:].mean(0)
    pieces = dict(zip(Subwords.train([text for text, _ in ANIMALS], 300).units(), weight, strict=False))
    for word in ("a", "now", "cats"):
        torch.testing.assert_close(pieces[f"Ġ{word}"], words[word])
    assert "a" in pieces
    torch.testing.assert_close(pieces["a"], mean)  # as in "barks"


def test_figures_in_units_of_ones_own(tmp_path, files, monkeypatch):
    """A task whose texts the classifier cannot read is learned."""
    splits = {"train": ANIMALS, "test": ANIMALS[:6]}
    monkeypatch.setattr("glomo.data.catalogue.load_labelled", lambda name, split: splits[split])
    results = finetune(
        config(Tasks(("zoo",), alpha=0.0, vocabulary="words"), replace(TRAIN, steps=60)), tmp_path / "out"
    )
    assert results["tasks"]["zoo"]["test_accuracy"] == 1.0
    zoo = load_classifier(tmp_path / "out", task="zoo")
    assert zoo.classes == ["cat", "dog", "horse"]
    assert zoo.predict(["the horse eats grass now", "a dog barks"]) == ["horse", "dog"]
    figures = zoo.evaluate(ANIMALS[:6])
    assert figures["loss"] == pytest.approx(results["tasks"]["zoo"]["test_loss"], rel=1e-6)


def test_another_tasks_classifier_from_the_command_line(tmp_path, files, capsys):
    """With a head of its own width and an adapter on the shared language model."""
    finetune(config(Tasks()), tmp_path / "init")
    given = replace(config(Tasks(train=files), adapter=Adapters("lora", r=2)), tune=Tune(str(tmp_path / "init")))
    finetune(given, tmp_path / "out")
    work = prepare(given, ALONE)
    work.model.load_state_dict(checkpoint.load(tmp_path / "out" / "final").weights)
    expected = evaluate(TaskClassifier(work.model, "weather"), work.tasks.train["weather"], ALONE.device)
    assert main(["finetune", "eval", str(tmp_path / "out"), "--task", "weather", "--test", files[1]]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(said["loss"]) == pytest.approx(expected["loss"], rel=1e-5)
    assert int(said["examples"]) == 40
    with pytest.raises(
        UserError, match="no head of the task 'zoo' beside its own; there are heads of animals, weather"
    ):
        load_classifier(tmp_path / "out", task="zoo")
    with pytest.raises(UserError, match="there are heads of no other task"):
        load_classifier(tmp_path / "init", task="zoo")
    with pytest.raises(UserError, match="heads that an older version has kept without their classes; the run has to"):
        load_classifier(older(tmp_path / "out"), task="animals")


def older(run):
    """A checkpoint from before the classes of other tasks stood in it."""
    folder = run.with_name("older")
    shutil.copytree(run / "final", folder)
    meta = json.loads((folder / checkpoint.META).read_text())
    del meta["others"]
    (folder / checkpoint.META).write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"classifier": replace(HEAD, auxiliary=0.1)}, "classifier.auxiliary asks for"),
        ({"tune": Tune(method="sequential")}, "tune.method = 'sequential' asks for"),
        ({"close": Close("outputs", 1.0), "tune": Tune("nowhere")}, "close.method = 'outputs' asks for"),
        ({"tune": Tune(method="chain-thaw")}, "tune.method is 'chain-thaw', .* tasks.vocabulary = 'subwords'"),
        (
            {"adapter": Adapters("bottleneck", where=r"encoder\.embedding")},
            "adapter.where names the embedding, .*'subw",
        ),
    ],
)
def test_what_own_units_do_not_go_with(tmp_path, files, sections, sentence):
    made = config(Tasks(train=files, vocabulary="subwords"), classifier=sections.pop("classifier", HEAD))
    with pytest.raises(UserError, match=sentence):
        finetune(replace(made, **sections), tmp_path / "out")


@pytest.mark.parametrize(
    "tune",
    [
        *({"method": "gradual-unfreeze", "stage_steps": 1}, {"method": "chain-thaw"}, {"method": "top", "top": 2}),
        {"method": "sequential", "stage_steps": 2, "k": 3},
    ],
    ids=lambda tune: tune["method"],
)
def test_with_every_method(tmp_path, files, tune):
    assert finetune(replace(config(Tasks(train=files)), tune=Tune(**tune)), tmp_path / "out")["step"] == 8


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        (lambda f: Tasks(train=(f[0], f[0])), "two tasks are called 'animals'"),
        (lambda f: Tasks(train=(DATA.train,)), "two tasks are called 'speeches-train'"),
        (lambda f: Tasks(("trec", "trec")), "two tasks are called 'trec'"),
        (lambda f: Tasks(("trecs",)), "task 'trecs' of .tasks.: .*trec"),
        (lambda f: Tasks(train=("nowhere.csv",)), "task 'nowhere' of .tasks.: .*nowhere.csv"),
        (lambda f: Tasks(train=(written(f, "empty", ""),)), "task 'empty' of .tasks.: .* holds no example"),
        (lambda f: Tasks(train=(written(f, "one", "a,x\nb,x\n"),)), "task 'one' of .tasks.: .* one class only, 'x'"),
        (lambda f: Tasks(train=(written(f, "train", "a,x\nb,y\n"),)), "'train' cannot be a task's name"),
        (lambda f: Tasks(train=(written(f, "a.b", "a,x\nb,y\n"),)), "'a.b' cannot be a task's name"),
        (lambda f: Tasks(alpha=-1.0), "tasks.alpha is -1.0"),
        (lambda f: Tasks(weight=-1.0), "tasks.weight is -1.0"),
    ],
)
def test_mistakes(tmp_path, files, tasks, sentence):
    with pytest.raises(UserError, match=sentence):
        finetune(config(tasks(files)), tmp_path / "out")


def written(files, name, rows):
    path = Path(files[0]).with_name(f"{name}.csv")
    path.write_text("text,label\n" + rows)
    return str(path)


def test_heads_alone_share_nothing(tmp_path, files):
    made = config(Tasks(train=files))
    for method in ("top", "features"):
        with pytest.raises(UserError, match=f"tune.method is '{method}' with tune.top = 1: only heads learn"):
            finetune(replace(made, tune=Tune(method=method)), tmp_path / "out")


def test_another_file_is_another_run(tmp_path, files):
    finetune(config(Tasks(train=files)), tmp_path / "out")
    path = Path(files[1])  # the same words, other labels
    path.write_text(path.read_text().replace("wet", "damp"))
    with pytest.raises(UserError, match="was made with another tasks"):
        finetune(config(Tasks(train=files), replace(TRAIN, steps=9)), tmp_path / "out")


def test_old_predictions_are_kept_in_the_steps_of_other_tasks(tmp_path, files):
    """The weights have moved away from those of tune.init: a step of another task has the distance in its loss."""
    finetune(config(Tasks()), tmp_path / "first")
    init, found = str(tmp_path / "first"), {}
    for name, close in (("held", Close("outputs", 100.0)), ("free", Close())):
        torch.manual_seed(0)
        work = prepare(replace(config(Tasks(train=files), close=close), tune=Tune(init)), ALONE)
        work.model.eval()
        torch.manual_seed(1)
        for parameter in work.model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        indices = [work.examples, work.examples + 2]
        loss = work.task.loss(indices, torch.Generator())[0]
        units, lengths, _ = work.tasks.train["animals"].tensors([0, 2], ALONE.device)
        predictions = work.task.extras.predictions if close else None
        extra = work.model.pooled(units, lengths, 0.0, predictions)[1] if close else torch.zeros(())
        found[name] = (loss - extra).item()
        if close:
            assert extra > 0.1
    assert found["held"] == pytest.approx(found["free"], rel=1e-3)


def test_the_penalty_on_outputs_has_the_weight_of_the_task(tmp_path, files):
    finetune(config(Tasks()), tmp_path / "first")
    losses, penalties = {}, []
    for weight in (1.0, 0.25):
        for strength in (0.0, 50.0):
            made = replace(config(Tasks(train=files, weight=weight)), tune=Tune(str(tmp_path / "first")))
            torch.manual_seed(0)
            work = prepare(replace(made, close=Close("outputs", strength) if strength else Close()), ALONE)
            work.model.eval()
            torch.manual_seed(1)
            for parameter in work.model.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
            losses[strength] = work.task.loss([work.examples, work.examples + 2], torch.Generator())[0].item()
        penalties.append(work.task.noted["penalty"])
        assert losses[50.0] - losses[0.0] == pytest.approx(penalties[-1], rel=1e-3)
    assert penalties[0] == pytest.approx(4 * penalties[1], rel=1e-3)
