//! Bodies that differ in how the JSON is packed.

use super::{Answer, Case, Failure, STOP, case, delta, events, message, stopped};

pub fn cases() -> Vec<Case> {
    let (a, b) = (delta("Hello"), delta(" there"));
    let stream = events(&[&a, &b, STOP, "[DONE]"]);
    let text = stopped("Hello there");
    let whole = message(r#""Hello there""#);
    let bare = |body: &str| body.replace("data: ", "");
    let mut cases = vec![
        case("a stream", &stream, text),
        case("a whole answer", &whole, text),
        case("a stream in CRLF", stream.replace('\n', "\r\n"), text),
        case("a stream in CR", stream.replace('\n', "\r"), text),
        case(
            "no blank after the colon",
            stream.replace("data: ", "data:"),
            text,
        ),
        case(
            "a mark of byte order before a stream",
            format!("\u{feff}{stream}"),
            text,
        ),
        case(
            "a mark of byte order before JSON",
            format!("\u{feff}{whole}"),
            text,
        ),
        case(
            "blank lines before a stream",
            format!("\n\r\n  \n{stream}"),
            text,
        ),
        case(
            "blank lines before JSON, as keep-alive",
            format!("\n\n \n{whole}"),
            text,
        ),
        case(
            "a comment first",
            format!(": OPENROUTER PROCESSING\n\n{stream}"),
            text,
        ),
        case("a comment before JSON", format!(": wait\n\n{whole}"), text),
        case(
            "comments between",
            stream.replace("\n\n", "\n\n: ping\n\n"),
            text,
        ),
        case(
            "a comment within an event",
            stream.replace("data: ", ": x\ndata: "),
            text,
        ),
        case(
            "names of events, ids and times",
            stream.replace("data: ", "event: x\nid: 7\nretry: 9\ndata: "),
            text,
        ),
        case(
            "an event named ping",
            format!("event: ping\ndata: {{\"type\": \"ping\"}}\n\n{stream}"),
            text,
        ),
        case(
            "the field's name in capitals",
            stream.replace("data: ", "Data: "),
            text,
        ),
        case(
            "the field's name twice",
            stream.replace("data: ", "data: data: "),
            text,
        ),
        case("indented lines", stream.replace("data: ", "  data: "), text),
        case(
            "blanks at the ends of lines",
            stream.replace('\n', " \n"),
            text,
        ),
        case(
            "no blank lines between events",
            stream.replace("\n\n", "\n"),
            text,
        ),
        case(
            "the last event without its blank line",
            stream.trim_end(),
            text,
        ),
        case("no [DONE]", events(&[&a, &b, STOP]), text),
        case(
            "no [DONE], and the last event without its line ending",
            events(&[&a, &b, STOP]).trim_end(),
            text,
        ),
        case("[DONE] twice", format!("{stream}data: [DONE]\n\n"), text),
        case(
            "events without line endings between them",
            stream.replace("\n\n", ""),
            text,
        ),
        case(
            "[DONE] in small letters",
            stream.replace("DONE", "done"),
            text,
        ),
        case(
            "[DONE] in quotes",
            stream.replace("[DONE]", "\"[DONE]\""),
            text,
        ),
        case(
            "[DONE] in the event before",
            stream.replace("\n\ndata: [", "\ndata: ["),
            text,
        ),
        case(
            "[DONE] in place of a reason",
            events(&[&a, &b, "[DONE]"]),
            Answer("Hello there", None),
        ),
        case(
            "text after [DONE]",
            format!("{stream}{}", events(&[&delta("late")])),
            text,
        ),
        case(
            "an error after [DONE]",
            format!("{stream}{}", events(&[r#"{"error":"late"}"#])),
            text,
        ),
        case(
            "one object a line",
            bare(&events(&[&a, &b, STOP]).replace("\n\n", "\n")),
            text,
        ),
        case(
            "one object a line, and [DONE]",
            bare(&stream.replace("\n\n", "\n")),
            text,
        ),
        case(
            "objects without anything between",
            bare(&stream).replace('\n', ""),
            text,
        ),
        case("a list of objects", format!("[{a},\n{b},\n{STOP}]\n"), text),
        case(
            "a list of objects, one a line",
            format!("[\n{a}\n,{b}\n,{STOP}\n]"),
            text,
        ),
        case("a list of one whole answer", format!("[{whole}]"), text),
        case(
            "several events in one line of data",
            events(&[&format!("{a}{b} {STOP}")]),
            text,
        ),
        case(
            "a list as data",
            events(&[&format!("[{a},{b}]"), STOP]),
            text,
        ),
        case("a whole answer as data", events(&[&whole]), text),
        case(
            "a whole answer as a lone line of data",
            format!("data: {whole}"),
            text,
        ),
        case(
            "a whole answer as data, without a reason",
            events(&[r#"{"choices":[{"message":{"content":"x"}}]}"#]),
            Answer("x", None),
        ),
        case(
            "a whole answer, and [DONE]",
            format!("{whole}\n\ndata: [DONE]\n\n"),
            text,
        ),
        case(
            "a whole answer and something after it",
            format!("{whole} </body>"),
            text,
        ),
        case(
            "a whole answer twice in a stream's end",
            events(&[&a, &b, &whole, "[DONE]"]),
            text,
        ),
        case(
            "a pretty-printed whole answer",
            whole
                .replace(['{', ','], "{\n  ")
                .replace("{\n  \"f", ",\n\n\"f")
                .replace("{\n  \"m", ",\r\n\"m")
                .replace("{\n  \"content", ",\"content"),
            text,
        ),
        case(
            "pretty-printed events, each line as data",
            events(&[
                &a.replace(',', ",\ndata:   "),
                &b.replace(":[", ": [\ndata: "),
                STOP,
            ]),
            text,
        ),
        case(
            "pretty-printed events, the first line as data",
            events(&[&a.replace(',', ",\n   "), &b.replace(":[", ": [\n"), STOP]),
            text,
        ),
        case(
            "an empty line of data as keep-alive",
            events(&[&a, "", &b, "", STOP, "[DONE]"]),
            text,
        ),
        case("data without a colon", format!("data\n\n{stream}"), text),
        case(
            "an event that is no JSON",
            events(&[&a, "{oops", &b, STOP]),
            text,
        ),
        case(
            "an event that is no JSON first",
            events(&["{oops", &a, &b, STOP]),
            text,
        ),
        case(
            "an event that is a page",
            events(&[&a, "<p>one moment</p>", &b, STOP]),
            text,
        ),
        case(
            "events that are values",
            events(&["7", "null", "\"x\"", "[]", "true", &a, &b, STOP]),
            text,
        ),
        case(
            "an event that was cut off",
            events(&[&a, r#"{"choices":[{"delta":{"cont"#, &b, STOP]),
            text,
        ),
        case(
            "an event that was cut off after its text",
            events(&[
                &a,
                r#"{"choices":[{"delta":{"content":" there"}}],"usa"#,
                STOP,
            ]),
            text,
        ),
        case(
            "an event without its blank line, cut off in a text",
            format!("data: {a}\n\ndata: {{\"x\":\"he\ndata: {b}\n\ndata: {STOP}\n\n"),
            text,
        ),
        case(
            "a line that is no JSON among lines that are",
            format!("{a}\n{{oops\n{b}\n{STOP}\n"),
            text,
        ),
        case(
            "a line of one bracket among lines that are JSON",
            format!("{a}\n{{ \n{b}\n{STOP}\n"),
            text,
        ),
        case(
            "a line cut off among lines that are not",
            format!("{a}\n{{\"choices\":[{{\"del\n{b}\n{STOP}\n"),
            text,
        ),
        case(
            "nothing but [DONE] after events without choices",
            events(&["{}", "[DONE]"]),
            Failure("malformed"),
        ),
        case(
            "an event cut off after [DONE]",
            events(&[&a, &b, "[DONE]", "{\"choi"]),
            Answer("Hello there", None),
        ),
        case(
            "the reason in an event that was cut off",
            format!("{}data: {}", events(&[&a, &b]), &STOP[..STOP.len() - 1]),
            text,
        ),
        // None of these is an answer.
        case("nothing", "", Failure("malformed")),
        case("blanks", " \r\n\n", Failure("malformed")),
        case(
            "comments alone",
            ": ping\n\n: ping\n\n",
            Failure("malformed"),
        ),
        case(
            "empty data alone",
            "data:\n\ndata:\n\n",
            Failure("malformed"),
        ),
        case(
            "unreadable events alone",
            events(&["{oops", "<p>", "7"]),
            Failure("malformed"),
        ),
        case("[DONE] alone", events(&["[DONE]"]), Failure("malformed")),
        case(
            "a page",
            "<!DOCTYPE html>\n<html><body style='x{y:z}'>Welcome</body></html>\n",
            Failure("malformed"),
        ),
        case(
            "a page that is said to be JSON",
            "<html>{\"choices\":[]}</html>",
            Failure("malformed"),
        ),
        case("half an object", "{\"choices\": [", Failure("malformed")),
        case("a text", "Hello there", Failure("malformed")),
        case("a text as JSON", "\"Hello there\"", Failure("malformed")),
        case("an empty object", "{}", Failure("malformed")),
        case("an empty list", "[]", Failure("malformed")),
        case(
            "a stream that ends in mid-answer",
            events(&[&a, &b]),
            Failure("truncated"),
        ),
        case(
            "a stream that ends in mid-event",
            &events(&[&a, &b])[..150],
            Failure("truncated"),
        ),
        case(
            "lines that end in mid-answer",
            format!("{a}\n{b}\n"),
            Failure("truncated"),
        ),
    ];
    // Bytes that no string of this language can have.
    let bytes: [(&str, &[u8], &str); 4] = [
        ("a byte that is no UTF-8", b"a\xffb", "a\u{fffd}b"),
        ("Latin-1", b"caf\xe9!", "caf\u{fffd}!"),
        ("half a character at the end", b"a\xf0\x9f", "a\u{fffd}"),
        (
            "a surrogate as bytes",
            b"\xed\xa0\xbd",
            "\u{fffd}\u{fffd}\u{fffd}",
        ),
    ];
    for (name, bytes, expected) in bytes {
        let [before, after] = [
            r#"{"choices":[{"message":{"content":""#,
            r#""},"finish_reason":"stop"}]}"#,
        ];
        let body = [before.as_bytes(), bytes, after.as_bytes()].concat();
        cases.push(case(name, body, stopped(expected)));
    }
    let halves = [&b"data: {\"choices\":[{\"delta\":{\"content\":\"ok \xf0\x9f\"}}]}\n\n"[..],
        b"data: {\"choices\":[{\"delta\":{\"content\":\"\x98\x80 end\"},\"finish_reason\":\"stop\"}]}\n\n"];
    cases.push(case(
        "a character's bytes in two deltas",
        halves.concat(),
        stopped("ok 😀 end"),
    ));
    cases
}
