//! Bodies that differ in what the JSON says.

use super::{Answer, Case, Failure, STOP, case, delta, events, message, stopped};

/// A whole answer with that choice, beside other members.
pub fn choice(choice: &str) -> String {
    format!(r#"{{"choices":[{choice}]}}"#)
}

/// A stream of `Hello`, an event, and the end.
pub fn with(event: &str) -> String {
    events(&[&delta("Hello"), event, STOP, "[DONE]"])
}

pub fn cases() -> Vec<Case> {
    let mut cases = reasons();
    cases.extend(choices());
    cases.extend(oddities());
    cases.extend(errors());
    cases
}

fn reasons() -> Vec<Case> {
    let ended = |reason: &str| {
        choice(&format!(
            r#"{{"message":{{"content":"x"}},"finish_reason":{reason}}}"#
        ))
    };
    let text_and = |reason: &str| {
        format!(r#"{{"choices":[{{"delta":{{"content":"x"}},"finish_reason":{reason}}}]}}"#)
    };
    let mut cases: Vec<Case> = [
        "null",
        r#""""#,
        "0",
        r#""null""#,
        r#"" None ""#,
        "{}",
        "[\"stop\"]",
        "false",
        "NaN",
    ]
    .iter()
    .flat_map(|none| {
        let event = text_and(none);
        [
            case(
                "no reason in a whole answer",
                ended(none),
                Answer("x", None),
            ),
            case(
                "no reason in a stream",
                events(&[&event, &event]),
                Failure("truncated"),
            ),
            case(
                "no reason and [DONE]",
                events(&[&event, "[DONE]"]),
                Answer("x", None),
            ),
        ]
    })
    .collect();
    let stop = text_and(r#""stop""#);
    cases.extend([
        case(
            "a reason of several lines",
            ended(r#"" max\ntokens ""#),
            Answer("x", Some("maxtokens")),
        ),
        case(
            "a reason in every event",
            events(&[stop.as_str(); 8]),
            stopped("xxxxxxxx"),
        ),
        case(
            "text after the reason",
            events(&[&stop, &delta("y"), STOP]),
            stopped("xy"),
        ),
        case(
            "text after the reason, and [DONE]",
            events(&[&stop, &delta("y"), "[DONE]"]),
            Answer("xy", None),
        ),
        case(
            "text after the reason, and no other",
            events(&[&stop, &delta("y")]),
            Failure("truncated"),
        ),
        case(
            "a thought after the reason",
            events(&[&stop, r#"{"choices":[{"delta":{"reasoning":"y"}}]}"#]),
            stopped("x"),
        ),
        case(
            "another reason after the reason",
            events(&[
                &stop,
                r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#,
            ]),
            Answer("x", Some("length")),
        ),
        case(
            "nonsense after the reason",
            events(&[&stop, "{oops"]),
            stopped("x"),
        ),
        case(
            "an error after the reason",
            events(&[&stop, r#"{"error":{"message":"no"}}"#]),
            stopped("x"),
        ),
        case(
            "a breakdown after the reason",
            events(&[
                &stop,
                r#"{"choices":[{"delta":{},"finish_reason":"error"}]}"#,
            ]),
            stopped("x"),
        ),
        case(
            "an error after the reason and more text",
            events(&[&stop, &delta("y"), r#"{"error":"no"}"#]),
            Failure("error_object"),
        ),
    ]);
    cases
}

fn choices() -> Vec<Case> {
    let said = |index: &str, text: &str| {
        format!(r#"{{{index}"message":{{"content":"{text}"}},"finish_reason":"stop"}}"#)
    };
    let indexed = |index: &str, text: &str| said(&format!(r#""index":{index},"#), text);
    let mut cases: Vec<Case> = [
        "0",
        "null",
        r#""0""#,
        "0.0",
        r#""first""#,
        "{}",
        "1",
        "-1",
        "NaN",
    ]
    .iter()
    .map(|index| {
        case(
            "a choice with an index",
            choice(&indexed(index, "x")),
            stopped("x"),
        )
    })
    .collect();
    let event = |index: u8, text: &str| {
        format!(
            r#"{{"choices":[{{"index":{index},"delta":{{"content":"{text}"}},"finish_reason":null}}]}}"#
        )
    };
    let stop = |index: u8| event(index, "").replace("null", r#""stop""#);
    cases.extend([
        case(
            "several choices",
            choice(&[indexed("0", "x"), indexed("1", "y")].join(",")),
            stopped("x"),
        ),
        case(
            "in another order",
            choice(&[indexed("1", "y"), indexed("0", "x")].join(",")),
            stopped("x"),
        ),
        case(
            "several without an index",
            choice(&[said("", "x"), said("", "y")].join(",")),
            stopped("x"),
        ),
        case(
            "null among them",
            choice(&["null", &indexed("0", "x")].join(",")),
            stopped("x"),
        ),
        case(
            "a choice in place of the list",
            format!(r#"{{"choices":{}}}"#, said("", "x")),
            stopped("x"),
        ),
        case(
            "a list written as an object",
            format!(
                r#"{{"choices":{{"0":{},"1":{}}}}}"#,
                said("", "x"),
                said("", "y")
            ),
            stopped("x"),
        ),
        case(
            "a stream of several choices",
            events(&[
                &event(1, "y"),
                &event(0, "He"),
                &event(1, "z"),
                &event(0, "llo"),
                &stop(1),
                &stop(0),
            ]),
            stopped("Hello"),
        ),
        case(
            "the other choice ends first",
            events(&[&event(0, "x"), &stop(1), "[DONE]"]),
            Answer("x", None),
        ),
        case(
            "a stream that counts from one",
            events(&[&event(1, "He"), &event(1, "llo"), &stop(1), "[DONE]"]),
            stopped("Hello"),
        ),
        case("no choices", r#"{"choices":[]}"#, Failure("malformed")),
        case(
            "null for choices",
            r#"{"choices":null}"#,
            Failure("malformed"),
        ),
        case(
            "a text for choices",
            r#"{"choices":"x"}"#,
            Failure("malformed"),
        ),
        case(
            "an answer of another protocol",
            r#"{"output":[{"content":[{"type":"output_text","text":"x"}]}]}"#,
            Failure("malformed"),
        ),
    ]);
    cases
}

fn oddities() -> Vec<Case> {
    let text = stopped("Hello");
    let whole = message(r#""Hello""#);
    let beside = |members: &str| whole.replacen('{', &format!("{{{members},"), 1);
    vec![
        case(
            "NaN in a member that nobody reads",
            beside(r#""x":NaN,"y":[-Infinity,Infinity]"#),
            text,
        ),
        case(
            "NaN in a stream",
            with(r#"{"timings":{"t":NaN},"choices":[]}"#),
            text,
        ),
        case(
            "members of other types",
            beside(r#""model":7,"object":{},"id":[],"created":"now","system_fingerprint":false"#),
            text,
        ),
        case(
            "a member that comes twice",
            beside(r#""usage":null,"usage":{},"x":1,"x":2"#),
            text,
        ),
        case(
            "a content that comes twice",
            whole.replace(r#""content":"#, r#""content":"Bye","content":"#),
            text,
        ),
        case(
            "a thought that comes twice",
            with(r#"{"choices":[{"delta":{"reasoning_content":"a","reasoning_content":"b"}}]}"#),
            text,
        ),
        case(
            "names written with escapes",
            whole
                .replace("content", r"c\u006fntent")
                .replace("choices", r"\u0063hoices"),
            text,
        ),
        case("a comma too many", whole.replace("}]}", "},],}"), text),
        case(
            "an unfinished member after the choices",
            whole.replace("}]}", r#"}],"usage":}"#),
            text,
        ),
        case(
            "no JSON beside the choices",
            whole.replace("}]}", "}],oops}"),
            text,
        ),
        case(
            "an event without choices",
            with(r#"{"id":"x","prompt_filter_results":[{}]}"#),
            text,
        ),
        case("an event that is an empty object", with("{}"), text),
        case(
            "thoughts under any name",
            with(
                r#"{"choices":[{"delta":{"reasoning_details":[{"text":"x"}],"thinking":"y","reasoning_text":"z"}}]}"#,
            ),
            text,
        ),
        case(
            "a null delta",
            with(r#"{"choices":[{"delta":null}]}"#),
            text,
        ),
        case(
            "a list for a delta",
            with(r#"{"choices":[{"delta":[]}]}"#),
            text,
        ),
    ]
}

fn errors() -> Vec<Case> {
    let whole = message(r#""Hello""#);
    let beside = |error: &str| whole.replacen('{', &format!(r#"{{"error":{error},"#), 1);
    let mut cases = Vec::new();
    for none in [
        "null",
        "false",
        "0",
        r#""""#,
        r#"" ""#,
        "{}",
        "[]",
        r#""null""#,
        r#"{"message":"","type":"","param":"","code":null}"#,
        r#"{"error":{},"code":0,"details":[]}"#,
    ] {
        cases.push(case(
            "an error without content",
            beside(none),
            stopped("Hello"),
        ));
        cases.push(case(
            "the same in a stream",
            with(&format!(r#"{{"error":{none}}}"#)),
            stopped("Hello"),
        ));
    }
    for error in [
        r#"{"message":"no"}"#,
        r#""no""#,
        "true",
        r#"{"code":500}"#,
        "1",
        r#"[{"message":"no"}]"#,
    ] {
        let alone = format!(r#"{{"error":{error}}}"#);
        cases.extend([
            case(
                "an error in place of an answer",
                alone.clone(),
                Failure("error_object"),
            ),
            case(
                "an error in a stream",
                events(&[&delta("Hello"), &alone, STOP]),
                Failure("error_object"),
            ),
            case(
                "an error beside an answer that ended",
                beside(error),
                stopped("Hello"),
            ),
            case(
                "an error beside a text without a reason",
                format!(r#"{{"error":{error},"choices":[{{"message":{{"content":"x"}}}}]}}"#),
                Failure("error_object"),
            ),
        ]);
    }
    let broken = r#"{"choices":[{"delta":{"content":""},"finish_reason":"error"}]}"#;
    cases.extend([
        case(
            "an error in a list",
            r#"[{"error":{"code":400,"message":"no"}}]"#,
            Failure("error_object"),
        ),
        case(
            "an object that is an error",
            r#"{"object":"error","message":"no","code":404}"#,
            Failure("error_object"),
        ),
        case(
            "an error in a choice",
            choice(r#"{"message":{"content":"x"},"error":{"code":502,"message":"no"}}"#),
            Failure("error_object"),
        ),
        case(
            "a breakdown as the reason",
            choice(r#"{"message":{"content":"x"},"finish_reason":"error"}"#),
            Failure("error_object"),
        ),
        case(
            "a breakdown in a stream",
            events(&[&delta("Hello"), broken]),
            Failure("error_object"),
        ),
        case(
            "an error named so",
            "event: error\ndata: {\"error\":{\"message\":\"no\"}}\n\n",
            Failure("error_object"),
        ),
        case(
            "an error without its blank line",
            format!("data: {}\n\ndata: {{\"error\":\"no\"}}", delta("x")),
            Failure("error_object"),
        ),
        case(
            "a message that is no answer",
            r#"{"message":"no Route matched"}"#,
            Failure("malformed"),
        ),
        case(
            "a detail that is no answer",
            r#"{"detail":"Not Found"}"#,
            Failure("malformed"),
        ),
    ]);
    cases
}
