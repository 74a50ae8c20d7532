"""What [close] keeps near: an older task's predictions, its head, and what several old texts depend on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glomo.data import read_labelled
from glomo.errors import UserError
from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.nn.transformer import LanguageModel
from glomo.nn.transformer_config import TransformerConfig
from glomo.training import checkpoint
from glomo.training.close import Close, make_penalty
from glomo.training.distributed import World
from glomo.training.document_classifier import DocumentClassifier
from glomo.training.documents import Documents, FinetuneData
from glomo.training.finetune import finetune
from glomo.training.finetune_config import ClassifierConfig, FinetuneConfig
from glomo.training.language import LanguageConfig, LanguageData, LanguageMethod, _of_streams, train_language_model
from glomo.training.language_model import language_model
from glomo.training.models import load_language_weights
from glomo.training.old_head import OldHead
from glomo.training.old_predictions import OldPredictions
from glomo.training.train_config import TrainConfig
from glomo.training.trained_classifier import load_classifier, load_one
from glomo.training.tune import Tune

HERE = Path(__file__).parents[2] / "data"
HAMLET = str(HERE / "hamlet-act-1.txt")
TRAIN = TrainConfig(steps=6, batch_size=16, lr=1e-2, eval_every=0, checkpoint_every=0, progress=0, threads=1)
DATA = FinetuneData(str(HERE / "speeches-train.csv"), str(HERE / "speeches-test.csv"), length=20, valid=0.0)
TRANSFORMER = TransformerConfig.preset("tiny", dim=16, ff=32, heads=2, max_length=48, dropout=0.0)
LSTM = AWDLSTMConfig.preset("tiny", dim=16, hidden=16).scaled(0)
TEXT = LanguageData((HAMLET,), vocabulary="words", vocab_size=300, length=24)
HEAD = ClassifierConfig(hidden=8, chunk=7, window=2, drop_mult=0.0)
EWC = Close("ewc", strength=100.0, text=(HAMLET,), samples=5, length=9)


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Language models, and a classifier on the first."""
    found = {}
    for kind in ("lstm", "transformer"):
        found[kind] = str(tmp_path_factory.mktemp("runs") / kind)
        train_language_model(tuned("", Close(), method=LanguageMethod(kind)), Path(found[kind]))
    found["classifier"] = str(Path(found["lstm"]).parent / "classifier")
    finetune(config(found["lstm"], Close()), Path(found["classifier"]))
    return found


def tuned(init, close, text=HAMLET, **sections):
    """A recipe of `glomo lm`."""
    method = sections.pop("method", LanguageMethod("lstm"))
    data = replace(TEXT, text=(str(text),), vocabulary="init" if init else "words")
    train = sections.pop("train", TRAIN)
    return LanguageConfig(data, method, TRANSFORMER, LSTM, tune=Tune(init), train=train, close=close)


def config(init, close, head=HEAD, train=TRAIN):
    given = replace(LSTM, dim=400, hidden=1150)
    return FinetuneConfig(DATA, head, TRANSFORMER, given, Tune(init), train, close=close)


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def divergence(before, after):
    """KL of two rows of logits, in fp64; padding, which has no probability, left out."""
    p, q = (x[1:].double().log_softmax(-1) for x in (before, after))
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("kind", [LSTMLanguageModel, LanguageModel])
def test_predictions_of_documents(kind):
    """Against documents read one at a time: the mean over the units that have gradients, and over documents."""
    torch.manual_seed(0)
    made = replace(LSTM if kind is LSTMLanguageModel else TRANSFORMER, vocab_size=30)
    model, chunk, window = DocumentClassifier(kind(made), 2, 8, chunk=4, window=2), 4, 2
    predictions = OldPredictions(model.language_model, strength=3.0)
    for parameter in model.language_model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    lengths = torch.tensor([3, 14, 4, 9])
    units = torch.randint(1, 30, (4, 14)).masked_fill(torch.arange(14) >= lengths[:, None], 0)
    _, extra = model.eval().pooled(units, lengths, 0.0, predictions)
    expected = 0.0
    for row, length in zip(units, lengths.tolist(), strict=True):
        chunks = [row[start : min(start + chunk, length)] for start in range(0, length, chunk)]
        said = []
        for one in (predictions.source.model, model.language_model):
            if kind is LSTMLanguageModel:
                said.append(one.logits(one.encoder(row[None, :length]).raw)[0])
            else:
                said.append(torch.cat([one.logits(one.hidden(part[None]))[0] for part in chunks]))
        learning = range(chunk * max(0, len(chunks) - window), length)
        expected += 3.0 / 4 * sum(divergence(said[0][t], said[1][t]) for t in learning) / len(learning)
    assert extra.item() == pytest.approx(expected.item(), rel=1e-4)
    extra.backward()
    assert all(p.grad is None for p in predictions.parameters())
    assert all(p.grad.any() for p in model.language_model.parameters() if p.dim() > 1)


def test_predictions_of_a_text():
    """Of the second window of streams, against both models that read the streams from their beginning."""
    torch.manual_seed(0)
    model = LSTMLanguageModel(replace(LSTM, vocab_size=30)).eval()
    predictions = OldPredictions(model, strength=3.0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    units, size = torch.randint(1, 30, (43,), dtype=torch.int32), replace(TRAIN, batch_size=3)
    made = tuned("", Close(), method=LanguageMethod("lstm", jitter=False), train=size)
    made, found = replace(made, data=replace(made.data, length=5)), {}
    for name, given in (("with", predictions), ("without", None)):
        task = _of_streams(model, units, made, World(0, 1, torch.device("cpu")), given)
        for step in (1, 2):
            task.before_step(step)
            found[name] = task.loss([0, 1, 2], None)[0].item()
    streams = units[:42].view(3, 14)[:, :10].long()
    before, after = (one.logits(one.encoder(streams).raw)[:, 5:] for one in (predictions.source.model, model))
    pairs = zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)
    expected = 3.0 * sum(divergence(*pair).item() for pair in pairs) / 15
    assert found["with"] - found["without"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
def test_a_model_that_does_not_move_predicts_what_it_did(tmp_path, runs, architecture):
    """In every window of the text: the old predictions' state is carried as the model's is."""
    still = replace(TRAIN, lr=0.0, checkpoint_every=2)
    for name, close in (("with", Close("outputs", 100.0)), ("without", Close())):
        made = tuned(runs[architecture], close, method=LanguageMethod(architecture), train=replace(still, steps=3))
        train_language_model(made, tmp_path / name)
        train_language_model(replace(made, train=still), tmp_path / name)  # also from a checkpoint
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
def test_predictions_stay_near(tmp_path, runs, architecture):
    """Of a language model on new text, and of one that becomes a classifier."""
    path, kind = tmp_path / "new.txt", LanguageMethod(architecture)
    path.write_text("\n".join(["the king is dead and the queen is dead"] * 40))
    units = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    moved = {}
    for name, close in (("near", Close("outputs", 100.0)), ("far", Close())):
        train_language_model(tuned(runs[architecture], close, path, method=kind), tmp_path / f"lm-{name}")
        finetune(config(runs[architecture], close), tmp_path / f"class-{name}")
        said = [language_model(load_language_weights(runs[architecture])).eval()]
        said += [language_model(load_language_weights(tmp_path / f"{w}-{name}")).eval() for w in ("lm", "class")]
        logits = [m.logits(m.encoder(units).raw if architecture == "lstm" else m.hidden(units)) for m in said]
        moved[name] = [
            sum(divergence(a, b).item() for a, b in zip(logits[0].flatten(0, 1), x.flatten(0, 1), strict=True))
            for x in logits[1:]
        ]
    assert moved["near"][0] < 0.5 * moved["far"][0]
    assert moved["near"][1] < 0.7 * moved["far"][1]


def test_the_old_head_is_asked_once(runs):
    """What it is held to is what the old classifier says; the loss is that of the paper at T = 2, times T^2."""
    old = load_one(runs["classifier"])
    texts = [text for text, _ in read_labelled(DATA.test)][:6]
    documents = Documents([old.vocabulary.encode(text)[:20] for text in texts], [0] * 6)
    model = DocumentClassifier(language_model(load_language_weights(runs["classifier"])), 3, 8, chunk=7, window=2)
    head = OldHead(model, documents, runs["classifier"], strength=0.5)
    head.fill()
    torch.testing.assert_close(head.lwf.recorded.softmax(-1), old.probabilities(texts))
    assert not list(head.parameters())
    assert list(head.state_dict()) == ["lwf.recorded"]
    model.eval()
    with torch.no_grad():
        model.old_head[6].weight += 0.3
    features = torch.randn(2, 48)
    said = (model.old_head(features).detach().double() / 2).log_softmax(-1)
    asked = (head.lwf.recorded[[4, 1]].double() / 2).softmax(-1)
    expected = 0.5 * 4 * -(asked * said).sum(-1).mean()
    assert head.loss(features, [4, 1]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_old_task_is_not_forgotten(tmp_path, runs):
    """While the opposite is learned. Its head learns along, and is loaded by its task's name."""
    examples = read_labelled(DATA.train)
    texts, (one, two) = [text for text, _ in examples], sorted({label for _, label in examples})
    other, opposite = {one: two, two: one}, tmp_path / "opposite.csv"
    opposite.write_text("text,label\n" + "".join(f'"{t.replace(chr(34), "")}",{other[n]}\n' for t, n in examples))
    longer, dry = replace(TRAIN, steps=25, lr=3e-2), replace(HEAD, dropout=0.0, dropout_last=0.0)
    finetune(config(runs["lstm"], Close(), dry, longer), tmp_path / "first")
    init = str(tmp_path / "first")
    before = load_one(init, ("best", "final"))
    said = before.probabilities(texts)
    far = {}
    for strength in (0.0, 30.0):
        out = tmp_path / str(strength)
        data = replace(DATA, train=str(opposite), test=str(opposite))
        results = finetune(replace(config(init, Close("lwf", strength), dry, longer), data=data), out)
        weights = checkpoint.load(out / "final").weights
        old = {name.removeprefix("old_"): value for name, value in weights.items() if name.startswith("old_head.")}
        if not strength:  # the head as it was, on what has become of the language model
            old = {f"head.{name}": value.clone() for name, value in before.model.head.state_dict().items()}
        plain = sum(p.numel() for p in before.model.parameters())
        assert results["parameters"] == plain
        along = sum(p.numel() for p in before.model.head.parameters()) if strength else 0
        assert results["trainable"] == plain + along
        loaded = load_classifier(out).members[0]
        assert not torch.equal(old["head.6.weight"], loaded.model.head[6].weight)
        loaded.model.load_state_dict(old, strict=False)
        now = loaded.probabilities(texts)
        if strength:
            kept = load_classifier(out, task="speeches-train")
            assert kept.classes == before.classes
            assert torch.equal(kept.probabilities(texts), now)
        far[strength] = (said * (said / now.clamp(min=1e-30)).log()).sum(-1).mean().item()
    assert far[30.0] < 0.5 * far[0.0]


def test_a_mixture_of_layers_goes_with_the_old_head(tmp_path, runs):
    mixed = replace(HEAD, layers="mix")
    finetune(config(runs["lstm"], Close(), mixed), tmp_path / "mixed")
    with pytest.raises(UserError, match=r"layers = 'mix', this one 'last'; give --classifier\.layers mix"):
        finetune(config(str(tmp_path / "mixed"), Close("lwf")), tmp_path / "last")
    still = replace(TRAIN, steps=1, lr=0.0)
    finetune(config(str(tmp_path / "mixed"), Close("lwf"), mixed, still), tmp_path / "again")
    before, after = (checkpoint.load(tmp_path / name / "final").weights for name in ("mixed", "again"))
    mixes = [name for name in before if name.startswith("mix.")]
    assert mixes
    assert all(torch.equal(before[name], after[name]) for name in mixes)


def test_fisher_information_adds_up(tmp_path, runs):
    """gamma times what the run of tune.init has kept, and that of its texts, around its weights; over three runs."""
    init, kept = runs["lstm"], {}
    for number, close in enumerate([EWC, *[replace(EWC, method="online-ewc", gamma=0.5)] * 2]):
        found = load_language_weights(init)
        model = language_model(found)
        fresh = make_penalty(EWC, model, model, found.vocabulary, init, TRAIN.seed)
        fresh.fill()
        out = tmp_path / str(number)
        train_language_model(tuned(init, close), out)
        extras = checkpoint.latest(out / "checkpoints").state["extras"]
        for name, value in found.weights.items():
            torch.testing.assert_close(extras[f"anchors.{name}"], value)
            expected = fresh.term.fisher.get_buffer(name) + 0.5 * kept.get(name, 0)
            torch.testing.assert_close(extras[f"fisher.{name}"], expected)
        kept = {name: extras[f"fisher.{name}"] for name in found.weights}
        init = str(out)
    finetune(config(init, close), tmp_path / "task")
    extras = checkpoint.latest(tmp_path / "task" / "checkpoints").state["extras"]
    assert (extras["penalty.fisher.decoder.bias"] > 0.5 * kept["decoder.bias"]).any()
    assert (extras["penalty.fisher.decoder.bias"] >= 0.5 * kept["decoder.bias"]).all()
    finetune(config(str(tmp_path / "task"), close), tmp_path / "next")  # a classifier's run keeps it too


def test_what_a_language_model_has_not(tmp_path, runs):
    with pytest.raises(UserError, match="which is for heads of classifiers; a language model's is outputs"):
        train_language_model(tuned(runs["lstm"], Close("lwf")), tmp_path)
    with pytest.raises(UserError, match=r"begin with a run of ewc"):
        train_language_model(tuned(runs["lstm"], replace(EWC, method="online-ewc")), tmp_path)


def test_old_predictions_are_no_part_of_the_model():
    predictions = OldPredictions(LSTMLanguageModel(replace(LSTM, vocab_size=9)), 1.0).train()
    assert not any(p.requires_grad for p in predictions.parameters())
    assert not any(module.training for module in predictions.source.modules())
