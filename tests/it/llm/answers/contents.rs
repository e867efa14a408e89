//! Bodies that differ in where the text is, and in what form.

use super::protocol::{choice, with};
use super::{Answer, Case, Expected, Failure, STOP, case, delta, events, message, stopped};

pub fn cases() -> Vec<Case> {
    let part = |json: &str, text: Expected| (json.to_owned(), text);
    let mut cases = Vec::new();
    for (content, expected) in [
        part(
            r#"[{"type":"thinking","thinking":"hm"},{"type":"text","text":"answer"}]"#,
            stopped("answer"),
        ),
        part(
            r#"[{"type":"text","text":"an"},{"type":"output_text","text":"swer"}]"#,
            stopped("answer"),
        ),
        part(r#"[{"type":"refusal","refusal":"No."}]"#, stopped("No.")),
        part(
            r#"[{"type":"text","content":"under another name"}]"#,
            stopped("under another name"),
        ),
        part(
            r#"[{"type":"text","text":{"value":"answer","annotations":[]}}]"#,
            stopped("answer"),
        ),
        part(
            r#"[{"text":"answer"},{"type":"image_url","image_url":{"url":"text"}},{"type":"tool_use","text":"x"}]"#,
            stopped("answer"),
        ),
        part(r#"["an","swer",null,7]"#, stopped("answer")),
        part(r#"{"type":"text","text":"answer"}"#, stopped("answer")),
        part(r#"{"text":"answer"}"#, stopped("answer")),
        part(r#"{"type":"thinking","thinking":"hm"}"#, stopped("")),
        part(r#"{"answer": [4, 2]}"#, stopped(r#"{"answer": [4, 2]}"#)),
        part("{}", stopped("")),
        part("[]", stopped("")),
        part(r#"[{"type":"thinking"}]"#, stopped("")),
        part("null", stopped("")),
        part("false", stopped("")),
        part("42", stopped("42")),
        part(r#""""#, stopped("")),
        part(r#""a\u0000b\0c\/d""#, stopped("a\u{fffd}b0c/d")),
        part(r#""\ud83d\ude00 \ud83d""#, stopped("😀 \u{fffd}")),
        part(r#""\ude00\ud83dx""#, stopped("\u{fffd}\u{fffd}x")),
        part("\"raw\ttab\"", stopped("raw\ttab")),
        part(
            r#""{\"choices\":[]} data: [DONE]""#,
            stopped(r#"{"choices":[]} data: [DONE]"#),
        ),
    ] {
        cases.push(case("a message's content", message(&content), expected));
        let event = format!(
            r#"{{"choices":[{{"delta":{{"content":{content}}},"finish_reason":"stop"}}]}}"#
        );
        cases.push(case(
            "a delta's content",
            events(&[&event, "[DONE]"]),
            expected,
        ));
    }
    let halves = [r"ok \ud83d", r"\ude00 end"].map(delta);
    let thought = r#"{"choices":[{"delta":{"reasoning_content":"x","content":null}}]}"#;
    cases.extend([
        case("half a surrogate pair in each of two deltas", events(&[&halves[0], &halves[1], STOP]), stopped("ok 😀 end")),
        case("the halves with a thought between", events(&[&halves[0], thought, &halves[1], STOP]), stopped("ok 😀 end")),
        case("a half that stays alone", events(&[&halves[0], &delta("x"), STOP]), stopped("ok \u{fffd}x")),
        case("a half at the end", events(&[&halves[0], STOP]), stopped("ok \u{fffd}")),
        case("a message in a delta's place", with(&message(r#"" there""#).replace("\"stop\"", "null")), stopped("Hello")),
        case("messages in place of deltas",
            events(&[r#"{"choices":[{"message":{"content":"He"}}]}"#, r#"{"choices":[{"message":{"content":"llo"}}]}"#, STOP]), stopped("Hello")),
        case("the whole message beside each delta", events(&[
            r#"{"choices":[{"delta":{"content":"He"},"message":{"content":"He"}}]}"#,
            r#"{"choices":[{"delta":{"content":"llo"},"message":{"content":"Hello"},"finish_reason":"stop"}]}"#]), stopped("Hello")),
        case("the whole message after the deltas",
            events(&[&delta("He"), r#"{"choices":[{"message":{"content":"Hello"},"finish_reason":"stop"}]}"#]), stopped("Hello")),
        case("a delta in a message's place", choice(r#"{"delta":{"content":"x"},"finish_reason":"stop"}"#), stopped("x")),
        case("a delta in a message's place, without a reason", choice(r#"{"delta":{"content":"x"}}"#), Answer("x", None)),
        case("a message that is a text", choice(r#"{"message":"x","finish_reason":"stop"}"#), stopped("x")),
        case("legacy completions", choice(r#"{"text":"x","index":0,"logprobs":null,"finish_reason":"stop"}"#), stopped("x")),
        case("legacy completions beside an empty message", choice(r#"{"message":null,"text":"x"}"#), Answer("x", None)),
        case("a stream of legacy completions",
            events(&[r#"{"choices":[{"text":"He"}]}"#, r#"{"choices":[{"text":"llo","finish_reason":"stop"}]}"#, "[DONE]"]), stopped("Hello")),
        case("a refusal beside no content", choice(r#"{"message":{"content":null,"refusal":"No."},"finish_reason":"stop"}"#), stopped("No.")),
        case("a refusal in deltas", events(&[
            r#"{"choices":[{"delta":{"role":"assistant","content":"","refusal":null}}]}"#,
            r#"{"choices":[{"delta":{"refusal":"I can"}}]}"#, r#"{"choices":[{"delta":{"refusal":" not."}}]}"#, STOP]), stopped("I can not.")),
        case("a message beside an empty delta",
            choice(r#"{"delta":{"role":"assistant","content":""},"message":{"content":"whole"},"finish_reason":"stop"}"#), stopped("whole")),
        case("the whole message beside each delta and an empty last one", events(&[
            r#"{"choices":[{"delta":{"content":"He"},"message":{"content":"He"}}]}"#,
            r#"{"choices":[{"delta":{"content":""},"message":{"content":"Hello"},"finish_reason":"stop"}]}"#]), stopped("Hello")),
        case("a text beside an empty delta", choice(r#"{"delta":{"content":""},"text":"x","finish_reason":"stop"}"#), stopped("x")),
        case("the whole text after its deltas", events(&[
            &delta("Hello"), r#"{"choices":[{"delta":{"content":""},"text":"Hello","finish_reason":"stop"}]}"#]), stopped("Hello")),
        case("an error of success without a message",
            choice(r#"{"message":{"content":"x"},"finish_reason":null,"error":{"code":200,"message":""}}"#), Answer("x", None)),
        case("an error of failure without a message",
            choice(r#"{"message":{"content":"x"},"finish_reason":null,"error":{"code":500,"message":""}}"#), Failure("error_object")),
        case("a call of a tool", choice(r#"{"message":{"content":null,"tool_calls":[{"id":"x"}]},"finish_reason":"tool_calls"}"#), Answer("", Some("tool_calls"))),
        case("held back", choice(r#"{"message":{"content":null},"finish_reason":"content_filter"}"#), Answer("", Some("content_filter"))),
        case("held back, without a message", choice(r#"{"message":null,"finish_reason":"content_filter"}"#), Answer("", Some("content_filter"))),
        case("nothing but thoughts", events(&[thought, r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#]), Answer("", Some("length"))),
        case("nothing but thoughts, and no reason", events(&[thought, "[DONE]"]), Failure("malformed")),
        case("no content and no reason", choice(r#"{"message":{"content":null}}"#), Failure("malformed")),
        case("no content and an empty reason", choice(r#"{"message":{"content":null},"finish_reason":""}"#), Failure("malformed")),
        case("a choice without anything", choice("{}"), Failure("malformed")),
        case("no message", choice(r#"{"message":null}"#), Failure("malformed")),
    ]);
    cases
}
