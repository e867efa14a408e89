"""Puts streamed answers together with OpenAI's own library, and writes what it makes of each.

    pip install openai==3.57.0
    python3 tests/tools/accumulate_chat_streams.py

`tests/it/llm/chat/accumulated.rs` compares that with what the service makes of the same streams.
"""

import json
from pathlib import Path

from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

DATA = Path(__file__).parent.parent / "data"
# Members of the library's own, which are in no answer.
OWN = {"parsed", "parsed_arguments"}


def events(path):
    for line in path.read_text().splitlines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


def without_own(value):
    if isinstance(value, dict):
        return {name: without_own(member) for name, member in value.items() if name not in OWN}
    if isinstance(value, list):
        return [without_own(item) for item in value]
    return value


def accumulated(chunks):
    state, seen = ChatCompletionStreamState(), set()
    for chunk in chunks:
        for choice in chunk["choices"]:
            # Some servers repeat the role in every chunk, and the library joins the roles.
            if choice["index"] in seen:
                choice["delta"].pop("role", None)
            seen.add(choice["index"])
        state.handle_chunk(ChatCompletionChunk.construct(**chunk))
    return without_own(state.current_completion_snapshot.to_dict())


def main():
    expected = {}
    for path in sorted([*DATA.glob("chat_streams/*.sse"), *DATA.glob("upstream_answers/*.sse")]):
        chunks = list(events(path))
        if all(chunk.get("object") == "chat.completion.chunk" for chunk in chunks):
            expected[f"{path.parent.name}/{path.name}"] = accumulated(chunks)
    (DATA / "chat_streams" / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
