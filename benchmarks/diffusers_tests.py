"""diffusers' own tests of its schedulers, run on ours: how many pass, file by file.

The tests are not part of this project. Get diffusers' repository (`git clone --depth 1
https://github.com/huggingface/diffusers`), and:

    python benchmarks/diffusers_tests.py DIFFUSERS [--theirs] [--failures]

The names of the sixteen schedulers in the `diffusers` module are made to mean the classes of `sdedit`, before any test
is imported; then pytest runs the files that concern them. What those tests need besides is `diffusers` as it is
installed. `--theirs` runs the same tests on diffusers itself, for the number there are.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

import diffusers
import pytest

from sdedit import schedulers
from sdedit.schedulers.names import CLASS_NAMES

# The test file of each class, in tests/schedulers.
FILES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "LMSDiscreteScheduler": "lms",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "kdpm2_discrete",
    "KDPM2AncestralDiscreteScheduler": "kdpm2_ancestral",
    "DPMSolverSDEScheduler": "dpm_sde",
    "DPMSolverMultistepScheduler": "dpm_multi",
    "DPMSolverSinglestepScheduler": "dpm_single",
    "DEISMultistepScheduler": "deis",
    "UniPCMultistepScheduler": "unipc",
}


class Count:
    """A pytest plugin that counts outcomes by file."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test that ran, or that was skipped or broke before it ran."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self.outcomes[Path(report.fspath).stem, report.outcome] += 1
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                reason = crash.message.splitlines()[0] if crash else ""
                self.failures.append(f"{report.nodeid.split('/')[-1]}: {reason}")


def main() -> None:
    """Run the tests and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="folder of diffusers' repository")
    parser.add_argument("--theirs", action="store_true", help="run on diffusers' classes")
    parser.add_argument("--failures", action="store_true", help="name the tests that fail, and say why")
    parser.add_argument("--only", nargs="*", default=CLASS_NAMES, help="names of classes")
    arguments = parser.parse_args()
    if not arguments.theirs:
        for name in CLASS_NAMES:
            setattr(diffusers, name, getattr(schedulers, name))
    os.chdir(arguments.checkout)
    files = [f"tests/schedulers/test_scheduler_{FILES[name]}.py" for name in arguments.only]
    count = Count()
    pytest.main(["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", *files], plugins=[count])
    total = Counter(outcome for _, outcome in count.outcomes.elements())
    print(f"\ndiffusers {diffusers.__version__}\n{'file':34} passed failed skipped")
    for file in sorted({file for file, _ in count.outcomes}):
        print(f"{file:34} " + " ".join(f"{count.outcomes[file, o]:6}" for o in ("passed", "failed", "skipped")))
    print(f"{'all':34} " + " ".join(f"{total[o]:6}" for o in ("passed", "failed", "skipped")))
    if arguments.failures:
        print("\n".join(count.failures))
    sys.exit(bool(total["failed"]))


if __name__ == "__main__":
    main()
