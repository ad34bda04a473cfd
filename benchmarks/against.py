"""Compare this checkout with another commit: both run the benchmarks, and the rows face each other.

    python -m benchmarks.against main benchmarks/bench_ipsa.py -k "stages and step"

The other commit is run from a worktree of its own, which is removed afterwards; what is named after
it goes to pytest. What has not been committed here is part of this checkout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of another commit.

    Raises:
        ValueError: git knows no such commit.
    """
    git = ["git", "-C", str(ROOT), "worktree"]
    with TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        added = subprocess.run(
            [*git, "add", "--quiet", "--detach", str(checkout), revision], check=False
        )
        if added.returncode:
            raise ValueError(f"cannot check out {revision!r}: name a commit of this repository")
        try:
            yield checkout
        finally:
            subprocess.run([*git, "remove", "--force", str(checkout)], check=True)


def run(checkout: Path, options: list[str]) -> dict[str, dict]:
    """What each benchmark of a checkout writes down (`harness.race`), by its full name.

    Raises:
        ValueError: a benchmark fails, or none is run.
    """
    with TemporaryDirectory() as folder:
        stored = Path(folder) / "run.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark"]
        # there pytest takes the package of the checkout, whatever is installed (pyproject.toml)
        finished = subprocess.run(
            [*command, f"--benchmark-json={stored}", *options], cwd=checkout, check=False
        )
        if finished.returncode:
            raise ValueError(f"the benchmarks of {checkout} failed: pytest says why, above")
        benchmarks = json.loads(stored.read_text())["benchmarks"]
    return {benchmark["fullname"]: benchmark["extra_info"] for benchmark in benchmarks}


def table(before: dict[str, dict], after: dict[str, dict]) -> Iterator[str]:
    """The benchmarks that both have run, as lines of Markdown.

    How much faster a row is, is the quotient of its speed-ups over the official operations, which
    each run timed in turn with it: the device's own changes are no part of it.
    """
    yield "| benchmark | before | after | faster | the official operations |"
    yield "|---|---|---|---|---|"
    for name in [name for name in before if name in after]:
        old, new = before[name], after[name]
        if "speedup" not in old or "speedup" not in new or new["provider"] == "official":
            continue
        row = (new[key] for key in ("operation", "name", "dtype", "direction", "provider"))
        faster = f"{new['speedup'] / old['speedup']:.2f}x"
        if old["void"] or new["void"]:
            faster = "void: too noisy"
        times = (f"{run['contender_ms']:.3g} ms" for run in (old, new))
        drift = f"{old['official_ms'] / new['official_ms']:.2f}x"
        yield f"| {' | '.join([' '.join(row), *times, faster, drift])} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("revision", help="the commit to compare with: main, HEAD~1, ...")
    options, for_pytest = parser.parse_known_args(arguments)
    try:
        with worktree(options.revision) as checkout:
            before = run(checkout, for_pytest)
        after = run(ROOT, for_pytest)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(table(before, after)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
