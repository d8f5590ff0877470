"""Revisions of a repository as folders of files, which are gone afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastllama_benchmarks.regress.revisions import files_of, git, resolve
from fastllama_benchmarks.workload import Unavailable


@pytest.fixture
def repo(new_repository: Any, tmp_path: Path) -> Path:
    """A repository of two commits, the first one tagged."""
    commit = new_repository(tmp_path / "repo")
    git(tmp_path / "repo", "tag", "v1", commit("The first", code="one", **{".gitignore": "built\n"}))
    commit("The second\n\nwith a body", code="two")
    return tmp_path / "repo"


def worktrees(repo: Path) -> int:
    """How many git knows, the checkout itself included."""
    return len(git(repo, "worktree", "list").splitlines())


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


def test_a_worktree_holds_the_files_of_its_commit_and_goes(repo: Path, tmp_path: Path) -> None:
    revision = resolve(repo, "v1")
    with files_of(repo, revision, tmp_path / "kept" / "tree") as tree:
        assert (tree / "code").read_text() == "one"
        assert worktrees(repo) == 2
    assert not tree.exists()
    assert worktrees(repo) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["v1", "."])
def test_the_files_go_also_after_an_error(repo: Path, tmp_path: Path, name: str, error: type[BaseException]) -> None:
    with pytest.raises(error), files_of(repo, resolve(repo, name), tmp_path / "tree"):
        raise error
    assert not (tmp_path / "tree").exists()
    assert worktrees(repo) == 1


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
