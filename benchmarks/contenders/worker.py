"""The process in which a contender runs, started by path: another library, another revision, empty caches.

It talks in JSON, one object a line: the job comes first, ``{"ready": info}`` answers it, then each workload is answered
with a decode or ``{"error": "..."}``. What libraries print goes to stderr. A worktree that is measured has a
``benchmarks`` of its own, so this file loads the package it lies in under a name that nothing else has; it imports no
more of it than its contender needs, so its start takes as long as a user's own script.
"""

import gc
import importlib
import importlib.util
import json
import os
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

PACKAGE = "fastllama_benchmarks_of_the_worker"
HERE = Path(__file__).resolve().parent
NEEDED = ("from_pretrained", "stream", "generate")


def main() -> None:
    """Serve decodes until stdin closes."""
    started = time.time()
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]  # no top-level modules
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    job = json.loads(sys.stdin.readline())
    load_own_package()
    workload = importlib.import_module(f"{PACKAGE}.workload")
    if job["tree"]:
        check_tree(Path(job["tree"]))
    contender, info = open_contender(job, started, workload.Unavailable)

    def run(prompts: Any, **sizes: Any) -> Any:
        return contender.run(workload.Workload(tuple(map(tuple, prompts)), **sizes))

    for request in job["warm_up"]:
        run(**request)
    gc.collect()
    gc.freeze()  # so that a collection while a decode is timed has little to look at
    say({"ready": info})
    for line in sys.stdin:
        try:
            say(asdict(run(**json.loads(line))))
        except Exception as error:
            say({"error": workload.reason(error)})


def load_own_package() -> None:
    """Import the package that this file lies in, whatever ``sys.path`` says."""
    root = HERE.parent
    spec_from: Any = importlib.util.spec_from_file_location
    spec = spec_from(PACKAGE, root / "__init__.py", submodule_search_locations=[str(root)])
    sys.modules[PACKAGE] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def open_contender(job: dict[str, Any], started: float, unavailable: type[Exception]) -> tuple[Any, dict[str, Any]]:
    """Load the job's contender; what it says of itself has the seconds of its start, phase by phase."""
    contenders = importlib.import_module(f"{PACKAGE}.contenders")
    task, times = contenders.Task(**job["task"]), [job["spawned"], started]
    try:
        import torch

        if task.threads:
            torch.set_num_threads(task.threads)
        contender = contenders.make(job["contender"])
        times.append(time.time())
        contender.load(task)
        is_cuda = task.device.startswith("cuda")
        if is_cuda:
            torch.cuda.synchronize()
    except (unavailable, ValueError, NotImplementedError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
    times.append(time.time())
    spans = (after - before for before, after in pairwise(times))
    return contender, contender.info | {
        "device": torch.cuda.get_device_name(task.device) if is_cuda else "cpu",
        "device_type": "cuda" if is_cuda else "cpu",
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "phases": dict(zip(("interpreter", "import", "load"), spans, strict=True)),
    }


def check_tree(tree: Path) -> None:
    """Exit with one line unless ``fastllama`` is this worktree's and can do what is measured."""
    try:
        import fastllama
    except ModuleNotFoundError as error:
        if error.name == "fastllama":
            sys.exit("it has no package fastllama")
        sys.exit(f"its fastllama cannot be imported: {error}; its dependencies must be installed")
    origin = Path(fastllama.__file__ or "nowhere").resolve()
    if not origin.is_relative_to(tree.resolve()):
        sys.exit(f"it has no package fastllama (the environment's own is {origin.parent})")
    model_class = getattr(fastllama, "LlamaForCausalLM", None)
    if lacking := [name for name in NEEDED if not hasattr(model_class, name)]:
        sys.exit(f"its fastllama predates what is measured: LlamaForCausalLM has no {', '.join(lacking)}")


if __name__ == "__main__":
    main()
