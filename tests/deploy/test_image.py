"""The Dockerfile: linted, and compared with the project that it builds."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, run, tool

DOCKERFILE = (ROOT / "Dockerfile").read_text()
MANIFEST = tomllib.loads((ROOT / "Cargo.toml").read_text())


def instructions():
    """The Dockerfile's instructions: (word, rest), continued lines joined, comments left out."""
    lines = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def sent_to_the_builder():
    """The paths that .dockerignore allows."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*" and all(line.startswith("!") for line in lines[1:]), "everything is left out but what is named"
    return [line[1:] for line in lines[1:]]


def test_hadolint_finds_nothing():
    run(tool("hadolint"), "--failure-threshold", "style", "Dockerfile")


def test_the_toolchain_is_the_one_that_the_project_asks_for():
    [image] = re.findall(r"^FROM rust:([0-9.]+)-slim-", DOCKERFILE, re.MULTILINE)
    assert image.rsplit(".", 1)[0] == MANIFEST["package"]["rust-version"]


def test_the_image_is_built_as_the_project_is():
    [step] = [rest for word, rest in instructions() if word == "RUN"]
    plan = run("make", "--dry-run", "build", env={**os.environ, "CARGO": "cargo"}).stdout
    [built] = re.findall(r"^cargo build .*$", plan, re.MULTILINE)
    assert f"{built} --bin prompt-service" in step


def test_every_file_that_the_sources_include_is_sent_to_the_builder():
    allowed = [ROOT / name for name in sent_to_the_builder()]
    assert all(path.exists() for path in allowed)

    def is_sent(path):
        return any(path == allowed_path or allowed_path in path.parents for allowed_path in allowed)

    taken_in = {ROOT / "Cargo.lock", *(ROOT / target.get("path", f"benches/{target['name']}") for target in MANIFEST["bench"])}
    for source in (ROOT / "src").rglob("*.rs"):
        for name in re.findall(r"include_(?:str|bytes)!\(\s*\"([^\"]+)\"", source.read_text()):
            taken_in.add((source.parent / name).resolve())
    assert len(taken_in) > 5
    assert [path for path in taken_in if not is_sent(path)] == []


def test_the_files_sent_to_the_builder_are_enough_for_the_manifest(tmp_path):
    files = run("git", "ls-files", *sent_to_the_builder()).stdout.splitlines()
    for name in files:
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(ROOT / name)
    # Fails if a target that the manifest names, such as a bench, has no file.
    made = subprocess.run(
        ["cargo", "metadata", "--no-deps", "--offline", "--format-version=1"], cwd=tmp_path, text=True, capture_output=True
    )
    assert made.returncode == 0, made.stderr


def test_the_image_runs_as_a_number_with_its_data_in_a_volume_and_nothing_else_in_it():
    last = instructions()[[word for word, _ in instructions()].index("FROM", 1) :]
    assert last[0] == ("FROM", "scratch")
    settings = dict(last[1:])
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", settings["USER"])
    assert settings["VOLUME"] == "/data"
    assert settings["ENTRYPOINT"] == '["/prompt-service"]'
    # In the form without a shell.
    assert re.search(r'CMD \["/prompt-service", "health"\]', settings["HEALTHCHECK"])
    environment = dict(re.findall(r"([A-Z_]+)=(\S+)", settings["ENV"]))
    assert environment["BIND_ADDR"] == "0.0.0.0:8000" and environment["SHUTDOWN_DELAY"] == "5s"
    copied = [rest for word, rest in last if word == "COPY"]
    assert copied and all("--from=build" in rest for rest in copied)


@pytest.mark.parametrize("name", ["no such program", "a text"])
def test_a_root_file_system_is_not_built_from_a_file_that_is_no_program(tmp_path, name):
    text = tmp_path / "a text"
    text.write_text("not a program\n")
    made = subprocess.run([ROOT / "deploy/image/make_root.sh", tmp_path / name, tmp_path / "image"], capture_output=True, text=True)
    assert made.returncode != 0, made.stdout


def test_the_data_folder_of_the_image_belongs_to_its_user():
    assert Path(ROOT / "deploy/image/make_root.sh").stat().st_mode & 0o111, "the builder runs it"
    assert "--chown=65532:65532 /image/data/ /data/" in DOCKERFILE
