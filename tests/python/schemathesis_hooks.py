"""What a schema cannot say about the well-formed requests that schemathesis generates."""

import unicodedata
import uuid

import schemathesis

FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


@schemathesis.hook
def before_load_schema(context, raw_schema):
    # With a relative address here schemathesis 4.32.5 reports query parameters that the schema
    # allows as accepted violations.
    assert raw_schema["servers"] == [{"url": "./"}]
    raw_schema["servers"] = [{"url": "/"}]
    # The description says in words that forms are accepted too: named for each route, a generated
    # client has three classes for each body.
    for item in raw_schema["paths"].values():
        for operation in item.values():
            content = operation.get("requestBody", {}).get("content", {})
            described = next(iter(content.values()), None)
            content.update({form: described for form in FORMS if described})


@schemathesis.hook
def before_call(context, case, kwargs):
    if not case.meta.generation.mode.is_positive:
        return
    operation = case.operation.definition.raw["operationId"]
    if operation == "register" and isinstance(case.body, dict):
        # A name is taken once, so the same body is right only once: each gets a name of its own, followed by as much of
        # the generated one as fits into 150 characters.
        case.body = {**case.body, "username": (uuid.uuid4().hex + case.body["username"])[:150]}
    if operation == "create_prompt" and isinstance(case.body, dict):
        # No NUL. A pattern for it too, beside the length, makes schemathesis take eight times as long.
        case.body = {**case.body, "prompt": case.body["prompt"].replace("\0", "x")}
    if operation == "create_prompt" and "Idempotency-Key" in (case.headers or {}):
        # A key stands for one body: another with the same key is refused. Each request gets a key of its own, the generated one's end.
        case.headers["Idempotency-Key"] = (uuid.uuid4().hex + case.headers["Idempotency-Key"])[:255]
    if operation == "list_prompts":
        # A cursor is the `next` of a page; nobody can make one up.
        case.query.pop("cursor", None)
    if operation == "find_similar" and not (case.query.get("q") or case.query.get("prompt")):
        # Either will do, and OpenAPI has no word for "one of two parameters".
        case.query["q"] = "hello"
    if case.media_type == "multipart/form-data" and isinstance(case.body, dict):
        # A field's name stands in a header of its part, where a control character is malformed.
        case.body = {name: value for name, value in case.body.items() if not has_control_character(name)}


def has_control_character(text):
    return any(unicodedata.category(character) == "Cc" for character in text)
