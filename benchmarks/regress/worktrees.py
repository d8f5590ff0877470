"""A revision to a folder that holds its files: worktrees of git, and copies of a checkout as it is.

Where a revision's files are put depends on its content alone, and their times of modification on its commit, so that
what was compiled from them in an earlier run is still good in the next.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..harness import Unavailable

WORKTREE = ("WORKTREE", ".")  # names of the checkout as it is, with what is not committed
KEY_LENGTH = 12
LOCAL_TO_A_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # set in hooks, of another repository perhaps
NO_HOOKS = ("-c", "core.hooksPath=/dev/null", "-c", "advice.detachedHead=false")


class GitError(Unavailable):
    """Git refused; the message is the last line it wrote."""


@dataclass(frozen=True)
class Revision:
    """Something of a repository that can be measured.

    Attributes:
        name: as the user gave it.
        commit: the full id of its commit; of a checkout, of the commit it is based on.
        subject: first line of the commit's message.
        dirty: whether it is a checkout with changes that are not committed.
        key: names its content; equal for equal content only.
        is_checkout: whether it is the checkout itself.
    """

    name: str
    commit: str
    subject: str
    dirty: bool
    key: str
    is_checkout: bool = False

    def __str__(self) -> str:
        kind = " with uncommitted changes" if self.dirty else ""
        return f"{self.commit[:KEY_LENGTH]}{kind}"


def repository(path: Path) -> Path:
    """The top folder of the git repository that holds ``path``.

    Raises:
        Unavailable: there is none, or no git.
    """
    try:
        return Path(git(path, "rev-parse", "--show-toplevel"))
    except GitError as error:
        where = path.resolve()
        raise Unavailable(f"{where} lies in no git repository ({error}); run this in a checkout of fastllama") from None


def resolve(repo: Path, name: str) -> Revision:
    """The revision of that name: anything git knows as a commit, or ``.`` or ``WORKTREE`` for the checkout as it is.

    Raises:
        Unavailable: there is no such revision.
    """
    is_checkout = name in WORKTREE
    wanted = "HEAD" if is_checkout else name
    if wanted.startswith("-"):
        raise Unavailable(f"{wanted!r} is no revision")
    try:
        commit = git(repo, "rev-parse", "--verify", "--quiet", f"{wanted}^{{commit}}")
    except GitError:
        shallow = git(repo, "rev-parse", "--is-shallow-repository") == "true"
        hint = "; the clone is shallow: fetch more of its history" if shallow else ""
        raise Unavailable(f"there is no revision {name!r} in {repo}{hint}") from None
    subject = git(repo, "log", "-1", "--format=%s", commit)
    if not is_checkout:
        return Revision(name, commit, subject, False, commit[:KEY_LENGTH])
    dirty = bool(git(repo, "status", "--porcelain"))
    return Revision(name, commit, subject, dirty, _content_key(repo), True)


@contextmanager
def files_of(repo: Path, revision: Revision, folder: Path) -> Iterator[Path]:
    """Put the files of a revision into ``folder`` and remove them at the end, whatever happens in between.

    Args:
        repo: top folder of the repository.
        revision: of it.
        folder: may hold leftovers of a run that was killed, which are replaced.
    """
    remove(repo, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        if revision.is_checkout:
            _copy_checkout(repo, folder)
        else:
            _add_worktree(repo, revision.commit, folder)
        yield folder
    finally:
        remove(repo, folder)


def remove(repo: Path, folder: Path) -> None:
    """Remove a worktree or a copy; nothing happens where there is none."""
    with suppress(GitError):  # it was a copy, or is unknown to git
        git(repo, "worktree", "remove", "--force", str(folder))
    shutil.rmtree(folder, ignore_errors=True)
    git(repo, "worktree", "prune")


def git(folder: Path, *arguments: str, **variables: str) -> str:
    """What git prints, stripped.

    Args:
        folder: where it runs.
        arguments: of git.
        variables: added to its environment.

    Raises:
        GitError: git failed.
        Unavailable: there is no git.
    """
    return _git(folder, arguments, variables).decode(errors="replace").strip()


def _git(folder: Path, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> bytes:
    command = ["git", *NO_HOOKS, "-C", str(folder), *arguments]
    inherited = {name: value for name, value in os.environ.items() if name not in LOCAL_TO_A_REPOSITORY}
    try:
        done = subprocess.run(command, capture_output=True, env=inherited | dict(variables or {}))
    except FileNotFoundError:
        raise Unavailable("git is needed to compare revisions, and there is none on PATH") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise GitError(lines[-1] if lines else f"git {arguments[0]} failed with code {done.returncode}")
    return done.stdout


def _add_worktree(repo: Path, commit: str, folder: Path) -> None:
    git(repo, "worktree", "add", "--detach", "--force", str(folder), commit)
    committed = int(git(repo, "log", "-1", "--format=%ct", commit))
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (committed, committed))


def _checkout_files(repo: Path) -> list[Path]:
    """What belongs to a checkout, relative to it: everything that git does not ignore."""
    listed = _git(repo, ("ls-files", "-z", "--cached", "--others", "--exclude-standard")).split(b"\0")
    paths = sorted({Path(os.fsdecode(name)) for name in listed if name})
    return [path for path in paths if (repo / path).is_file()]  # else deleted, or a submodule


def _content_key(repo: Path) -> str:
    digest = hashlib.sha256()
    for path in _checkout_files(repo):
        content = (repo / path).read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return digest.hexdigest()[:KEY_LENGTH]


def _copy_checkout(repo: Path, folder: Path) -> None:
    for path in _checkout_files(repo):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repo / path, target)
