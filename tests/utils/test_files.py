"""Names of files stay in their folder, and temporary files cannot be guessed or be links."""

import os
import re

import pytest

from var.training.trackers import Wandb
from var.utils.files import atomic, make_file_name, name_partial, remove_partials, write_json


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "../../x",
        "/etc/x",
        "a/../../b",
        "..\\x",
        "~",
        ".hidden",
        "a\0b",
        "a\nb",
        "\u202egnp",
        "\x1b[2J",
        "x" * 999,
    ],
)
def test_file_name_stays_in_its_folder(name, tmp_path):
    found = make_file_name(name)
    assert (tmp_path / found).resolve().parent == tmp_path
    assert re.fullmatch(r"[^./\x00-\x1f\x7f-\x9f\u202e][^/\x00-\x1f\x7f-\x9f\u202e]*", found)
    (tmp_path / found).touch()


@pytest.mark.parametrize("shared", [False, True])
def test_link_in_place_of_a_temporary_file_is_not_followed(shared, tmp_path, monkeypatch):
    """Also if its name is guessed."""
    target, victim = tmp_path / "out.json", tmp_path / "victim"
    victim.write_text("keep")
    (tmp_path / "out.json.partial").symlink_to(victim)  # the name of earlier versions
    guessed = name_partial(target)
    monkeypatch.setattr("var.utils.files.name_partial", lambda _: guessed)
    monkeypatch.setattr("var.utils.files.remove_partials", lambda _: guessed.symlink_to(victim))
    if shared:
        guessed.symlink_to(victim)
    with pytest.raises(FileExistsError), atomic(target, shared=shared) as file:
        file.write("changed")
    assert victim.read_text() == "keep"
    assert not target.exists()


def test_link_at_the_target_is_replaced(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("keep")
    (tmp_path / "out.json").symlink_to(victim)
    write_json(tmp_path / "out.json", 1)
    assert (victim.read_text(), (tmp_path / "out.json").read_text()) == ("keep", "1")
    assert not (tmp_path / "out.json").is_symlink()


def test_only_own_temporary_files_are_removed(tmp_path):
    own, other = name_partial(tmp_path / "a[1]"), [name_partial(tmp_path / "a[1].b"), tmp_path / "a[1].partial"]
    for path in (own, *other):
        path.touch()
    remove_partials(tmp_path / "a[1]")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in other}


@pytest.mark.parametrize("name", ["x/../../victim", "*", "", "../victim"])
def test_wandb_id_of_another_folder_removes_nothing_outside(name, tmp_path):
    folder = tmp_path / "run" / "wandb"
    (folder / "offline-run-1-x").mkdir(parents=True)
    (folder / "victim").mkdir()
    (tmp_path / "run" / "victim").mkdir()
    (folder / "id").write_text(name)
    assert re.fullmatch("[0-9a-f]{8}", Wandb._prepare(folder))
    assert (folder / "victim").exists()
    assert (tmp_path / "run" / "victim").exists()
    assert os.listdir(folder / "offline-run-1-x") == []
