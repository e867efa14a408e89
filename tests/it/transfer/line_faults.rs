//! What an import reports of lines that it cannot import.

use std::fs;

use crate::support::{Folder, config_in};
use crate::transfer::command;

const HEADER: &str = r#"{"type":"header","format":"prompt-service","version":1}"#;
const AT: &str = r#""created_at":"2020-01-02T03:04:05Z""#;

/// The output of an import of these bytes, which must fail, in an empty folder, which must stay
/// empty.
async fn refusal(bytes: &[u8]) -> String {
    let (folder, outer) = (Folder::new(), Folder::new());
    let file = outer.path().join("in.jsonl");
    fs::write(&file, bytes).unwrap();
    let arguments = ["import", file.to_str().unwrap(), "--dry-run"];
    let output = command(&config_in(folder.path()), &arguments).await;
    let output = output.unwrap_err();
    assert!(!output.contains("hunter2"), "{output}");
    let left = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 0, "a dry run makes no store");
    output
}

#[tokio::test]
async fn faulty_line_is_reported_by_its_number_and_its_field() {
    let user = |rest: &str| format!(r#"{{"type":"user","id":2,"username":"kim",{AT}{rest}}}"#);
    let prompt = |rest: &str| format!(r#"{{"type":"prompt","id":1,"user_id":1,{AT}{rest}}}"#);
    let cases = [
        (
            r#"{"type":"user","id":2,"created_at":"2020-01-02T03:04:05Z"}"#.to_owned(),
            "`username` is missing",
        ),
        (
            format!(r#"{{"type":"user","username":"hunter2",{AT}}}"#),
            "`id` is missing",
        ),
        (
            r#"{"type":"user","id":2,"username":"hunter2"}"#.to_owned(),
            "`created_at` is missing",
        ),
        (
            format!(r#"{{"type":"user","id":"hunter2","username":"kim",{AT}}}"#),
            "`id` must be a whole number",
        ),
        (
            format!(r#"{{"type":"user","id":2.5,"username":"kim",{AT}}}"#),
            "`id` must be a whole number",
        ),
        (
            format!(r#"{{"type":"user","id":2,"username":["hunter2"],{AT}}}"#),
            "`username` must be text",
        ),
        (
            r#"{"type":"user","id":2,"username":"kim","created_at":"hunter2"}"#.to_owned(),
            "`created_at` must be a time such as",
        ),
        (
            r#"{"type":"user","id":2,"username":"kim","created_at":1577934245}"#.to_owned(),
            "`created_at` must be a time such as",
        ),
        (
            user(r#","is_active":"hunter2""#),
            "`is_active` must be true or false",
        ),
        (user(r#","email":null"#), "`email` must be text"),
        (
            user(r#","tokens_valid_from":"hunter2""#),
            "`tokens_valid_from` must be a time",
        ),
        (
            user(r#","pasword_hash":"hunter2""#),
            "not known here: `pasword_hash`",
        ),
        (
            user(r#","hunter2 and more":1"#),
            "it has a field that is not known here",
        ),
        (user(r#","id":3"#), "`id` comes more than once"),
        (prompt(r#","prompt":1"#), "`prompt` must be text"),
        (prompt(""), "`prompt` is missing"),
        (
            prompt(r#","prompt":"x","response":5"#),
            "`response` must be text or null",
        ),
        (
            prompt(r#","prompt":"x","status":"hunter2""#),
            "`status` must be completed, failed or running",
        ),
        (
            prompt(r#","prompt":"x","error":"hunter2""#),
            "`error` must be upstream_failed,",
        ),
        (
            prompt(r#","prompt":"x","llm_duration_ms":-1"#),
            "`llm_duration_ms` must be a whole number from 0",
        ),
        (
            prompt(r#","prompt":"x","embedding":{"model":"hunter2"}"#),
            "`embedding` must be {\"model\"",
        ),
        (
            prompt(r#","prompt":"x","embedding":{"model":"m","f16":"hunter2!"}"#),
            "`embedding` must be {\"model\"",
        ),
        (
            prompt(r#","prompt":"x","response":"y","status":"failed""#),
            "`status` must fit `response`",
        ),
        (prompt(r#","prompt":" ""#), "`prompt` must not be blank"),
        (
            r#"{"type":"hunter2"}"#.to_owned(),
            "`type` must be \"user\" or \"prompt\"",
        ),
        (r#"{"id":1}"#.to_owned(), "`type` is missing"),
        (HEADER.to_owned(), "`type` must be \"user\" or \"prompt\""),
        (r#"["hunter2"]"#.to_owned(), "it is not a JSON object"),
        ("hunter2".to_owned(), "it is not JSON from column 1 on"),
        (
            r#"  {"é":1,}"#.to_owned(),
            "it is not JSON from column 10 on",
        ),
        (
            r#"{"type":"user"} {"a":1}"#.to_owned(),
            "it is not JSON from column 17 on",
        ),
        (
            r#"{"type":"user","username":"hunt"#.to_owned(),
            "it ends before its JSON does",
        ),
    ];
    for (line, expected) in cases {
        let eve = format!(r#"{{"type":"user","id":1,"username":"eve",{AT}}}"#);
        let output = refusal(format!("{HEADER}\n{eve}\n\n{line}\n").as_bytes()).await;
        let fault = output.lines().find(|line| line.starts_with("fault: "));
        let fault = fault.unwrap_or_else(|| panic!("{line}: {output}"));
        let is_named = fault.starts_with("fault: line 4: ") && fault.contains(expected);
        assert!(is_named, "{line}: {fault}");
    }
    let bytes = [HEADER.as_bytes(), b"\n{\"type\":\"us\xffr\"}\n"].concat();
    let output = refusal(&bytes).await;
    assert!(
        output.contains("fault: line 2: it is not UTF-8 from column 12 on"),
        "{output}"
    );
}

#[tokio::test]
async fn file_without_a_header_is_refused_with_the_reason() {
    for (bytes, expected) in [
        (&b""[..], "the first line is not the header"),
        (b"id,username\n1,hunter2\n", "the first line is not the header"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "gunzip"),
        (b"{\"type\":\"header\",\"format\":\"prompt-service\"}", "line 1, the header: `version` is missing"),
        (b"{\"type\":\"header\",\"format\":\"prompt-service\",\"version\":\"1\"}", "`version` must be a whole number"),
        (
            b"{\"type\":\"header\",\"format\":\"prompt-service\",\"version\":1,\"last_user_id\":-1}",
            "`last_user_id` must be a whole number from 0",
        ),
        (b"{\"type\":\"header\",\"format\":\"prompt-service\",\"version\":9}", "newer"),
    ] {
        let output = refusal(bytes).await;
        assert!(output.contains(expected), "{output}");
    }
}

#[tokio::test]
async fn byte_order_mark_and_windows_line_ends_are_ignored() {
    let folder = Folder::new();
    let file = folder.path().join("in.jsonl");
    let user = format!(r#"{{"type":"user","id":1,"username":"eve",{AT}}}"#);
    fs::write(&file, format!("\u{feff}{HEADER}\r\n{user}\r\n")).unwrap();
    let data = Folder::new();
    let arguments = ["import", file.to_str().unwrap()];
    let out = command(&config_in(data.path()), &arguments).await.unwrap();
    assert!(out.starts_with("to import: 1 users, 0 prompts\n"), "{out}");
}
