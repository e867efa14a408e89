"""Reads docker-compose.yml like Docker Compose, as far as the tests need it to run the same without
containers. Needs PyYAML."""

import re

import yaml
from running_service import ROOT

FILE = "docker-compose.yml"


def services(name=FILE):
    return yaml.safe_load((ROOT / name).read_text())["services"]


def filled_in(text, variables):
    """A value of the file with its variables: `${NAME:-default}`; `$$` is a dollar sign for the
    container."""
    def value(found):
        if found[0] == "$$":
            return "$"
        name, default = re.fullmatch(r"\$\{(\w+)(?::-(.*))?\}", found[0]).groups()
        return variables.get(name) or default or ""

    return re.sub(r"\$\$|\$\{[^}]*\}", value, text)


def environment(service, dotenv):
    """The variables of a container of the service, with `dotenv` as `.env`; variables that the
    service itself names win."""
    given = dict(dotenv) if {"path": ".env", "required": False} in service.get("env_file", []) else {}
    return given | {name: filled_in(str(value), dotenv) for name, value in service.get("environment", {}).items()}


def command(service):
    return [filled_in(word, {}) for word in service["command"]]
