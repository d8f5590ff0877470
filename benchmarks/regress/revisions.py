"""A revision to a folder that holds its files: a worktree of git.

Where the files are put depends on their content alone, and their times of modification on the commit, so that what was
compiled from them in an earlier run is still good in the next.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..workload import Unavailable

CHECKOUT = ("WORKTREE", ".")  # names of the checkout as it is, with what is not committed
KEY_LENGTH = 12
LOCAL_TO_A_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # set in hooks, perhaps by another repository
NO_HOOKS = ("-c", "core.hooksPath=/dev/null", "-c", "advice.detachedHead=false")
AUTHOR = ("-c", "user.name=fastllama-regress", "-c", "user.email=regress@localhost")


class GitError(Unavailable):
    """Git refused; the message is the last line it wrote."""


@dataclass(frozen=True)
class Revision:
    """Something of a repository that can be measured."""

    name: str  # as the user gave it
    commit: str  # of a checkout, what it is based on
    subject: str  # first line of the commit's message
    dirty: bool  # whether it is a checkout with changes that are not committed
    key: str  # equal for equal content only
    is_checkout: bool = False
    files: str = ""  # the commit that holds its files; of a checkout with changes one that no branch names

    def __str__(self) -> str:
        kind = " with uncommitted changes" if self.dirty else ""
        return f"{self.commit[:KEY_LENGTH]}{kind}"


def repository(path: Path) -> Path:
    """The top folder of the git repository that holds ``path``."""
    try:
        return Path(git(path, "rev-parse", "--show-toplevel"))
    except GitError as error:
        where = path.resolve()
        raise Unavailable(f"{where} lies in no git repository ({error}); run this in a checkout of fastllama") from None


def resolve(repo: Path, name: str) -> Revision:
    """The revision of that name: anything git knows as a commit, or ``.`` or ``WORKTREE`` for the checkout as it is."""
    is_checkout = name in CHECKOUT
    wanted = "HEAD" if is_checkout else name
    if wanted.startswith("-"):
        raise Unavailable(f"{wanted!r} is no revision")
    try:
        commit = git(repo, "rev-parse", "--verify", "--quiet", f"{wanted}^{{commit}}")
    except GitError:
        shallow = git(repo, "rev-parse", "--is-shallow-repository") == "true"
        hint = "; the clone is shallow: fetch more of its history" if shallow else ""
        raise Unavailable(f"there is no revision {name!r} in {repo}{hint}") from None
    dirty = is_checkout and bool(git(repo, "status", "--porcelain"))
    files = _commit_of_checkout(repo, commit) if dirty else commit
    key = git(repo, "rev-parse", f"{files}^{{tree}}")[:KEY_LENGTH]
    return Revision(name, commit, git(repo, "log", "-1", "--format=%s", commit), dirty, key, is_checkout, files)


@contextmanager
def files_of(repo: Path, revision: Revision, folder: Path) -> Iterator[Path]:
    """Put the files of a revision into ``folder`` and remove them at the end, whatever happens in between."""
    remove(repo, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        git(repo, "worktree", "add", "--detach", "--force", str(folder), revision.files)
        committed = int(git(repo, "log", "-1", "--format=%ct", revision.commit))
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                os.utime(path, (committed, committed))
        yield folder
    finally:
        remove(repo, folder)


def remove(repo: Path, folder: Path) -> None:
    """Remove a worktree; nothing happens where there is none."""
    with suppress(GitError):  # it is unknown to git
        git(repo, "worktree", "remove", "--force", str(folder))
    shutil.rmtree(folder, ignore_errors=True)
    git(repo, "worktree", "prune")


def git(folder: Path, *arguments: str, **variables: str) -> str:
    """What git prints, stripped."""
    inherited = {name: value for name, value in os.environ.items() if name not in LOCAL_TO_A_REPOSITORY}
    command = ["git", *NO_HOOKS, "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, env=inherited | variables, text=True, errors="replace")
    except FileNotFoundError:
        raise Unavailable("git is needed to compare revisions, and there is none on PATH") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise GitError(lines[-1] if lines else f"git {arguments[0]} failed with code {done.returncode}")
    return done.stdout.strip()


def _commit_of_checkout(repo: Path, head: str) -> str:
    """A commit of the checkout as it is, with files that git does not know yet and without those that it ignores."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        git(repo, "read-tree", head, **index)
        git(repo, "add", "--all", **index)
        tree = git(repo, "write-tree", **index)
    return git(repo, *AUTHOR, "commit-tree", tree, "-p", head, "-m", "the checkout as it is")
