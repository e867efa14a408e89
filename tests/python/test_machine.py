"""A test without its tool is skipped with a message, or fails if the run expects the tool."""

import os
import subprocess
import sys

import pytest
from conftest import embedded
from running_service import ROOT

pytestmark = embedded

TESTS = """
import machine

def test_that_runs():
    pass

def test_that_needs_a_proxy():
    machine.missing("haproxy", "there is no apt-get here")

def test_that_needs_a_browser():
    machine.missing("chromium", "there is no apt-get here")
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "test_them.py").write_text(TESTS)

    def run(expected, *arguments):
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests/tools'}:{os.environ.get('PYTHONPATH', '')}", "EXPECT_TOOLS": expected}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "machine", "-p", "no:cacheprovider", *arguments, tmp_path]
        return subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)

    return run


def test_skipped_tests_are_listed_before_the_last_line(run):
    done = run("")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1].startswith("1 passed, 2 skipped")
    assert lines[-3:-1] == [
        "skipped: 1 test, because chromium is missing: there is no apt-get here",
        "skipped: 1 test, because haproxy is missing: there is no apt-get here",
    ]
    assert "skipped: nothing" in run("", "-k", "runs").stdout


def test_an_expected_tool_must_not_be_missing(run):
    done = run("haproxy, promtool")
    assert done.returncode == 1 and "1 failed, 1 passed, 1 skipped" in done.stdout
    assert "EXPECT_TOOLS names it, but haproxy is missing: there is no apt-get here" in done.stdout


def test_an_expected_name_that_no_test_knows_is_refused(run):
    done = run("haproxi")
    assert done.returncode == 4 and "EXPECT_TOOLS: unknown: haproxi; known: " in done.stderr
