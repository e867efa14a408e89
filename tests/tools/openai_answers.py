"""What the scripted upstream of tests/tools/openai_upstream.py answers: chat completions, whole and
in chunks, and embeddings, with all members that OpenAI's schema requires. Standard library only.

An answer follows from its request alone. Its text repeats the beginning of the last user message.
"""

import base64
import hashlib
import itertools
import json
import math
import re
import struct

# Models with these in their name think, and say how many tokens that took.
THINKING = re.compile(r"(?:^|[-/])(?:o[134]|gpt-[56]|deepseek-r|thinking)")
# Tokens of thought, and what they say where a model shows them.
THOUGHT = "First the question, then what is known of it, then the answer."
# The tokens that a part of a message counts for, if it is not text.
PART_TOKENS = {"image_url": 85, "input_audio": 50, "file": 120}
# Beyond this depth an instance of a schema has only what is required, so that one that refers to
# itself comes to an end.
FULL_DEPTH = 4
DIMENSIONS = 384


def text_of(content):
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "\n".join(part if isinstance(part, str) else str(part.get("text") or part.get("refusal") or "") for part in content)


def last_text(messages, role="user"):
    """The text of the last message of a role; empty if there is none."""
    return next((text_of(message.get("content")) for message in reversed(messages) if message.get("role") == role), "")


def count(text):
    """A number of tokens: words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def pieces_of(text):
    """The tokens of an answer; together they are the text."""
    return re.findall(r"\S+\s*|\s+", text)


def prompt_tokens(request):
    """The tokens of a request's messages and tools."""
    total = 0
    for message in request["messages"]:
        content = message.get("content")
        total += 4 + count(text_of(content)) + count(json.dumps(message.get("tool_calls") or ""))
        if isinstance(content, list):
            total += sum(PART_TOKENS.get(part.get("type"), 0) for part in content if isinstance(part, dict))
    return total + count(json.dumps(request.get("tools") or request.get("functions") or ""))


class Hints:
    """Values that an instance of a schema takes from the user's text: its numbers and its quoted
    words, in their order."""

    def __init__(self, text):
        self.numbers = iter([float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)])
        self.words = iter(re.findall(r"(?<!\w)['\"“«`]([^'\"”»`]+)['\"”»`]", text))
        self.text = " ".join(text.split())[:80] or "nothing"

    def number(self):
        return next(self.numbers, None)

    def word(self):
        return next(self.words, self.text)


FORMATS = {
    "date": "2026-01-31", "date-time": "2026-01-31T12:00:00Z", "time": "12:00:00Z", "duration": "P1D",
    "email": "someone@example.org", "hostname": "example.org", "ipv4": "192.0.2.1", "ipv6": "2001:db8::1",
    "uri": "https://example.org/", "uuid": "123e4567-e89b-42d3-a456-426614174000",
}


def instance(schema, root, hints, depth=0):
    """A value that is valid by a JSON schema of the kind that clients send. `pattern` and
    conditions are not followed."""
    if schema is True or not schema:
        return hints.word()
    if "$ref" in schema:
        return instance(referred(schema, root), root, hints, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for several in ("anyOf", "oneOf"):
        if several in schema:
            options = [option for option in schema[several] if option.get("type") != "null"]
            if depth > FULL_DEPTH and len(options) < len(schema[several]):
                return None
            return instance(options[0] if options else {"type": "null"}, root, hints, depth + 1)
    if "allOf" in schema:
        merged = {name: value for name, value in schema.items() if name != "allOf"}
        for part in schema["allOf"]:
            part = referred(part, root)
            merged = {**merged, **part, "properties": {**merged.get("properties", {}), **part.get("properties", {})},
                      "required": [*merged.get("required", []), *part.get("required", [])]}
        return instance(merged, root, hints, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")
    return KINDS[kind](schema, root, hints, depth)


def referred(schema, root):
    """A schema with what it refers to in its place."""
    if "$ref" not in schema:
        return schema
    found = root
    for name in schema["$ref"].removeprefix("#").strip("/").split("/"):
        found = found[name] if name else found
    return {**found, **{name: value for name, value in schema.items() if name != "$ref"}}


def an_object(schema, root, hints, depth):
    required = schema.get("required", [])
    properties = schema.get("properties", {})
    return {name: instance(value, root, hints, depth + 1) for name, value in properties.items() if depth <= FULL_DEPTH or name in required}


def an_array(schema, root, hints, depth):
    if "prefixItems" in schema:
        return [instance(item, root, hints, depth + 1) for item in schema["prefixItems"]]
    length = schema.get("minItems", 0 if depth > FULL_DEPTH else 1)
    return [instance(schema.get("items", True), root, hints, depth + 1) for _ in range(length)]


def a_number(schema, hints, step):
    low = schema.get("minimum", schema.get("exclusiveMinimum", -math.inf) + step)
    high = schema.get("maximum", schema.get("exclusiveMaximum", math.inf) - step)
    value = hints.number()
    value = min(max(1 if value is None else value, low), high)
    multiple = schema.get("multipleOf")
    return math.ceil(value / multiple) * multiple if multiple else value


def a_string(schema, hints):
    text = FORMATS.get(schema.get("format")) or hints.word()
    return text.ljust(schema.get("minLength", 0), ".")[: schema.get("maxLength")]


KINDS = {
    "object": an_object,
    "array": an_array,
    "string": lambda schema, root, hints, depth: a_string(schema, hints),
    "integer": lambda schema, root, hints, depth: int(a_number(schema, hints, 1)),
    "number": lambda schema, root, hints, depth: float(a_number(schema, hints, 0.5)),
    "boolean": lambda schema, root, hints, depth: True,
    "null": lambda schema, root, hints, depth: None,
}


def wanted_tools(request):
    """The tools that the answer calls, and the reason with which it then ends; no tools where it is
    a text."""
    tools, choice = request.get("tools") or [], request.get("tool_choice") or "auto"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice["allowed_tools"]
        names = {tool.get("function", tool)["name"] for tool in allowed["tools"]}
        tools = [tool for tool in tools if tool.get("function", tool.get("custom", {})).get("name") in names]
        choice = allowed["mode"]
    if isinstance(choice, dict):
        name = choice[choice["type"]]["name"]
        # OpenAI says `stop` where the one tool was prescribed.
        return [tool for tool in tools if tool[tool["type"]]["name"] == name], "stop"
    has_result = request["messages"][-1].get("role") in ("tool", "function")
    if not tools or choice == "none" or (choice == "auto" and has_result):
        return [], "stop"
    # All tools at once where the user asks for both or all of something.
    is_parallel = request.get("parallel_tool_calls") is not False and re.search(r"\b(?:both|all|each)\b", last_text(request["messages"]), re.IGNORECASE)
    return (tools if is_parallel else tools[:1]), "tool_calls"


def tool_calls(tools, request, salt):
    """Calls of these tools with arguments that suit their schemas."""
    calls = []
    for number, tool in enumerate(tools):
        hints = Hints(last_text(request["messages"]))
        call = {"id": f"call_{hashlib.sha256(f'{salt}/{number}'.encode()).hexdigest()[:24]}", "type": tool["type"]}
        if tool["type"] == "custom":
            call["custom"] = {"name": tool["custom"]["name"], "input": hints.word()}
        else:
            schema = tool["function"].get("parameters") or {"type": "object", "properties": {}}
            arguments = json.dumps(instance(schema, schema, hints), ensure_ascii=False)
            call["function"] = {"name": tool["function"]["name"], "arguments": arguments}
        calls.append(call)
    return calls


def answer_text(request):
    """The text of an answer without tool calls."""
    asked = last_text(request["messages"]) or last_text(request["messages"], "developer")
    form = request.get("response_format") or {}
    if form.get("type") == "json_schema":
        schema = form["json_schema"].get("schema") or {"type": "object"}
        return json.dumps(instance(schema, schema, Hints(asked)), ensure_ascii=False)
    if form.get("type") == "json_object":
        names = list(Hints(asked).words)
        return json.dumps({name: f"The {name}." for name in names} or {"answer": Hints(asked).text}, ensure_ascii=False)
    if request["messages"][-1].get("role") in ("tool", "function"):
        return f"The tool said: {' '.join(text_of(request['messages'][-1].get('content')).split())[:200]}"
    return f"The answer to “{' '.join(asked.split())[:200]}” is this: one, two, three, four, five."


class Choice:
    """One choice of an answer."""

    def __init__(self, request, index, salt):
        self.index, self.calls, self.function_call = index, [], None
        tools, self.finish_reason = wanted_tools(request)
        functions, wanted = request.get("functions") or [], request.get("function_call") or "auto"
        text = ""
        if tools:
            self.calls = tool_calls(tools, request, f"{salt}/{index}")
        elif functions and wanted != "none" and request["messages"][-1].get("role") != "function":
            name = wanted["name"] if isinstance(wanted, dict) else functions[0]["name"]
            function = next(one for one in functions if one["name"] == name)
            [call] = tool_calls([{"type": "function", "function": function}], request, salt)
            self.function_call, self.finish_reason = call["function"], "function_call"
        else:
            text = answer_text(request) + (f" ({index})" if index else "")
        stops = request.get("stop") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.partition(stop)[0]
        self.pieces = pieces_of(text)
        most = next((request[name] for name in ("max_completion_tokens", "max_tokens") if request.get(name) is not None), None)
        if most is not None and most < len(self.pieces):
            self.pieces, self.finish_reason = self.pieces[:most], "length"
        self.top_logprobs = (request.get("top_logprobs") or 0) if request.get("logprobs") else None

    @property
    def text(self):
        return "".join(self.pieces)

    @property
    def has_text(self):
        return not self.calls and not self.function_call

    def tokens(self):
        calls = sum(count(json.dumps(call)) for call in [*self.calls, self.function_call] if call)
        return len(self.pieces) + calls

    def logprobs(self, pieces):
        """The log probabilities of some pieces; None if they were not asked for."""
        if self.top_logprobs is None:
            return None
        content = []
        for piece in pieces:
            one = {"token": piece, "logprob": -0.25, "bytes": list(piece.encode())}
            others = [{"token": f"{piece}{rank}", "logprob": -0.25 - rank, "bytes": None} for rank in range(1, self.top_logprobs)]
            content.append({**one, "top_logprobs": [one, *others][: self.top_logprobs]})
        return {"content": content, "refusal": None}


class Answer:
    """The answer to one chat completion, to be sent whole or in chunks."""

    def __init__(self, request, identifier, created):
        self.request = request
        model = request["model"]
        self.choices = [Choice(request, index, identifier) for index in range(request.get("n") or 1)]
        # The dated name behind an alias, as OpenAI answers with it.
        answering = f"{model}-2026-01-31" if model.startswith("dated-") else model
        self.head = {"id": identifier, "created": created, "model": answering, "service_tier": "default", "system_fingerprint": "fp_scripted"}
        self.thought_name = "reasoning_content" if "deepseek-r" in model else "reasoning" if "thinking" in model else None
        thinks = THINKING.search(model) and request.get("reasoning_effort") != "none"
        self.thought = pieces_of(THOUGHT) if thinks else []
        asked, said = prompt_tokens(request), sum(choice.tokens() for choice in self.choices)
        said += len(self.thought) * len(self.choices)
        written = asked // 5 if "cache-write" in model else 0
        self.usage = {
            "prompt_tokens": asked,
            "completion_tokens": said,
            "total_tokens": asked + said,
            "prompt_tokens_details": {"cached_tokens": asked // 4, "audio_tokens": 0, "cache_write_tokens": written},
            "completion_tokens_details": {
                "reasoning_tokens": len(self.thought) * len(self.choices), "audio_tokens": 0,
                "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
            },
        }

    def whole(self):
        """The one object of an answer that is not streamed."""
        choices = []
        for choice in self.choices:
            message = {"role": "assistant", "content": choice.text if choice.has_text else None, "refusal": None, "annotations": []}
            if choice.calls:
                message["tool_calls"] = choice.calls
            if choice.function_call:
                message["function_call"] = choice.function_call
            if self.thought_name and self.thought:
                message[self.thought_name] = "".join(self.thought)
            choices.append({"index": choice.index, "message": message, "logprobs": choice.logprobs(choice.pieces), "finish_reason": choice.finish_reason})
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage}

    def chunk(self, choices, usage=None):
        options = self.request.get("stream_options") or {}
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": choices}
        if options.get("include_usage"):
            # In each chunk, as OpenAI sends it: null but in the last one.
            chunk["usage"] = usage
        if options.get("include_obfuscation"):
            chunk["obfuscation"] = "x7Yq"
        return chunk

    def deltas(self, choice):
        """The deltas of one choice, each with its log probabilities."""
        yield {"role": "assistant", "content": "" if choice.has_text else None, "refusal": None}, None
        if self.thought_name:
            for piece in self.thought:
                yield {self.thought_name: piece}, None
        for piece in choice.pieces:
            yield {"content": piece}, choice.logprobs([piece])
        for index, call in enumerate(choice.calls):
            kind, member = ("custom", "input") if call["type"] == "custom" else ("function", "arguments")
            begun = {"index": index, "id": call["id"], "type": kind, kind: {"name": call[kind]["name"], member: ""}}
            yield {"tool_calls": [begun]}, None
            for piece in pieces_of(call[kind][member]):
                yield {"tool_calls": [{"index": index, kind: {member: piece}}]}, None
        if choice.function_call:
            yield {"function_call": {"name": choice.function_call["name"], "arguments": ""}}, None
            for piece in pieces_of(choice.function_call["arguments"]):
                yield {"function_call": {"arguments": piece}}, None

    def chunks(self):
        """The objects of a streamed answer; the choices take turns."""
        for row in itertools.zip_longest(*(self.deltas(choice) for choice in self.choices)):
            for choice, pair in zip(self.choices, row):
                if pair:
                    delta, logprobs = pair
                    yield self.chunk([{"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}])
        for choice in self.choices:
            yield self.chunk([{"index": choice.index, "delta": {}, "logprobs": None, "finish_reason": choice.finish_reason}])
        if (self.request.get("stream_options") or {}).get("include_usage"):
            yield self.chunk([], self.usage)


def vector(text, dimensions):
    """A vector of length 1 that follows from the text."""
    seed = text.encode()
    numbers = []
    while len(numbers) < DIMENSIONS:
        seed = hashlib.sha256(seed).digest()
        numbers += [byte - 127.5 for byte in seed]
    numbers = numbers[:dimensions]
    length = math.sqrt(sum(number * number for number in numbers))
    return [number / length for number in numbers]


def embeddings(request):
    """The answer to a request for embeddings of one text or several."""
    texts = [request["input"]] if isinstance(request["input"], str) else request["input"]
    data = []
    for index, text in enumerate(texts):
        numbers = vector(text, request.get("dimensions") or DIMENSIONS)
        if request.get("encoding_format") == "base64":
            numbers = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
        data.append({"object": "embedding", "index": index, "embedding": numbers})
    tokens = sum(count(text) + 2 for text in texts)
    return {"object": "list", "data": data, "model": request["model"], "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
