"""A revision to a folder that holds its files: a worktree of git."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..contenders.remote import last_words
from ..workload import Unavailable

CHECKOUT = ("WORKTREE", ".")  # names of the checkout as it is, with what is not committed
KEY_LENGTH = 12
NO_HOOKS = ("-c", "core.hooksPath=/dev/null", "-c", "advice.detachedHead=false")
AUTHOR = ("-c", "user.name=fastllama-regress", "-c", "user.email=regress@localhost")


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


def resolve(repo: Path, name: str) -> Revision:
    """The revision of that name: anything git knows as a commit, or ``.`` or ``WORKTREE`` for the checkout as it is."""
    is_checkout = name in CHECKOUT
    wanted = "HEAD" if is_checkout else name
    try:
        commit = git(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{wanted}^{{commit}}")
    except Unavailable:
        raise Unavailable(f"there is no revision {name!r} in {repo}; a shallow clone may lack it") from None
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
        yield folder
    finally:
        remove(repo, folder)


def remove(repo: Path, folder: Path) -> None:
    """Remove a worktree; nothing happens where there is none."""
    shutil.rmtree(folder, ignore_errors=True)
    git(repo, "worktree", "prune")


def git(folder: Path, *arguments: str, **variables: str) -> str:
    """What git prints, stripped."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a hook, perhaps
    command = ["git", *NO_HOOKS, "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, env=inherited | variables, text=True, errors="replace")
    except FileNotFoundError:
        raise Unavailable("git is needed to compare revisions, and there is none on PATH") from None
    if done.returncode:
        raise Unavailable(f"git {arguments[0]} ended with code {done.returncode}: {last_words(done.stderr)}")
    return done.stdout.strip()


def _commit_of_checkout(repo: Path, head: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        git(repo, "read-tree", head, **index)
        git(repo, "add", "--all", **index)
        tree = git(repo, "write-tree", **index)
    return git(repo, *AUTHOR, "commit-tree", tree, "-p", head, "-m", "the checkout as it is")
