"""Revisions of a repository as folders of files, which are gone afterwards."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fastllama_benchmarks.regress.revisions import files_of, git, remove, repository, resolve
from fastllama_benchmarks.workload import Unavailable

AUTHOR = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")


def commit(repo: Path, message: str, **files: str) -> str:
    """Commits files of this text and returns the id."""
    for name, text in files.items():
        (repo / name).write_text(text)
    git(repo, "add", "--all")
    git(repo, *AUTHOR, "commit", "--quiet", "--allow-empty", "-m", message)
    return git(repo, "rev-parse", "HEAD")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository of two commits, the first one tagged."""
    folder = tmp_path / "repo"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder, "The first", code="one", **{".gitignore": "built\n"})
    git(folder, "tag", "v1")
    commit(folder, "The second\n\nwith a body", code="two")
    return folder


def worktrees(repo: Path) -> int:
    """How many git knows, the checkout itself included."""
    return len(git(repo, "worktree", "list").splitlines())


def test_a_repository_is_found_from_any_folder_in_it(repo: Path) -> None:
    (repo / "inner").mkdir()
    assert repository(repo / "inner") == repo


def test_no_repository_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"lies in no git repository \(.+\); run this in a checkout of fastllama$"):
        repository(tmp_path)


def test_no_git_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="none on PATH"):
        repository(tmp_path)


@pytest.mark.parametrize("name", ["v1", "HEAD~1", "main^"])
def test_a_revision_is_whatever_git_knows(repo: Path, name: str) -> None:
    revision = resolve(repo, name)
    assert (revision.name, revision.subject, revision.dirty) == (name, "The first", False)
    assert revision.commit == git(repo, "rev-parse", "v1")
    assert str(revision) == revision.commit[:12]


@pytest.mark.parametrize("name", ["nowhere", "0" * 40, "v1:code", "", "-q"])
def test_a_revision_that_is_not_there_is_one_line(repo: Path, name: str) -> None:
    with pytest.raises(Unavailable, match="revision") as caught:
        resolve(repo, name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_shallow_clone_is_named_where_a_revision_is_missing(repo: Path, tmp_path: Path) -> None:
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{repo}", str(shallow))
    with pytest.raises(Unavailable, match="the clone is shallow: fetch more"):
        resolve(shallow, "HEAD~1")


def test_a_worktree_holds_the_files_of_its_commit_and_goes(repo: Path, tmp_path: Path) -> None:
    revision = resolve(repo, "v1")
    with files_of(repo, revision, tmp_path / "kept" / "tree") as tree:
        assert (tree / "code").read_text() == "one"
        assert worktrees(repo) == 2
    assert not tree.exists()
    assert worktrees(repo) == 1


def test_files_are_as_old_as_their_commit_every_time(repo: Path, tmp_path: Path) -> None:
    revision = resolve(repo, "v1")
    committed = int(git(repo, "log", "-1", "--format=%ct", "v1"))
    for _ in range(2):
        with files_of(repo, revision, tmp_path / "tree") as tree:
            assert (tree / "code").stat().st_mtime == committed


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["v1", "."])
def test_the_files_go_also_after_an_error(repo: Path, tmp_path: Path, name: str, error: type[BaseException]) -> None:
    with pytest.raises(error), files_of(repo, resolve(repo, name), tmp_path / "tree"):
        raise error
    assert not (tmp_path / "tree").exists()
    assert worktrees(repo) == 1


def test_leftovers_of_a_run_that_was_killed_are_replaced(repo: Path, tmp_path: Path) -> None:
    revision, folder = resolve(repo, "v1"), tmp_path / "tree"
    git(repo, "worktree", "add", "--quiet", "--detach", str(folder), "HEAD")
    (folder / "leftover").touch()
    with files_of(repo, revision, folder):
        assert sorted(path.name for path in folder.iterdir()) == [".git", ".gitignore", "code"]
    assert worktrees(repo) == 1


def test_a_worktree_whose_folder_is_gone_is_forgotten(repo: Path, tmp_path: Path) -> None:
    git(repo, "worktree", "add", "--quiet", "--detach", str(tmp_path / "tree"), "HEAD")
    subprocess.run(["rm", "-r", str(tmp_path / "tree")], check=True)
    remove(repo, tmp_path / "tree")
    assert worktrees(repo) == 1


def test_hooks_of_the_repository_do_not_run(repo: Path, tmp_path: Path) -> None:
    hook = repo / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    hook.chmod(0o755)
    with files_of(repo, resolve(repo, "v1"), tmp_path / "tree"):
        pass
    assert not (tmp_path / "ran").exists()


def test_variables_of_another_repository_are_not_listened_to(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere/.git")
    assert resolve(repo, "v1").subject == "The first"


@pytest.mark.parametrize("name", [".", "WORKTREE"])
def test_the_checkout_is_taken_as_it_is(repo: Path, tmp_path: Path, name: str) -> None:
    (repo / "code").write_text("changed")
    (repo / "new").write_text("not added yet")
    (repo / "built").write_text("ignored")
    revision = resolve(repo, name)
    assert (revision.subject, revision.dirty, revision.is_checkout) == ("The second", True, True)
    with files_of(repo, revision, tmp_path / "tree") as tree:
        (repo / "code").write_text("changed again, while it is being measured")
        found = {path.name: path.read_text() for path in tree.iterdir() if path.name != ".git"}
    assert found == {".gitignore": "built\n", "code": "changed", "new": "not added yet"}


def test_files_that_were_deleted_in_the_checkout_are_not_there(repo: Path, tmp_path: Path) -> None:
    (repo / "code").unlink()
    with files_of(repo, resolve(repo, "."), tmp_path / "tree") as tree:
        assert sorted(path.name for path in tree.iterdir()) == [".git", ".gitignore"]


def test_the_key_of_a_checkout_follows_its_content(repo: Path) -> None:
    clean = resolve(repo, ".")
    assert not clean.dirty
    (repo / "code").write_text("changed")
    changed = resolve(repo, ".")
    (repo / "code").write_text("two")
    os.utime(repo / "code")
    assert changed.key != clean.key == resolve(repo, ".").key
    assert git(repo, "status", "--porcelain") == ""
    assert len(changed.key) == len(resolve(repo, "v1").key)  # equally long paths: an environment's size matters
