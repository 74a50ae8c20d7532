"""Word vectors in files of one's own."""

import numpy as np
import pytest

from glomo.data.vectors import read_vectors
from glomo.errors import UserError


def test_glove_and_fasttext(tmp_path):
    """The words that are asked for; a header and what else stands there is not looked at."""
    path = tmp_path / "v.txt"
    path.write_bytes(b"the 0.5 -1 1e-3\r\nbroken x\n\xff\xfe 1 2 3\nred 1 2 3\nred 9 9 9\none 7\n")
    found = read_vectors(path, {"the", "red", "blue", "one"})
    assert sorted(found) == ["one", "red", "the"]
    assert found["the"].dtype == np.float32
    np.testing.assert_array_equal(found["the"], np.array([0.5, -1, 1e-3], dtype=np.float32))
    np.testing.assert_array_equal(found["red"], [1, 2, 3])
    vec = tmp_path / "v.vec"
    vec.write_text("2 3\n2 1 0 1 \nred 1 2 3 \n")
    found = read_vectors(str(vec), ["2", "red"])
    np.testing.assert_array_equal(found["2"], [1, 0, 1])
    np.testing.assert_array_equal(found["red"], [1, 2, 3])


def test_mistakes(tmp_path):
    path = tmp_path / "v.txt"
    path.write_text("the 1 2\nred 1 two 3\nblue\n")
    assert list(read_vectors(path, ["the"])) == ["the"]
    with pytest.raises(UserError, match=r"v.txt, line 2: behind 'red' stands '1 two 3', where numbers are needed"):
        read_vectors(path, ["red"])
    with pytest.raises(UserError, match=r"v.txt, line 3: behind 'blue' stands ''"):
        read_vectors(path, ["blue"])
    with pytest.raises(UserError, match=r"none.txt cannot be read \(it does not exist\); a file of word vectors"):
        read_vectors(tmp_path / "none.txt", ["red"])
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_vectors(tmp_path, ["red"])
