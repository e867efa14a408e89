"""The scripted upstream itself: what it makes of the schemas that clients send is valid by them."""

import jsonschema
import openai_answers
import pytest

PERSON = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "friends"],
    "properties": {
        "name": {"type": "string", "minLength": 30, "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 9},
        "friends": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    },
}
SCHEMAS = [
    {}, {"type": "object"}, PERSON, {"enum": ["a", "b"]}, {"const": 7}, {"type": ["string", "null"], "format": "uuid"},
    {"type": "array", "items": {"type": "number", "multipleOf": 0.5, "maximum": 2}, "minItems": 3},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}]},
    {"$defs": {"a": {"properties": {"x": {"type": "integer"}}, "required": ["x"]}}, "type": "object", "allOf": [{"$ref": "#/$defs/a"}, {"required": ["y"], "properties": {"y": {"type": "boolean"}}}]},
    {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 100}]},
    {"$defs": {"node": {"type": "object", "required": ["next"], "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}}, "$ref": "#/$defs/node"},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: ",".join(schema) or "any")
def test_an_instance_of_a_schema_is_valid(schema):
    value = openai_answers.instance(schema, schema, openai_answers.Hints("Is 'Ann' 42?"))
    jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())


def test_the_pieces_of_a_text_are_the_text():
    for text in ("", " a  b\n\nc ", "你好 “x”", "one"):
        assert "".join(openai_answers.pieces_of(text)) == text
