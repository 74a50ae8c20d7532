"""Run folders: whose they are, one process at a time, and metrics that fit the checkpoint."""

import errno
import json
import subprocess
import sys

import pytest

from glomo.errors import UserError
from glomo.training.run_folder import RunFolder

CONFIG = {"data": {"text": ["a.txt"], "limit": None}, "train": {"steps": 5, "lr": 0.1}}


def changed(section, key, value):
    return {**CONFIG, section: {**CONFIG[section], key: value}}


def test_the_same_run_goes_on_and_some_keys_may_change(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).close()
    RunFolder(tmp_path / "run", CONFIG).close()
    RunFolder(tmp_path / "run", changed("train", "steps", 9)).close()
    assert "steps = 9" in (tmp_path / "run" / "config.toml").read_text()


def test_another_run_is_refused_by_its_first_differing_key(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).close()
    (tmp_path / "run" / "checkpoints" / "step-000005").mkdir()
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(UserError, match=r"holds another run: train.lr is 0.1 there and 0.2 in this call"):
        RunFolder(tmp_path / "run", changed("train", "lr", 0.2))
    with pytest.raises(UserError, match=r"data.limit is 'none' there and 3"):
        RunFolder(tmp_path / "run", changed("data", "limit", 3))
    with pytest.raises(UserError, match=r"train.lr is 0.1 there and None"):
        RunFolder(tmp_path / "run", {**CONFIG, "train": {"steps": 5}})
    assert (tmp_path / "run" / "config.toml").read_bytes() == before


def test_a_run_that_is_older_than_a_key_had_its_default(tmp_path):
    old = {"data": CONFIG["data"], "train": {"steps": 5}}
    defaults = {**CONFIG, "close": {"method": "none", "limit": None}, "other": {"key": 1}}
    new = {**CONFIG, "close": defaults["close"]}
    RunFolder(tmp_path / "run", old).close()
    (tmp_path / "run" / "final").mkdir()
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(UserError, match=r"train.lr is None there"):
        RunFolder(tmp_path / "run", new)
    with pytest.raises(UserError, match=r"close.method is 'none' there and 'ewc' in this call"):
        RunFolder(tmp_path / "run", {**new, "close": {"method": "ewc", "limit": None}}, defaults=defaults)
    with pytest.raises(UserError, match=r"close.limit is 'none' there and 3 in this call"):
        RunFolder(tmp_path / "run", {**new, "close": {"method": "none", "limit": 3}}, defaults=defaults)
    with pytest.raises(UserError, match=r"new.key is None there and 1 in this call"):
        RunFolder(tmp_path / "run", {**new, "new": {"key": 1}}, defaults=defaults)
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    RunFolder(tmp_path / "run", new, defaults=defaults).close()
    assert 'method = "none"' in (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(UserError, match=r"close.method is 'none' there and None in this call"):
        RunFolder(tmp_path / "run", CONFIG, defaults=CONFIG)  # a key that was removed


def test_a_run_that_saved_nothing_gives_its_folder_to_another(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).log({"step": 1})
    RunFolder(tmp_path / "run", changed("train", "lr", 0.2)).close()
    (tmp_path / "run" / "final").mkdir()
    with pytest.raises(UserError, match=r"lr is 0\.2 there"):
        RunFolder(tmp_path / "run", CONFIG)


def test_folders_of_other_things_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other things \(notes.txt\)"):
        RunFolder(tmp_path, CONFIG)
    with pytest.raises(UserError, match="is a file; choose"):
        RunFolder(tmp_path / "notes.txt", CONFIG)
    with pytest.raises(UserError, match="cannot write to the output folder"):
        RunFolder(tmp_path / "notes.txt" / "deeper", CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_second_process_is_refused_and_a_dead_one_leaves_no_lock(tmp_path):
    with RunFolder(tmp_path / "run", CONFIG), pytest.raises(UserError, match="another process is writing"):
        RunFolder(tmp_path / "run", CONFIG)
    code = f"import fcntl, os; fcntl.flock(open({str(tmp_path / 'run' / '.lock')!r}, 'a'), fcntl.LOCK_EX); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    RunFolder(tmp_path / "run", CONFIG).close()


def test_rows_past_the_checkpoint_and_a_cut_line_are_dropped(tmp_path):
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        for step in range(1, 6):
            folder.log({"step": step, "loss": 1 / step})
        with folder.metrics.open("a") as file:
            file.write('{"step": 3, "lo')
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        folder.drop_rows_after(3)
        folder.log({"step": 4, "loss": 9.0})
        assert folder.rows() == [{"step": s, "loss": 1 / s} for s in (1, 2, 3)] + [{"step": 4, "loss": 9.0}]


def test_a_last_line_without_its_end_is_cut_even_if_it_reads(tmp_path):
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        folder.metrics.write_text('{"step": 1}\n{"step": 2}')
        folder.drop_rows_after(2)
        assert folder.metrics.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("line", ["5", '{"a": 1}', '{"step": "2"}', "{", ""])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        folder.metrics.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
        with pytest.raises(UserError, match=r"metrics.jsonl is damaged: line 2 .*remove that line"):
            folder.drop_rows_after(3)
        with pytest.raises(UserError, match="line 2"):
            folder.rows()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("lr = 3\n", r"config.toml is damaged: 'lr' is no section"),
        ("[model]\ndim = 3\n", "holds a pretrain run; choose"),
        ("[compare]\nseeds = 3\n[graph]\n", "holds a transfer run; choose"),
        ("[classifier]\nhidden = 3\n[compare]\n", "holds a comparison; choose"),
        ("[model]\ndim = 3\n[classifier]\nhidden = 3\n", "holds a finetune run; choose"),
        ("[model]\ndim = 3\n[lstm]\ndim = 3\n", "holds an lm run; choose"),
    ],
)
def test_a_folder_of_another_command_or_with_a_damaged_configuration(tmp_path, content, sentence):
    (tmp_path / "final").mkdir()
    (tmp_path / "config.toml").write_text(content)
    with pytest.raises(UserError, match=sentence):
        RunFolder(tmp_path, CONFIG)


def test_every_row_is_on_the_file_at_once(tmp_path):
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        folder.log({"step": 1, "loss": 0.1 + 0.2})
        assert json.loads(folder.metrics.read_text())["loss"] == 0.1 + 0.2


def test_a_full_disk_is_a_sentence(tmp_path):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    folder = RunFolder(tmp_path / "run", CONFIG)
    folder._rows = Full()
    with pytest.raises(UserError, match=r"cannot write to .*metrics.jsonl: No space left on device"):
        folder.log({"step": 1})
    folder.close()
