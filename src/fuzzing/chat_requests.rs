use bytes::Bytes;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::llm::{ChatRequest, is_usage_chunk, with_member};

/// The body of a chat request.
///
/// What is read of it is what a JSON parser reads. A member that is changed has its new value, and
/// no other member changes.
pub fn chat_requests(data: &[u8]) {
    check_members(data);
    let Ok(request) = ChatRequest::parse(Bytes::copy_from_slice(data)) else {
        return;
    };
    // Half a surrogate pair, or a number that is too large, is passed on.
    let Ok(json) = serde_json::from_slice::<Value>(data) else {
        return;
    };
    assert_eq!(json["model"], request.model());
    assert_eq!(json["stream"] == true, request.is_streamed());
    let wants_usage = json["stream_options"]["include_usage"] == true;
    assert_eq!(wants_usage, request.wants_usage());
    let messages: Value = serde_json::from_str(request.messages()).expect("a part of JSON");
    assert_eq!(json["messages"], messages);
    assert!(!request.last_user_text().contains('\0'));
    assert!((1..=128).contains(&request.choices()));
    assert_eq!(
        json.as_object().map(serde_json::Map::len),
        Some(request.members().count())
    );
    for (name, value) in request.members() {
        let value: Value = serde_json::from_str(value).expect("a part of JSON");
        assert_eq!(json[name], value);
    }
    let sent = request.body_for("asked");
    let mut sent: Value = serde_json::from_slice(&sent).expect("JSON with other members");
    let mut expected = json;
    expected["model"] = "asked".into();
    if request.is_streamed() {
        expected["stream_options"]["include_usage"] = true.into();
    }
    // Of an object's members that come twice, this one changes all.
    if sent["stream_options"] != expected["stream_options"] {
        assert_eq!(sent["stream_options"]["include_usage"], true);
        sent["stream_options"] = expected["stream_options"].clone();
    }
    assert_eq!(sent, expected);
}

/// Changes a member of whatever it is, as of a chunk of a stream.
fn check_members(data: &[u8]) {
    let _ = is_usage_chunk(data);
    let changed = with_member(data, "id", b"\"new\"");
    let is_json = serde_json::from_slice::<&RawValue>(data).is_ok();
    let (Ok(before), true) = (serde_json::from_slice::<Value>(data), is_json) else {
        return;
    };
    let after: Value = serde_json::from_slice(&changed).expect("it was JSON before");
    let mut expected = before;
    if let Value::Object(members) = &mut expected {
        members.insert("id".to_owned(), "new".into());
    }
    assert_eq!(after, expected);
    assert_eq!(with_member(&changed, "id", b"\"new\""), changed);
}
