"""Rules for valid requests that a schema cannot express, for the requests that schemathesis
generates."""

import unicodedata
import uuid

import schemathesis

FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


@schemathesis.hook
def before_load_schema(context, raw_schema):
    # With a relative address, schemathesis 4.32.5 reports query parameters that the schema allows
    # as accepted violations.
    assert raw_schema["servers"] == [{"url": "./"}]
    raw_schema["servers"] = [{"url": "/"}]
    # The description says only in words that forms are accepted too. If each route named them, a
    # generated client would have three classes for each body.
    for path, item in raw_schema["paths"].items():
        if path.startswith(("/api/keys", "/v1/")):
            continue  # JSON alone
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
        # A name can be registered once, so the same body is valid only once. Each request gets a
        # new name, followed by as much of the generated one as fits into 150 characters.
        case.body = {**case.body, "username": (uuid.uuid4().hex + case.body["username"])[:150]}
    if operation == "create_prompt" and isinstance(case.body, dict):
        # No NUL. A pattern for it too, beside the length, makes schemathesis take eight times as
        # long.
        case.body = {**case.body, "prompt": case.body["prompt"].replace("\0", "x")}
    if operation in ("create_prompt", "create_chat_completion") and "Idempotency-Key" in (case.headers or {}):
        # A key belongs to one body; another body with the same key is refused. So each request gets
        # a new key, which ends with the generated one.
        case.headers["Idempotency-Key"] = (uuid.uuid4().hex + case.headers["Idempotency-Key"])[:255]
    if operation in ("create_key", "change_key") and isinstance(case.body, dict):
        # No control characters, an end in the future, and a period only of a budget.
        body = dict(case.body)
        if body.get("name"):
            body["name"] = "".join("x" if has_control_character(character) else character for character in body["name"])
        if body.get("expires_at"):
            body["expires_at"] = "2036-11-22T21:08:49Z"
        if body.get("budget_usd") is None:
            body.pop("budget_period", None)
        case.body = body
    if operation == "create_chat_completion" and isinstance(case.body, dict):
        # No control characters in the name of a model, which has at most 200 bytes.
        name = "".join(character for character in case.body["model"] if not has_control_character(character))
        case.body = {**case.body, "model": name.encode()[:200].decode(errors="ignore") or "m"}
    if operation in ("list_chat_completions", "list_chat_messages"):
        # Only the id of something that is stored can be named.
        case.query.pop("after", None)
    if operation == "show_usage":
        # The end is not before the beginning, and both are days that there may be rows of.
        case.query.pop("from", None)
        case.query.pop("to", None)
    if operation == "list_prompts":
        # A cursor is the `next` of a page; a client cannot invent one.
        case.query.pop("cursor", None)
    if operation == "find_similar" and not (case.query.get("q") or case.query.get("prompt")):
        # One of the two is enough, and OpenAPI cannot express "one of two parameters".
        case.query["q"] = "hello"
    if case.media_type == "multipart/form-data" and isinstance(case.body, dict):
        # A field's name is in a header of its part, where a control character is malformed.
        case.body = {name: value for name, value in case.body.items() if not has_control_character(name)}


def has_control_character(text):
    return any(unicodedata.category(character) == "Cc" for character in text)
