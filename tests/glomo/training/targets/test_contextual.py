"""Features of words in their context, by a small encoder with random weights."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from glomo.data import catalogue
from glomo.errors import UserError
from glomo.nn import UniformGraph
from glomo.training.targets import make_target
from glomo.training.targets.reader import SpanReader
from glomo.training.train_config import TrainConfig
from glomo.training.transfer import transfer
from glomo.training.transfer_config import Compare, Features, Head, TransferConfig, TransferData

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

from glomo.training.targets.contextual import Encoder, context_table, encoder_fingerprint  # noqa: E402

HERE = Path(__file__).parents[3] / "data"
CPU = torch.device("cpu")
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "to", "be", "##ing", "or", "not", "that", "is", "the", "quest", "##ion"]


def on(folder):
    return TransferConfig(
        TransferData(train=str(HERE / "speeches-train.csv"), test=str(HERE / "speeches-test.csv"), length=8),
        Features("contextual", encoder=str(folder)),
        head=Head(hidden=8),
        compare=Compare(("none", "band"), 1),
        train=TrainConfig(steps=4, threads=1, device="cpu", checkpoint_every=2, eval_every=0),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(PIECES), max_position_embeddings=12, **sizes)
    transformers.BertModel(config).save_pretrained(path)
    transformers.BertTokenizerFast(vocab={p: i for i, p in enumerate(PIECES)}, model_max_length=12).save_pretrained(
        path
    )
    return path


def test_a_word_is_the_mean_of_its_pieces(folder):
    texts = [("Not", " being", "the", "question"), ("to",), ("be", "", "is"), ("",), ("not", "that", "question")]
    table = context_table(Features("contextual", encoder=str(folder)), texts[:3], texts[2:], CPU)
    model = transformers.BertModel.from_pretrained(folder).eval()
    pieces = [["not"], ["be", "##ing"], ["the"], ["quest", "##ion"]]
    ids = [2, *(PIECES.index(piece) for word in pieces for piece in word), 3]
    with torch.no_grad():
        states = model(torch.tensor([ids])).last_hidden_state[0, 1:-1]  # alone, without padding
    expected = torch.stack([states[0], states[1:3].mean(0), states[3], states[4:6].mean(0)])
    found = table.features(Features("contextual"))(torch.tensor([table.encode(texts[0])]))[0]
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)  # kept as fp16
    assert [table.encode(text) for text in texts] == [[2, 3, 4, 5], [6], [7, 8, 9], [10], [11, 12, 13]]
    assert table.vectors.shape == (14, 16)
    assert not table.vectors[[0, 1, 8, 10]].any()  # padding, and words without a piece
    assert table.vectors[[7, 9]].all()
    assert table.counts == {}
    # the same word elsewhere is another vector
    assert (table.vectors[5] - table.vectors[13]).abs().max() > 0.01


def test_words_behind_what_the_encoder_can_read_are_zero_and_counted(folder):
    exact, long = ("be",) * 10, ("question",) * 7
    table = context_table(Features("contextual", encoder=str(folder)), [exact], [long], CPU)
    assert table.vectors[table.encode(exact)].any(1).all()
    assert table.vectors[table.encode(long)].any(1).tolist() == [True] * 5 + [False] * 2
    assert table.counts == {"words behind what the encoder can read": 2}


def test_no_batch_changes_a_text_and_the_last_table_is_kept(folder, monkeypatch):
    texts = [("to", "be") * (1 + i % 4) + ("or",) * (i % 3) for i in range(40)]
    settings = Features("contextual", encoder=str(folder))
    whole = context_table(settings, texts, [], CPU)
    assert context_table(settings, texts[:30], texts[30:], CPU) is whole
    monkeypatch.setattr("glomo.training.targets.contextual.PIECES", 40)
    few = context_table(settings, texts[::-1], [("is",)], CPU)
    assert len(few.places) == len(whole.places) + 1 == len(set(texts)) + 1
    for text in texts:
        found = [table.vectors[table.encode(text)] for table in (whole, few)]
        torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_words_of_byte_level_tokenizers(tmp_path, kind):
    """Without a padding unit, or with positions that begin behind it; the space before a word is the word's."""
    letters = sorted(set("tobeingrsquh\u0120<>/"))
    names = ["<s>", "<pad>", "</s>", "<unk>", *letters, "\u0120t", "\u0120to"]
    numbers = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, [("\u0120", "t"), ("\u0120t", "o")]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    sizes = {"vocab_size": len(names), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    if kind == "roberta":
        config = transformers.RobertaConfig(**sizes, intermediate_size=8, max_position_embeddings=14, pad_token_id=1)
        model = transformers.RobertaModel(config)
    else:
        config = transformers.GPT2Config(**sizes, n_positions=12, bos_token_id=0, eos_token_id=0)
        model = transformers.GPT2Model(config)
    model.save_pretrained(tmp_path)
    padding = {"pad_token": "<pad>"} if kind == "roberta" else {}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **padding).save_pretrained(tmp_path)
    texts = [("to", "to", "being"), ("being",) * 4, ("",)]
    table = context_table(Features("contextual", encoder=str(tmp_path)), texts, [], CPU)
    ids = [numbers[piece] for piece in ("t", "o", "\u0120to", "\u0120", *"being")]
    with torch.no_grad():
        states = model.eval()(torch.tensor([ids])).last_hidden_state[0]
    expected = torch.stack([states[:2].mean(0), states[2], states[3:].mean(0)])
    torch.testing.assert_close(table.vectors[table.encode(texts[0])].float(), expected, rtol=2e-3, atol=2e-3)
    # twelve pieces can be read: of the third word the space alone
    assert table.vectors[table.encode(texts[1])].any(1).tolist() == [True, True, True, False]
    assert table.counts == {"words behind what the encoder can read": 2}


def test_transfer_on_contextual_features(folder, tmp_path):
    config = on(folder)
    whole = transfer(config, tmp_path / "whole")
    assert [run["graph"] for run in whole["runs"]] == ["none", "band"]
    transfer(replace(config, train=replace(config.train, steps=2)), tmp_path / "parts")
    again = transfer(config, tmp_path / "parts")
    assert [run["figures"] for run in again["runs"]] == [run["figures"] for run in whole["runs"]]
    weights = [(tmp_path / name / "band-0" / "final" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert b"vectors" not in weights[0]


def test_mistakes_are_sentences(folder, tmp_path, monkeypatch):
    def said(where):
        with pytest.raises(UserError) as caught:
            context_table(Features("contextual", encoder=str(where)), [("to",)], [], CPU)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    with pytest.raises(UserError, match=r"needs --features\.chars 0"):
        Features("contextual", chars=3)
    assert "is no folder; the nearest known one is minilm-l6" in said("minilm")
    assert "is no folder" in said("")
    (tmp_path / "empty").mkdir()
    assert "config.json is not there" in said(tmp_path / "empty")

    def copy(name, **files):
        shutil.copytree(folder, tmp_path / name)
        for file, content in files.items():
            (tmp_path / name / file.replace("_", ".")).write_bytes(content)
        return tmp_path / name

    other = copy("pickled")
    torch.save(transformers.BertModel.from_pretrained(folder).state_dict(), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    assert "model.safetensors is not there" in said(other)  # pickled weights are not read
    assert "cannot be read as an encoder" in said(copy("damaged", model_safetensors=b"x" * 99))
    assert "cannot be read as an encoder" in said(copy("no-tokenizer", tokenizer_json=b"{}"))
    some = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layer.1" not in k}
    save_file(some, copy("half") / "model.safetensors", {"format": "pt"})
    assert re.search(
        r"half: the weights are not those of config.json, \S*layer\.1\S* is missing", said(tmp_path / "half")
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "own.Model"}
    own = copy("own", config_json=json.dumps(config).encode())
    (own / "own.py").write_text("raise SystemExit('run')")
    Encoder(own, CPU)  # its code is not run
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert re.search("pip install .transformers>=5", said(folder))


def test_weights_in_half_precision_are_computed_with_in_single(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "half")
    transformers.BertModel.from_pretrained(folder).bfloat16().save_pretrained(tmp_path / "half")
    assert {weight.dtype for weight in Encoder(tmp_path / "half", CPU).model.parameters()} == {torch.float32}


def test_a_run_knows_its_encoder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "encoder")
    config = on(tmp_path / "encoder")
    transfer(config, tmp_path / "out")
    torch.manual_seed(1)
    transformers.BertModel(transformers.BertConfig.from_pretrained(folder)).save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="was made with another encoder"):
        transfer(config, tmp_path / "out")


def test_units_that_are_no_words_have_no_contextual_vectors(folder, tmp_path):
    config = on(folder)
    vocabulary = SimpleNamespace()
    with pytest.raises(UserError, match=r"is of words, and the units of the graph are none"):
        make_target(config, vocabulary)


@pytest.mark.parametrize("states", [False, True])
def test_groups_of_a_reader_on_contextual_features(folder, states):
    table = context_table(Features("contextual", encoder=str(folder)), [("to",)], [], CPU)
    reader = SpanReader(table.features(Features("contextual")), UniformGraph(), True, states, hidden=4, dropout=0.0)
    below = ["encoder", "graph"] if states else ["graph", "encoder"]
    assert list(reader.layer_patterns()) == [*below, "attention", "modelling", "head"]


def test_an_encoder_of_the_catalogue_is_unpacked_once(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("GLOMO_CACHE", str(tmp_path))
    read = []

    def member(source, name, licence=""):
        read.append(name.rsplit("/", 1)[1])
        return (folder / read[-1]).read_bytes()

    monkeypatch.setattr(catalogue, "read_member", member)
    assert len(encoder_fingerprint(Features("contextual"))) == 12
    assert read == []  # to tell it from others it is not fetched
    for _ in range(2):
        table = context_table(Features("contextual"), [("to", "be")], [], CPU)
        assert table.vectors.shape == (4, 16)
    assert sorted(read) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [path.name for path in (tmp_path / "parsed").iterdir()] == [catalogue.encoder_folder("minilm-l6").name]
