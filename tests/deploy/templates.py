"""CloudFormation templates as data: reads their short forms, and computes their values as far as a
test knows them."""

import re

import yaml
from conftest import ROOT

FOLDER = ROOT / "deploy" / "aws"
NAMES = ["base", "data", "service", "github"]
ACCOUNT, REGION = "123456789012", "eu-central-1"


class Loader(yaml.SafeLoader):
    """YAML with CloudFormation's tags: `!Sub x` is `{"Fn::Sub": x}`, as in the long form."""


def tagged(loader, suffix, node):
    kinds = {yaml.ScalarNode: loader.construct_scalar, yaml.SequenceNode: loader.construct_sequence, yaml.MappingNode: loader.construct_mapping}
    build = kinds[type(node)]
    value = build(node) if isinstance(node, yaml.ScalarNode) else build(node, deep=True)
    if suffix == "GetAtt" and isinstance(value, str):
        value = value.split(".", 1)
    return {suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}": value}


Loader.add_multi_constructor("!", tagged)


def text(name):
    return (FOLDER / f"{name}.yaml").read_text()


def load(name):
    return yaml.load(text(name), Loader)


def resources(name, kind):
    """The resources of a type in a template, by name."""
    return {key: value for key, value in load(name)["Resources"].items() if value["Type"] == kind}


class Values:
    """Computes the values of one template from its parameters' defaults, exports of other stacks,
    and names of created resources."""

    def __init__(self, template, stack, exports, made=None):
        self.template = template
        self.exports = exports
        self.known = {"AWS::StackName": stack, "AWS::Region": REGION, "AWS::AccountId": ACCOUNT, "AWS::Partition": "aws"}
        self.known |= {name: parameter["Default"] for name, parameter in template["Parameters"].items() if "Default" in parameter}
        self.known |= made or {}

    def name(self, key):
        # A resource or attribute that this test has not created is represented by its name.
        return self.known.get(key, key.replace(".", "-"))

    def sub(self, text):
        return re.sub(r"\$\{([^}!]+)\}", lambda found: str(self.name(found[1])), text)

    def of(self, value):
        if isinstance(value, list):
            return [item for item in map(self.of, value) if item is not None]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            [(function, argument)] = value.items()
            match function:
                case "Ref":
                    return None if argument == "AWS::NoValue" else self.name(argument)
                case "Fn::Sub":
                    return self.sub(argument)
                case "Fn::GetAtt":
                    return self.name(".".join(argument))
                case "Fn::ImportValue":
                    return self.exports[self.of(argument)]
                case "Fn::Split":
                    return self.of(argument[1]).split(argument[0])
        return {key: self.of(item) for key, item in value.items()}
