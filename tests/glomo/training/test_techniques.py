"""Adapters, penalties and teachers in `glomo finetune` and `glomo lm train`: what they move, what is kept over a death,
and what is refused."""

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from torch import nn

from glomo.cli.finetune import _summary
from glomo.data import read_labelled, read_texts
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig
from glomo.nn.transformer_config import TransformerConfig
from glomo.training import checkpoint, loop, unlabelled
from glomo.training.adapted import Adapters
from glomo.training.close import Close, make_penalty
from glomo.training.config import dump_toml, read_toml
from glomo.training.distil import Distil
from glomo.training.documents import FinetuneData
from glomo.training.finetune import finetune, make_classifier
from glomo.training.finetune_config import ClassifierConfig, FinetuneConfig
from glomo.training.language import LanguageConfig, LanguageData, LanguageMethod, train_language_model
from glomo.training.language_model import language_model, load_language_model
from glomo.training.models import load_language_weights
from glomo.training.names import Names
from glomo.training.slices import Slices
from glomo.training.tasks import Tasks
from glomo.training.texts import running_units
from glomo.training.train_config import TrainConfig, make_optimizer
from glomo.training.trained_classifier import load_adapted, load_classifier
from glomo.training.tune import Tune
from glomo.training.unlabelled import Unlabelled
from glomo.transfer import layer_groups
from glomo.transfer.closeness import diagonal_fisher
from glomo.transfer.structure import add, lora, save_adapters
from glomo.transfer.structure.insertion import adapters

HERE = Path(__file__).parents[2] / "data"
HAMLET = str(HERE / "hamlet-act-1.txt")
TRAIN = TrainConfig(steps=8, batch_size=16, lr=1e-2, eval_every=4, checkpoint_every=3, progress=0, threads=1)
DATA = FinetuneData(str(HERE / "speeches-train.csv"), str(HERE / "speeches-test.csv"), length=20)
TRANSFORMER = TransformerConfig.preset("tiny", dim=16, ff=32, heads=2, max_length=48, norm="pre")
LSTM = AWDLSTMConfig.preset("tiny", dim=16, hidden=16)
TEXT = LanguageData((HAMLET,), vocabulary="words", vocab_size=400, length=24)
EWC = Close("ewc", strength=100.0, text=(HAMLET,), samples=5, length=9)


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    found = {}
    for kind in ("lstm", "transformer"):
        out = tmp_path_factory.mktemp("lm") / kind
        train = replace(TRAIN, steps=3, eval_every=0)
        train_language_model(LanguageConfig(TEXT, LanguageMethod(kind), TRANSFORMER, LSTM, train=train), out)
        found[kind] = str(out)
    return found


def config(init, train=TRAIN, **sections):
    classifier = ClassifierConfig(hidden=8, chunk=12, window=2)
    tune = sections.pop("tune", Tune(init))
    return FinetuneConfig(DATA, classifier, TRANSFORMER, replace(LSTM, dim=400, hidden=1150), tune, train, **sections)


def weights(path):
    return checkpoint.load(Path(path) / "final").weights


def filled(*arguments, **options):
    """The penalty as a run has it that begins."""
    penalty = make_penalty(*arguments, **options)
    penalty.fill()
    return penalty.term


def rows_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("tune", [{}, {"method": "gradual-unfreeze", "stage_steps": 1}], ids=["full", "gradual"])
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *product(["lstm", "transformer"], ["bottleneck", "parallel", "lora", "residual"]),
        ("transformer", "projected-attention"),
    ],
)
def test_adapters_learn_and_the_rest_stays(tmp_path, language_models, architecture, kind, tune):
    init = language_models[architecture]
    results = finetune(config(init, tune=Tune(init, **tune), adapter=Adapters(kind, size=4, r=2, heads=2)), tmp_path)
    before, after = load_language_weights(init).weights, weights(tmp_path)
    added = {name: value for name, value in after.items() if ".adapter." in name}
    # the layers of a projected attention share what goes into it and out of it
    shared = [name for name in added if re.search(r"layers\.1\.adapter\.(en|de)coder", name)]
    assert len(shared) == (4 if kind == "projected-attention" else 0)
    added = {name: value for name, value in added.items() if name not in shared}
    inner = {"bottleneck": ("attention.out", "outer"), "lora": ("attention.out", "attention.packed")}
    inner["parallel"] = inner["bottleneck"]
    ends = [f".{end}" for end in inner.get(kind, ())] if architecture == "transformer" else []
    stack = "decoder" if architecture == "transformer" else "encoder"
    places = {f"language_model.{stack}.layers.{n}{end}" for n in range(2) for end in ends or [""]}
    assert {name.split(".adapter")[0] for name in added} == places
    assert all(value.any() for value in added.values()) or kind not in ("residual", "lora")  # which begin with zeros
    for name, value in before.items():
        moves = "norm" in name and kind != "lora"
        assert torch.equal(after[f"language_model.{name}"], value) or moves, name
    norms = sum(v.numel() for n, v in before.items() if "norm" in n and kind != "lora")
    head = sum(v.numel() for n, v in after.items() if n.startswith("head") and "running" not in n and v.dim())
    assert results["trainable"] == sum(v.numel() for v in added.values()) + norms + head
    loaded = load_classifier(tmp_path)
    assert loaded.probabilities(["To be, or not to be"]).sum().item() == pytest.approx(1.0)
    figures = loaded.evaluate([("To be", loaded.classes[0])])
    assert figures["examples"] == 1


@pytest.mark.parametrize(
    "close", [Close("l2-sp", 1e3), Close("parameters", 1e3), replace(EWC, strength=1e5)], ids=lambda c: c.method
)
@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
def test_penalties_keep_the_weights_near(tmp_path, language_models, architecture, close):
    init = language_models[architecture]
    far, near = finetune(config(init), tmp_path / "far"), finetune(config(init, close=close), tmp_path / "near")
    before = load_language_weights(init)
    fisher = dict.fromkeys(before.weights, torch.ones(()))
    if close.method == "ewc":  # which lets go what the old text does not depend on
        model = language_model(before)
        penalty = filled(close, model, model, before.vocabulary, init, 0)
        fisher = {name: penalty.fisher.get_buffer(name) for name in penalty.names}

    def distance(path):
        after = weights(path)
        moved = {name: after[f"language_model.{name}"] - before.weights[name] for name in fisher}
        return sum((fisher[name] * moved[name].square()).sum().item() for name in fisher)

    assert distance(tmp_path / "near") < 0.7 * distance(tmp_path / "far")
    assert far["parameters"] == near["parameters"]  # a penalty's anchors are not the model's


def test_the_fisher_information_is_that_of_the_old_text(language_models):
    """Units that the old text does not have are free to move."""
    init = language_models["lstm"]
    model, vocabulary, _ = make_classifier(config(init), 2, [])
    penalty = filled(EWC, model, model.language_model, vocabulary, init, 0)
    fisher = penalty.fisher.get_buffer("encoder.embedding.weight")
    assert penalty().item() == 0.0
    assert (fisher >= 0).all()
    assert float(fisher.sum()) > 0
    with torch.no_grad():
        model.language_model.encoder.embedding.weight += 0.1
    assert penalty().item() == pytest.approx(50.0 * 0.01 * float(fisher.sum()), rel=1e-4)


def test_the_fisher_information_of_a_backward_model(tmp_path):
    """It is taken in the direction in which the model reads."""
    made = LanguageConfig(TEXT, LanguageMethod("lstm", backward=True), TRANSFORMER, LSTM, train=replace(TRAIN, steps=3))
    train_language_model(made, tmp_path / "back")
    found = load_language_weights(tmp_path / "back")
    model = language_model(found)
    units = running_units(read_texts(HAMLET), found.vocabulary, model.end)
    close = replace(EWC, samples=1, length=len(units) - 1)
    penalty = filled(close, model, model, found.vocabulary, str(tmp_path / "back"), 0, backward=True)
    units = units.flip(0).long()[None]
    expected = diagonal_fisher(
        model,
        [(units[:, :-1], units[:, 1:])],
        generator=torch.Generator().manual_seed(0),
        logits=lambda model, units: model.logits(model.encoder(units).raw),
        ignore_index=0,
    )
    name = "encoder.layers.0.weight_hh_l0"
    torch.testing.assert_close(penalty.fisher.get_buffer(name), expected[name])


def test_what_is_anchored_has_no_weight_decay(language_models):
    init = language_models["lstm"]
    model, vocabulary, _ = make_classifier(config(init), 2, [])
    penalty = filled(Close("parameters"), model, model.language_model, vocabulary, init, 0)
    groups = layer_groups(model, {"language": "language_model", "head": "head"})
    optimizer = make_optimizer(groups, replace(TRAIN, weight_decay=0.1), [penalty])
    decays = {group["name"]: set() for group in optimizer.param_groups}
    for group in optimizer.param_groups:
        decays[group["name"]].add(group["weight_decay"])
    assert decays == {"language": {0.0}, "head": {0.0, 0.1}}


@pytest.mark.parametrize("close", [Close("l2-sp", 0.0, 0.0), Close("parameters", 0.0), Close("ewc", 0.0)])
def test_a_penalty_of_strength_0_is_none(tmp_path, language_models, close):
    """To the bit, weight decay included."""
    train = replace(TRAIN, steps=2, weight_decay=0.5)
    for name, section in (("with", close), ("without", Close())):
        finetune(config(language_models["lstm"], train, close=section), tmp_path / name)
    before = weights(tmp_path / "without")
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "with").items())
    assert rows_of(tmp_path / "with") == rows_of(tmp_path / "without")


def test_beta_0_leaves_new_weights_their_decay(tmp_path, language_models):
    train = replace(TRAIN, steps=1, weight_decay=0.5)
    for name, section in (("held", Close("l2-sp", beta=0.0)), ("free", Close("l2-sp", beta=1e-12)), ("none", Close())):
        finetune(config(language_models["lstm"], train, close=section), tmp_path / name)
    held, free, none = (weights(tmp_path / name)["head.2.weight"] for name in ("held", "free", "none"))
    torch.testing.assert_close(held, none)
    assert not torch.allclose(free, none)


def test_the_penalty_stands_beside_the_loss(tmp_path, language_models):
    """At the first step it is that of the new weights, which alone are away from their anchors."""
    init = language_models["lstm"]
    for name, section in (("with", Close("l2-sp", beta=0.3)), ("without", Close())):
        finetune(config(init, replace(TRAIN, steps=3), close=section), tmp_path / name)
    with_it, without = rows_of(tmp_path / "with"), rows_of(tmp_path / "without")
    assert all("penalty" not in row for row in without)
    assert with_it[0]["loss"] - with_it[0]["penalty"] == pytest.approx(without[0]["loss"], rel=1e-5)
    torch.manual_seed(TRAIN.seed)
    from glomo.training.finetune import make_classifier

    model, _, _ = make_classifier(config(init), 2, [])
    new = sum(p.square().sum().item() for name, p in model.head.named_parameters() if p.dim() > 1)
    assert with_it[0]["penalty"] == pytest.approx(0.3 / 2 * new, rel=1e-5)
    made = LanguageConfig(replace(TEXT, vocabulary="init"), LanguageMethod("lstm"), lstm=LSTM, tune=Tune(init))
    made = replace(made, train=replace(TRAIN, steps=2), close=Close("parameters"))
    train_language_model(made, tmp_path / "lm")
    first, second = rows_of(tmp_path / "lm")
    assert first["penalty"] == 0.0 < second["penalty"] < second["loss"]


@pytest.mark.parametrize(
    "tune",
    [{"method": "top"}, {"method": "features"}, {"rates": (0.0,) * (1 + LSTM.layers) + (1.0,)}],
    ids=["top", "features", "rates"],
)
@pytest.mark.parametrize("close", [Close("parameters"), EWC, Close("l2-sp", beta=0.0)], ids=lambda close: close.method)
def test_what_is_held_must_learn(tmp_path, language_models, close, tune):
    init = language_models["lstm"]
    made = config(init, replace(TRAIN, steps=1), tune=Tune(init, **tune), close=close)
    with pytest.raises(UserError, match=rf"close.method is '{close.method}', but none of the \d+ .* groups do: head;"):
        finetune(made, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    if (
        close.method != "l2-sp" and tune.get("method") == "top"
    ):  # the decoder's bias learns by the language model's loss
        read = replace(made, classifier=replace(made.classifier, auxiliary=0.1))
        assert finetune(read, tmp_path / "auxiliary")["step"] == 1
        assert finetune(replace(made, tune=Tune(init, method="top", top=2)), tmp_path / "two")["step"] == 1


def test_what_is_held_must_learn_in_a_language_model(tmp_path, language_models):
    tune = Tune(language_models["lstm"], method="top")
    made = LanguageConfig(replace(TEXT, vocabulary="init"), LanguageMethod("lstm"), lstm=LSTM, tune=tune)
    made = replace(made, train=replace(TRAIN, steps=1), close=Close("l2-sp"))
    with pytest.raises(UserError, match=r"none of the \d+ parameters .* groups do: decoder;"):
        train_language_model(made, tmp_path / "refused")
    assert train_language_model(replace(made, close=Close("parameters")), tmp_path / "bias")["step"] == 1


class Death(Exception):
    pass


def dying_at(monkeypatch, step):
    seen = []

    def seed(*arguments):
        seen.append(arguments)
        if len(seen) == step:
            raise Death
        return before(*arguments)

    before = loop.seed_step
    monkeypatch.setattr(loop, "seed_step", seed)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, language_models):
    out = tmp_path_factory.mktemp("teacher") / "run"
    finetune(config(language_models["transformer"]), out)
    return str(out)


@pytest.fixture(scope="module")
def consolidated(tmp_path_factory, language_models):
    """A language model that was tuned with EWC."""
    out, train = tmp_path_factory.mktemp("ewc") / "run", replace(TRAIN, steps=3, eval_every=0)
    data, tune = replace(TEXT, vocabulary="init"), Tune(language_models["lstm"])
    made = LanguageConfig(data, LanguageMethod("lstm"), lstm=LSTM, tune=tune, train=train, close=EWC)
    train_language_model(made, out)
    return str(out)


@pytest.mark.parametrize(
    "technique",
    [
        "bottleneck",
        "lora",
        "residual",
        "projected-attention",
        "l2-sp",
        "ewc",
        "online-ewc",
        "outputs",
        "lwf",
        "average",
        "distil",
        "consistency",
        "mean-teacher",
        "domain",
        "tasks",
        "tasks-subwords",
        "slices",
        "devise",
        "hinge",
        "attributes",
    ],
)
def test_a_death_changes_nothing(tmp_path, monkeypatch, language_models, teacher, consolidated, technique):
    """The second call has neither the old text nor the teacher: what the first made of them counts."""
    old, teaching = tmp_path / "old.txt", tmp_path / "teacher"
    shutil.copy(HAMLET, old)
    shutil.copytree(teacher, teaching)
    init = {"projected-attention": language_models["transformer"], "online-ewc": consolidated, "lwf": teacher}
    init = init.get(technique, language_models["lstm"])
    other = tmp_path / "other.csv"
    other.write_text("text,label\n" + "the king,a\nthe queen,b\na ghost,c\n" * 11)
    vectors = tmp_path / "vectors.txt"
    vectors.write_text(
        "".join(f"{word} {n} {n * n} 1\n" for n, word in enumerate(["as", "you", "like", "it", "hamlet"]))
    )
    table = tmp_path / "attributes.csv"
    table.write_text("class,comedy,short\nHamlet,0,0\nAs You Like It,1,0\nMacbeth,0,1\n")
    sections = {
        "bottleneck": {"adapter": Adapters("bottleneck", size=3)},
        "lora": {"adapter": Adapters("lora", r=2)},
        "residual": {"adapter": Adapters("residual")},
        "projected-attention": {"adapter": Adapters("projected-attention", size=4, heads=2)},
        "l2-sp": {"close": Close("l2-sp")},
        "ewc": {"close": replace(EWC, text=(str(old),))},
        "online-ewc": {"close": replace(EWC, method="online-ewc", text=(str(old),))},
        "outputs": {"close": Close("outputs", 2.0)},
        "lwf": {"close": Close("lwf", 1.0)},
        "average": {"train": replace(TRAIN, average="ema", average_decay=0.7)},
        "distil": {"distil": Distil((str(teaching),), alpha=0.7)},
        "consistency": {"unlabelled": Unlabelled("consistency", (HAMLET,), temperature=0.8, tsa="log")},
        "mean-teacher": {"unlabelled": Unlabelled("mean-teacher", (HAMLET,), decay=0.5)},
        "domain": {"unlabelled": Unlabelled("domain", (HAMLET,), batch_size=5, hidden=4)},
        "tasks": {"tasks": Tasks(train=(str(other),), alpha=0.0)},
        "tasks-subwords": {"tasks": Tasks(train=(str(other),), alpha=0.0, vocabulary="subwords")},
        "slices": {"slices": Slices(("questions: \\?$", "mine: I"))},
        "devise": {"names": Names(str(vectors))},
        "hinge": {"names": Names(str(vectors), "hinge", margin=0.5)},
        "attributes": {"names": Names(method="attributes", attributes=str(table))},
    }[technique]
    made = config(init, **sections)
    finetune(made, tmp_path / "whole")
    with monkeypatch.context() as patch:
        dying_at(patch, 6)
        with pytest.raises(Death):
            finetune(made, tmp_path / "killed")
    old.unlink()
    shutil.rmtree(teaching)
    finetune(made, tmp_path / "killed")
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    assert all(torch.equal(v, weights(tmp_path / "whole")[n]) for n, v in weights(tmp_path / "killed").items())
    finetune(made, tmp_path / "whole")  # which is finished, and asks nothing more


def test_a_run_from_before_a_section_goes_on(tmp_path):
    made = replace(config("", replace(TRAIN, steps=3), tune=Tune()), lstm=LSTM)
    finetune(made, tmp_path)
    path = tmp_path / "config.toml"
    sections = read_toml(path)
    del sections["unlabelled"], sections["close"]["beta"]
    path.write_text(dump_toml(sections))
    with pytest.raises(UserError, match=r"unlabelled.method is 'none' there and 'domain' in this call"):
        finetune(replace(made, unlabelled=Unlabelled("domain", (HAMLET,))), tmp_path)
    assert finetune(replace(made, train=replace(made.train, steps=5)), tmp_path)["step"] == 5


def test_a_student_learns_from_the_teacher_alone(tmp_path, language_models, teacher):
    """With alpha 1 the labels do not count: the first loss is the divergence from what the teacher says."""
    made = config("", replace(TRAIN, steps=1), tune=Tune(), distil=Distil((teacher,), alpha=1.0, temperature=1.0))
    finetune(replace(made, lstm=LSTM), tmp_path / "student")
    plain = config("", replace(TRAIN, steps=1), tune=Tune())
    finetune(replace(plain, lstm=LSTM), tmp_path / "plain")
    student, alone = (rows_of(tmp_path / name)[0]["loss"] for name in ("student", "plain"))
    assert 0 < student < alone


def test_a_language_model_stays_close(tmp_path, language_models):
    """Sequential adaptation with EWC: the old text's perplexity rises less."""
    path = tmp_path / "new.txt"
    path.write_text("\n".join(["the king is dead and the queen is dead"] * 40))
    init = language_models["lstm"]
    before = load_language_weights(init).weights
    moved = {}
    for name, close in {"none": Close(), "ewc": replace(EWC, strength=1e4), "l2-sp": Close("l2-sp", 1e3)}.items():
        data = replace(TEXT, text=(str(path),), vocabulary="init")
        made = LanguageConfig(data, LanguageMethod("lstm"), lstm=LSTM, tune=Tune(init), train=TRAIN, close=close)
        train_language_model(made, tmp_path / name)
        moved[name] = sum(
            (v - before[n]).square().sum().item() for n, v in load_language_weights(tmp_path / name).weights.items()
        )
    assert max(moved["ewc"], moved["l2-sp"]) < 0.7 * moved["none"]


def test_a_language_model_goes_on_without_the_old_text(tmp_path, language_models):
    old, init = tmp_path / "old.txt", language_models["lstm"]
    shutil.copy(HAMLET, old)
    data, close = replace(TEXT, vocabulary="init"), replace(EWC, text=(str(old),))
    made = LanguageConfig(data, LanguageMethod("lstm"), lstm=LSTM, tune=Tune(init), train=TRAIN, close=close)
    train_language_model(replace(made, train=replace(TRAIN, steps=3)), tmp_path / "parts")
    train_language_model(made, tmp_path / "whole")
    old.unlink()
    train_language_model(made, tmp_path / "parts")
    assert all(torch.equal(v, weights(tmp_path / "whole")[n]) for n, v in weights(tmp_path / "parts").items())
    with pytest.raises(UserError, match=r"old\.txt"):
        train_language_model(made, tmp_path / "new")


@pytest.mark.parametrize("method", ["consistency", "mean-teacher", "domain"])
def test_unlabelled_texts_of_no_weight_change_nothing(tmp_path, language_models, method):
    """Not even BatchNorm's statistics, which are those of labelled texts."""
    section = Unlabelled(method, (HAMLET,), weight=0.0)
    train = replace(TRAIN, steps=3)
    for name, sections in (("with", {"unlabelled": section}), ("without", {})):
        made = config(language_models["lstm"], train, **sections)
        dry = replace(made.lstm.scaled(0), activation_reg=0.0, temporal_reg=0.0)
        head = replace(made.classifier, dropout=0.0, dropout_last=0.0, drop_mult=0.0)
        finetune(replace(made, lstm=dry, classifier=head), tmp_path / name)
    after = {n: v for n, v in weights(tmp_path / "with").items() if not n.startswith("adversary")}
    before = weights(tmp_path / "without")
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[n]) for n, v in after.items())


class Spy:
    """Calls through, and keeps what was given."""

    def __init__(self, function):
        self.function, self.given = function, []

    def __call__(self, *arguments, **options):
        self.given.append((arguments, options))
        return self.function(*arguments, **options)


def test_the_mean_teacher_follows_the_weights(tmp_path, monkeypatch, language_models):
    """Before step t its weights are the mean that decay and warm-up make of those after steps 0 to t - 1."""
    seen = []

    class Kept(unlabelled.ExponentialAverage):
        def update_parameters(self, model):
            seen.append(model.head[2].weight.detach().clone())
            super().update_parameters(model)
            seen[-1] = seen[-1], self.module.head[2].weight.detach().clone()

    monkeypatch.setattr(unlabelled, "ExponentialAverage", Kept)
    section = Unlabelled("mean-teacher", (HAMLET,), decay=0.6)
    finetune(config(language_models["lstm"], replace(TRAIN, steps=4), unlabelled=section), tmp_path)
    assert len(seen) == 3
    for count, ((_, before), (now, mean)) in enumerate(pairwise(seen), 2):
        decay = min(0.6, 1 - 1 / (count + 1))
        torch.testing.assert_close(mean, decay * before + (1 - decay) * now)


def test_masked_units_against_whole_ones(tmp_path, monkeypatch, language_models):
    spy = Spy(unlabelled.consistency_loss)
    monkeypatch.setattr(unlabelled, "consistency_loss", spy)
    section = Unlabelled("consistency", (HAMLET,), batch_size=7, mask=1.0, temperature=0.5, confidence=0.3)
    finetune(config(language_models["lstm"], replace(TRAIN, steps=2), unlabelled=section), tmp_path)
    (clean, said), options = spy.given[0]
    assert clean.shape == said.shape == (7, 2)
    assert not clean.requires_grad
    assert said.requires_grad
    assert options == {"temperature": 0.5, "confidence": 0.3}


def test_the_classifier_of_domains(tmp_path, language_models):
    """It learns with the rest, its weight is the schedule's, and what is loaded is without it."""
    section = Unlabelled("domain", (HAMLET,), hidden=4)
    results = finetune(config(language_models["lstm"], unlabelled=section), tmp_path / "with")
    plain = finetune(config(language_models["lstm"]), tmp_path / "without")
    after = weights(tmp_path / "with")
    assert after["adversary.reversal.step"] == TRAIN.steps - 1
    assert results["trainable"] == plain["trainable"] + 48 * 4 + 4 + 4 * 2 + 2
    loaded = load_classifier(tmp_path / "with")
    assert loaded.probabilities(["To be"]).shape == (1, 2)
    ours, others = rows_of(tmp_path / "with"), rows_of(tmp_path / "without")
    assert ours[0]["loss"] - others[0]["loss"] == pytest.approx(ours[0]["domain_loss"], rel=1e-4)  # nothing moved yet
    assert 0.3 < ours[0]["domain_loss"] < 1.2  # about ln 2
    assert all(0 <= row["domain_accuracy"] <= 1 for row in ours)
    assert "domain_loss" not in others[0]


def test_from_task_to_task(tmp_path, language_models, teacher):
    """Sequential adaptation: the second task begins with the language model that the first has left."""
    finetune(config(teacher, replace(TRAIN, steps=1, lr=0.0)), tmp_path / "second")
    before, after = checkpoint.load(Path(teacher) / "best").weights, weights(tmp_path / "second")
    assert all(torch.equal(after[n], v) for n, v in before.items() if n.startswith("language_model."))
    assert not torch.equal(after["head.2.weight"], before["head.2.weight"])
    found = load_language_model(teacher).perplexity(["To be, or not to be"])
    assert found["perplexity"] > 1
    finetune(config(language_models["lstm"], adapter=Adapters("lora")), tmp_path / "adapted")
    with pytest.raises(UserError, match=r"has adapters \(adapter.kind = 'lora'\)"):
        load_language_weights(tmp_path / "adapted")


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"close": Close("l2-sp"), "tune": Tune()}, "keeps a model near that of tune.init; that is empty"),
        ({"close": Close("lwf")}, "needs a classifier in tune.init: .*holds no document classifier"),
        ({"close": replace(EWC, method="online-ewc")}, "has none in .*checkpoints; begin with a run of ewc"),
        ({"close": Close("ewc")}, "needs the old texts: close.text or close.dataset"),
        ({"unlabelled": Unlabelled("domain")}, "needs texts: unlabelled.text or unlabelled.dataset"),
        (
            {"unlabelled": Unlabelled("domain", (HAMLET,), tsa="log"), "distil": Distil(("x",))},
            "unlabelled.tsa anneals the labels' loss",
        ),
        ({"adapter": Adapters("lora", where="nothing")}, "adapter.kind is 'lora': where is 'nothing', and no module"),
        (
            {"adapter": Adapters("parallel", where=r"encoder\.embedding")},
            "reads ids; a parallel adapter needs features",
        ),
        ({"adapter": Adapters("residual", where=r"encoder")}, "the width of 'encoder', a AWDLSTM, cannot be inferred"),
        ({"adapter": Adapters("projected-attention")}, "is an LSTM; choose bottleneck, parallel, lora or residual"),
    ],
)
def test_mistakes(tmp_path, language_models, sections, sentence):
    with pytest.raises(UserError, match=sentence):
        finetune(config(language_models["lstm"], **sections), tmp_path)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("lstm", "lora"), ("lstm", "residual"), ("transformer", "bottleneck"), ("transformer", "projected-attention")],
)
def test_the_file_of_adapters(tmp_path, language_models, architecture, kind):
    """It is small, and on the language model gives the classifier of the whole checkpoint, to the bit."""
    init = language_models[architecture]
    made = config(init, adapter=Adapters(kind, size=4, r=2, heads=2), unlabelled=Unlabelled("domain", (HAMLET,)))
    layers = "mix" if kind == "lora" else "last"
    results = finetune(replace(made, classifier=replace(made.classifier, layers=layers, chunk=7)), tmp_path / "run")
    file, whole = tmp_path / "run" / "adapters.safetensors", tmp_path / "run" / "final" / checkpoint.WEIGHTS
    assert file.stat().st_size < 0.2 * whole.stat().st_size
    assert f"(what has learned alone is {file}, {file.stat().st_size:,} bytes)" in _summary(results, tmp_path / "run")
    texts = [text for text, _ in read_labelled(DATA.test)] + ["", "To be " * 40]
    expected = load_classifier(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    found = load_adapted(init, file)
    assert torch.equal(found.probabilities(texts), expected.probabilities(texts))
    assert found.predict(texts) == expected.predict(texts)
    assert found.classes == expected.classes


def test_a_file_of_adapters_goes_with_its_language_model(tmp_path, language_models):
    init = language_models["lstm"]
    finetune(config(init, adapter=Adapters("lora", r=2)), tmp_path / "run")
    file, other = tmp_path / "run" / "adapters.safetensors", tmp_path / "other"
    train = replace(TRAIN, steps=4, eval_every=0)
    train_language_model(LanguageConfig(TEXT, LanguageMethod("lstm"), TRANSFORMER, LSTM, train=train), other)
    for run in (other, language_models["transformer"]):
        with pytest.raises(
            UserError, match=r"was trained on another language model than that of .*; give the run fold"
        ):
            load_adapted(run, file)
    finetune(config(init), tmp_path / "plain")
    assert not (tmp_path / "plain" / "adapters.safetensors").exists()
    model = nn.Sequential(nn.Linear(2, 2))
    add(model, "0", lora(1))
    save_adapters(model, tmp_path / "strange.safetensors")
    with pytest.raises(UserError, match="has adapters, but no classes"):
        load_adapted(init, tmp_path / "strange.safetensors")
    with pytest.raises(UserError, match=r"there is no file .*nothing"):
        load_adapted(init, tmp_path / "nothing")


def test_sizes_of_adapters(tmp_path, language_models):
    """As published where the recipe does not say, and a sentence for heads that do not fit."""
    init = language_models["transformer"]
    with pytest.raises(UserError, match="kind is 'projected-attention': size is 5; it must be a multiple of heads"):
        finetune(config(init, adapter=Adapters("projected-attention", size=5, heads=2)), tmp_path)
    for kind, name, width in (
        ("bottleneck", "down", 64),
        ("parallel", "up", 16),
        ("residual", None, 16),
        ("projected-attention", "encoder", 204),
    ):
        model, _, _ = make_classifier(config(init, adapter=Adapters(kind)), 2, [])
        added = adapters(model)[0].adapter
        assert (getattr(added, name) if name else added).weight.size(0) == width
        assert added.settings.get("into", "outer") == "outer"  # within the layer's last LayerNorm


def test_ewc_needs_the_old_vocabulary(tmp_path, language_models):
    data = replace(TEXT, vocab_size=50)
    made = LanguageConfig(data, LanguageMethod("lstm"), lstm=LSTM, tune=Tune(language_models["lstm"]), train=TRAIN)
    with pytest.raises(UserError, match=r"400 units\), and this one has 50; give --data.vocabulary init"):
        train_language_model(replace(made, close=EWC), tmp_path)


def test_a_transformer_reads_no_more_than_it_can(language_models):
    found = load_language_weights(language_models["transformer"])
    model = language_model(found)
    close = replace(EWC, length=1000)
    penalty = filled(close, model, model, found.vocabulary, language_models["transformer"], 0)
    assert penalty.fisher.get_buffer("embedding.weight").sum() > 0


def test_more_mistakes(tmp_path, language_models, teacher):
    init = language_models["lstm"]
    for made, sentence in (
        (lambda: Unlabelled(tsa="log"), "unlabelled.tsa is 'log', and unlabelled.method is 'none'"),
        (lambda: Adapters("lora", r=0), "adapter.r is 0"),
        (lambda: Close("l2-sp", strength=-1), "close.strength is -1"),
        (lambda: Distil(alpha=2), "distil.alpha is 2"),
        (lambda: Close("online-ewc", gamma=1.5), "close.gamma is 1.5"),
    ):
        with pytest.raises(UserError, match=sentence):
            made()
    both = config(init, close=Close("l2-sp"), adapter=Adapters("lora"))
    with pytest.raises(UserError, match=r"with adapter\.kind the weights of tune\.init stay as they are"):
        finetune(both, tmp_path / "d")
    sharded = config(init, replace(TRAIN, shard=True), close=Close("l2-sp"))
    with pytest.raises(UserError, match=r"train\.shard"):
        finetune(sharded, tmp_path / "a")
    smoothed = replace(config(init, distil=Distil((teacher,))), classifier=ClassifierConfig(smoothing=0.1))
    with pytest.raises(UserError, match=r"set classifier\.smoothing = 0"):
        finetune(smoothed, tmp_path / "b")
    other = tmp_path / "other.csv"
    other.write_text("text,label\n" + "\n".join(f"word {n},{n % 3}" for n in range(30)))
    strange = replace(config(init, distil=Distil((teacher,))), data=FinetuneData(str(other), str(other)))
    with pytest.raises(UserError, match=r"the classes 0, 1, 2, but distil\.teachers know"):
        finetune(strange, tmp_path / "c")


@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
def test_only_the_first_layers_are_taken_over(tmp_path, language_models, architecture):
    """Layer transfer: in a classifier and in a language model, at a rate of 0, so that what starts is what ends."""
    init, still = language_models[architecture], replace(TRAIN, steps=1, lr=0.0, eval_every=0)
    before = load_language_weights(init).weights
    language = LanguageConfig(replace(TEXT, vocabulary="init"), LanguageMethod(architecture), TRANSFORMER, LSTM)
    for layers in (0, 1):
        tune = Tune(init, layers=layers)
        finetune(config(init, still, tune=tune), tmp_path / f"classifier-{layers}")
        train_language_model(replace(language, tune=tune, train=still), tmp_path / f"model-{layers}")
        for after, prefix in ((f"classifier-{layers}", "language_model."), (f"model-{layers}", "")):
            found = weights(tmp_path / after)
            same = {
                n for n, v in before.items() if torch.equal(found[prefix + n], v) and "norm" not in n and v.std() > 0
            }
            numbers = {int(n.split("layers.")[1].split(".")[0]) for n in same if "layers." in n}
            assert numbers == set(range(layers))
            assert any("embedding" in n for n in same)
    many = Tune(init, layers=9)
    with pytest.raises(UserError, match=r"tune.layers is 9; the language model of tune.init has 2 layers"):
        finetune(config(init, still, tune=many), tmp_path / "many")
    with pytest.raises(UserError, match=r"tune.layers is 1, and with adapter.kind = 'lora' the layers above"):
        finetune(config(init, still, tune=Tune(init, layers=1), adapter=Adapters("lora")), tmp_path / "drawn")


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"tune": Tune("lm", layers=1), "close": Close("l2-sp")}, "'l2-sp' would hold the layers above at the random"),
        ({"tasks": Tasks(train=("x.csv",)), "close": Close("lwf", 1.0)}, "nothing is recorded on the texts of tasks"),
        (
            {"tune": Tune("lm", "chain-thaw"), "unlabelled": Unlabelled("mean-teacher", (HAMLET,))},
            "'chain-thaw' goes back to the best weights",
        ),
        (
            {"tune": Tune("lm", "features"), "close": Close("outputs")},
            "none of the [0-9]+ parameters that it keeps near",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path, language_models, sections, sentence):
    init = language_models["lstm"]
    if "tune" in sections:
        sections = {**sections, "tune": replace(sections["tune"], init=init)}
    with pytest.raises(UserError, match=sentence):
        finetune(config(init, **sections), tmp_path / "out")


def test_layers_of_nothing():
    with pytest.raises(UserError, match=r"tune.layers is 0, and tune.init, whose layers are meant, is empty"):
        Tune(layers=0)


@pytest.mark.parametrize("kind", ["lstm", "transformer", "old head", "language model"])
def test_what_keeps_outputs_stands_beside_the_loss(tmp_path, language_models, teacher, kind):
    init = teacher if kind == "old head" else language_models["lstm" if kind == "language model" else kind]
    for name, method in (("with", "lwf" if kind == "old head" else "outputs"), ("without", "none")):
        close, train = Close(method, 300.0), replace(TRAIN, steps=2)
        if kind == "language model":
            made = LanguageConfig(replace(TEXT, vocabulary="init"), LanguageMethod("lstm"), lstm=LSTM, tune=Tune(init))
            train_language_model(replace(made, close=close, train=train), tmp_path / name)
        else:
            finetune(config(init, train, close=close), tmp_path / name)
    held, free = (rows_of(tmp_path / name) for name in ("with", "without"))
    assert held[0]["loss"] - held[0]["penalty"] == pytest.approx(free[0]["loss"], rel=1e-4)
    assert 1e-3 < held[1]["penalty"] < held[1]["loss"]


@pytest.mark.parametrize("method", ["outputs", "lwf"])
def test_closeness_of_strength_0_is_none_of_outputs(tmp_path, language_models, teacher, method):
    finetune(config(teacher, close=Close(method, 0.0)), tmp_path / "with")
    finetune(config(teacher), tmp_path / "without")
    before = weights(tmp_path / "without")
    after = weights(tmp_path / "with")
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
