"""Runs the tests that compare with transformers on other versions of it.

    python tools/compat.py VERSION [VERSION ...] [-- ARGUMENTS OF PYTEST]

Each version has an environment of its own in ``.venvs``, on top of the one that runs this: it holds transformers and
what that needs in another version than is installed; torch and the rest come from below. ``make test-compat`` uses it.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import version as installed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ("-m", "pytest", "-n", "auto", "--dist", "loadfile", "-m", "not slow and not real")
TESTS = ("tests/integrations", "tests/generation", "tests/model")
WITH_IT = ("peft", "accelerate")  # tests use them with transformers; resolved again, since its versions bound theirs
KEPT = ("torch", "numpy")  # an environment never gets its own


def environment(version: str) -> Path:
    """Return the Python that has this version of transformers, made where there is none yet.

    Raises:
        CalledProcessError: the package index does not have it, or does not answer.
    """
    folder = ROOT / ".venvs" / f"transformers-{version}"
    python, done = folder / "bin" / "python", folder / "installed"
    below = Path(sysconfig.get_path("purelib"))
    if done.exists() and done.stat().st_mtime > below.stat().st_mtime:  # else packages have come or gone below
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "below.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n")
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={installed(name)}\n" for name in KEPT))
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "-c", constraints, f"transformers=={version}", *WITH_IT], check=True)
    done.touch()
    return python


def main(arguments: list[str]) -> int:
    """Run the tests on each version; the exit status is 1 if they fail on any."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    versions, options = arguments[:cut], arguments[cut + 1 :]
    results = {}
    for version in versions:
        print(f"---- transformers {version}", flush=True)
        try:
            python = environment(version)
            done = subprocess.run([python, *PYTEST, *TESTS, *options], cwd=ROOT, check=False)
            results[version] = "failed" if done.returncode else "passed"
        except subprocess.CalledProcessError:  # pip has said why
            results[version] = "could not be installed"
    for version, result in results.items():
        print(f"transformers {version}: {result}")
    return int(set(results.values()) != {"passed"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
