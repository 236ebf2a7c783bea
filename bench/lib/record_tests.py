"""A pytest plugin: a record per test as soon as it is done, and no test in a process whose context is lost.

After an illegal access every later CUDA call of the process fails. A worker of pytest-xdist ends there, and
another takes over what it had left; elsewhere the process goes on, and its tests fail.
"""

import os
from pathlib import Path

import pytest

from bench.lib import records

LOST = ("illegal memory access", "illegal instruction", "misaligned address", "unspecified launch failure",
        "device-side assert", "CUDA_EXCEPTION", "launch timed out")  # fmt: skip
lost = pytest.StashKey()


class Recorder:
    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":  # a set-up that went well is no test
            name = report.nodeid.removeprefix("python_tests/")
            records.append(
                self.path, "tests", "test", test=name, outcome=report.outcome, when=report.when,
                seconds=round(report.duration, 2), reason=reason(report) if report.failed else "",
            )  # fmt: skip


def reason(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longreprtext
    return (text.strip().splitlines() or ["no message"])[0][:300]


def pytest_configure(config):
    path = os.environ.get("RIVER_RECORDS")
    if path and not hasattr(config, "workerinput"):  # workers report to the process that started them
        config.pluginmanager.register(Recorder(Path(path)), "record_tests.Recorder")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and any(text in report.longreprtext for text in LOST):
        item.stash[lost] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    done = yield  # its reports are on their way by now
    if lost in item.stash and hasattr(item.config, "workerinput"):
        os._exit(1)
    return done
