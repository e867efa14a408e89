//! The JSON of the chat-completions protocol: what is asked, and what is understood of the answers.
//!
//! Servers that speak the protocol differ in everything but the essentials, so only those are insisted on.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::fault::Kind;
use crate::config::{Endpoint, UpstreamConfig};

/// Longest name of a model, and longest `finish_reason`, in characters; both are stored with the prompt.
const MODEL_CHARS: usize = 200;
const REASON_CHARS: usize = 64;

#[derive(Serialize)]
struct Request<'a> {
    model: &'a str,
    messages: Vec<Message<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_completion_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// The body of a request.
pub fn request(
    config: &UpstreamConfig,
    endpoint: &Endpoint,
    prompt: &str,
    is_streamed: bool,
) -> Bytes {
    let system = config.system_prompt.as_deref().map(|content| Message {
        role: "system",
        content,
    });
    let user = Message {
        role: "user",
        content: prompt,
    };
    // OpenAI's newer models refuse the old name; most other servers know no other.
    let is_openai = endpoint.base_url.is_openai();
    let request = Request {
        model: &endpoint.model,
        messages: system.into_iter().chain([user]).collect(),
        max_tokens: config.max_tokens.filter(|_| !is_openai),
        max_completion_tokens: config.max_tokens.filter(|_| is_openai),
        temperature: config.temperature,
        top_p: config.top_p,
        stream: is_streamed.then_some(true),
        stream_options: is_streamed.then_some(StreamOptions {
            include_usage: true,
        }),
    };
    serde_json::to_vec(&request)
        .expect("strings and numbers can be written as JSON")
        .into()
}

/// What an upstream answered, so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// The model, as the upstream names it.
    pub model: Option<String>,
    /// Why it stopped.
    pub finish_reason: Option<String>,
    /// Tokens of the question.
    pub prompt_tokens: Option<u32>,
    /// Tokens of the answer.
    pub completion_tokens: Option<u32>,
}

#[derive(Deserialize)]
struct Body<'a> {
    model: Option<String>,
    choices: Option<Vec<Choice>>,
    // Read apart: an odd figure must not cost the answer.
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    object: Option<String>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: u32,
    message: Option<Content>,
    delta: Option<Content>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Content {
    content: Option<String>,
    // Thoughts are not part of the answer, but they show that the model is at work.
    reasoning_content: Option<serde::de::IgnoredAny>,
    reasoning: Option<serde::de::IgnoredAny>,
}

#[derive(Default, Deserialize)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
}

/// Reads the body of a whole answer. One that ended for a reason and has no text is an answer too, an empty one: thinking used up
/// its tokens, a filter held it back, or the model refused. It was paid for, and would be no other if asked again.
///
/// # Errors
/// `ErrorObject`, or `Malformed` if it is no JSON, has no choice, or has neither a text nor a reason.
pub fn whole(body: &[u8]) -> Result<Answer, Kind> {
    let mut answer = Answer::default();
    let choice = answer.take(body)?.ok_or(Kind::Malformed)?;
    match choice.message.and_then(|message| message.content) {
        Some(content) => answer.text = cleaned_text(content),
        None if answer.finish_reason.is_some() => {}
        None => return Err(Kind::Malformed),
    }
    Ok(answer)
}

/// A streamed answer as it comes in, event by event.
#[derive(Debug, Default)]
pub struct Collector {
    answer: Answer,
    has_content: bool,
    is_done: bool,
}

/// What an event brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// Further text; may be empty.
    pub delta: &'a str,
    /// Whether the model was at work: text, or a thought.
    pub is_token: bool,
}

impl Collector {
    /// Takes in the data of one event.
    ///
    /// # Errors
    /// `ErrorObject` or `Malformed`.
    pub fn take(&mut self, data: &[u8]) -> Result<Progress<'_>, Kind> {
        let nothing = Progress {
            delta: "",
            is_token: false,
        };
        if self.is_done {
            return Ok(nothing);
        }
        if data.trim_ascii() == b"[DONE]" {
            self.is_done = true;
            return Ok(nothing);
        }
        let choice = self.answer.take(data)?;
        let Some(content) = choice.and_then(|choice| choice.delta) else {
            return Ok(nothing);
        };
        let has_thought = content.reasoning.is_some() || content.reasoning_content.is_some();
        let before = self.answer.text.len();
        if let Some(text) = content.content {
            self.has_content = true;
            self.answer.text.push_str(&cleaned_text(text));
        }
        let delta = &self.answer.text[before..];
        Ok(Progress {
            delta,
            is_token: has_thought || !delta.is_empty(),
        })
    }

    /// Whether `[DONE]` was there.
    pub fn is_done(&self) -> bool {
        self.is_done
    }

    /// Whether the model has said why it stopped: the text is whole then, whatever else is to come.
    pub fn has_reason(&self) -> bool {
        self.answer.finish_reason.is_some()
    }

    /// Bytes of text so far.
    pub fn text_bytes(&self) -> usize {
        self.answer.text.len()
    }

    /// The whole answer, once the stream has ended.
    ///
    /// # Errors
    /// `Truncated` if the end was neither `[DONE]` nor preceded by a `finish_reason`, `Malformed` if there was neither a text nor a
    /// `finish_reason`.
    pub fn finish(self) -> Result<Answer, Kind> {
        match (self.has_reason(), self.is_done, self.has_content) {
            (true, _, _) | (false, true, true) => Ok(self.answer),
            (false, true, false) => Err(Kind::Malformed),
            (false, false, _) => Err(Kind::Truncated),
        }
    }
}

impl Answer {
    /// Reads one JSON object: keeps model, usage and finish reason, and returns the choice, if there is one.
    fn take(&mut self, json: &[u8]) -> Result<Option<Choice>, Kind> {
        let body: Body<'_> = serde_json::from_slice(json).map_err(|_| Kind::Malformed)?;
        if body.error.is_some() || body.object.as_deref() == Some("error") {
            return Err(Kind::ErrorObject);
        }
        if let Some(model) = body.model {
            let model = cleaned_name(&model, MODEL_CHARS);
            if !model.is_empty() {
                self.model = Some(model);
            }
        }
        if let Some(usage) = body.usage {
            let usage: Usage = serde_json::from_str(usage.get()).unwrap_or_default();
            let count = |tokens: u64| u32::try_from(tokens).unwrap_or(u32::MAX);
            self.prompt_tokens = usage.prompt_tokens.map(count).or(self.prompt_tokens);
            self.completion_tokens = usage
                .completion_tokens
                .map(count)
                .or(self.completion_tokens);
        }
        let mut choices = body.choices.unwrap_or_default().into_iter();
        let choice = choices.find(|choice| choice.index == 0);
        let reason = choice.as_ref().and_then(|c| c.finish_reason.as_deref());
        match reason.map(|reason| cleaned_name(reason, REASON_CHARS)) {
            // OpenRouter's word for a model that broke down in mid-answer.
            Some(reason) if reason == "error" => return Err(Kind::ErrorObject),
            // Some servers send an empty one where others send null.
            Some(reason) if !reason.is_empty() => self.finish_reason = Some(reason),
            Some(_) | None => {}
        }
        Ok(choice)
    }
}

/// Without NUL, which not every store can keep.
fn cleaned_text(text: String) -> String {
    if text.contains('\0') {
        text.replace('\0', "\u{fffd}")
    } else {
        text
    }
}

/// One line of at most `most` characters: it is shown in lists and in logs.
fn cleaned_name(name: &str, most: usize) -> String {
    name.trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(most)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn read(body: &Value) -> Result<Answer, Kind> {
        whole(body.to_string().as_bytes())
    }

    #[test]
    fn a_whole_answer_is_read() {
        let body = json!({
            "id": "x", "model": " gpt\n-5 ", "usage": { "prompt_tokens": 3, "completion_tokens": 5, "more": {} },
            "choices": [{ "index": 0, "finish_reason": "stop", "message": { "role": "assistant", "content": "a\0b", "refusal": null } }],
            "error": null,
        });
        let expected = Answer {
            text: "a\u{fffd}b".to_owned(),
            model: Some("gpt-5".to_owned()),
            finish_reason: Some("stop".to_owned()),
            prompt_tokens: Some(3),
            completion_tokens: Some(5),
        };
        assert_eq!(read(&body), Ok(expected));
    }

    #[test]
    fn odd_figures_do_not_cost_the_answer_and_long_names_are_cut() {
        let body = json!({
            "model": "m".repeat(1000), "usage": { "prompt_tokens": -1.5 },
            "choices": [{ "message": { "content": "" } }],
        });
        let answer = read(&body).unwrap();
        assert_eq!(answer.model.unwrap().len(), MODEL_CHARS);
        assert_eq!(answer.prompt_tokens, None);
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for body in [
            json!({}),
            json!([]),
            json!({ "choices": null }),
            json!({ "choices": [] }),
            json!({ "choices": [{}] }),
            json!({ "choices": [{ "message": null }] }),
            json!({ "choices": [{ "message": { "content": null } }] }),
            json!({ "choices": [{ "message": { "content": null }, "finish_reason": "" }] }),
            json!({ "choices": [{ "message": { "content": 7 } }] }),
            json!({ "choices": [{ "index": 1, "message": { "content": "x" } }] }),
        ] {
            assert_eq!(read(&body), Err(Kind::Malformed), "{body}");
        }
        for body in [
            json!({ "error": { "message": "no" } }),
            json!({ "object": "error", "message": "no" }),
            json!({ "error": "no", "choices": [{ "message": { "content": "x" } }] }),
            json!({ "choices": [{ "message": { "content": "x" }, "finish_reason": "error" }] }),
        ] {
            assert_eq!(read(&body), Err(Kind::ErrorObject), "{body}");
        }
        assert_eq!(whole(b"<html>"), Err(Kind::Malformed));
        assert_eq!(whole(b"{\"choices\": [{\"mess"), Err(Kind::Malformed));
    }

    #[test]
    fn an_answer_that_ended_for_a_reason_without_a_text_is_an_empty_one() {
        for (reason, message) in [
            ("length", json!({ "content": null })),
            ("content_filter", json!({})),
            ("stop", json!({ "content": null, "refusal": "I will not." })),
            ("content_filter", Value::Null),
        ] {
            let choice = json!({ "finish_reason": reason, "message": message });
            let usage = json!({ "prompt_tokens": 3, "completion_tokens": 64 });
            let answer = read(&json!({ "choices": [choice], "usage": usage })).unwrap();
            assert_eq!(answer.text, "");
            assert_eq!(answer.finish_reason.as_deref(), Some(reason));
            assert_eq!(answer.completion_tokens, Some(64));
        }
        let mut collector = Collector::default();
        let end = br#"{"choices": [{"delta": {}, "finish_reason": "length"}]}"#;
        assert!(!collector.has_reason());
        collector.take(end).unwrap();
        assert!(collector.has_reason());
        assert_eq!(collector.finish().unwrap().text, "");
    }

    fn delta(content: &Value) -> Vec<u8> {
        json!({ "choices": [{ "delta": { "content": content } }] })
            .to_string()
            .into_bytes()
    }

    #[test]
    fn a_stream_is_collected() {
        let mut collector = Collector::default();
        let role = collector.take(&delta(&json!(""))).unwrap();
        assert!(!role.is_token);
        let thought = br#"{"choices": [{"delta": {"reasoning_content": "hm"}}]}"#;
        let thought = collector.take(thought).unwrap();
        assert!(thought.is_token && thought.delta.is_empty());
        let null = br#"{"choices": [{"delta": {"reasoning": null, "content": null}}]}"#;
        assert!(!collector.take(null).unwrap().is_token);
        assert_eq!(collector.take(&delta(&json!("Hel"))).unwrap().delta, "Hel");
        assert_eq!(collector.take(&delta(&json!("lo"))).unwrap().delta, "lo");
        let end = br#"{"choices": [{"delta": {}, "finish_reason": "length"}]}"#;
        collector.take(end).unwrap();
        let usage =
            br#"{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}, "model": "m"}"#;
        collector.take(usage).unwrap();
        collector.take(b" [DONE] ").unwrap();
        let late = collector.take(&delta(&json!("late"))).unwrap();
        assert_eq!(late.delta, "");
        let answer = collector.finish().unwrap();
        assert_eq!(answer.text, "Hello");
        assert_eq!(answer.finish_reason.as_deref(), Some("length"));
        assert_eq!(answer.completion_tokens, Some(2));
    }

    #[test]
    fn the_end_of_a_stream_decides_whether_it_is_whole() {
        let mut collector = Collector::default();
        collector.take(&delta(&json!("x"))).unwrap();
        assert_eq!(collector.finish(), Err(Kind::Truncated));
        let mut collector = Collector::default();
        collector.take(b"[DONE]").unwrap();
        assert_eq!(collector.finish(), Err(Kind::Malformed));
        let mut collector = Collector::default();
        assert_eq!(
            collector.take(br#"{"error": {"code": 500}}"#),
            Err(Kind::ErrorObject)
        );
        assert_eq!(collector.take(b"nonsense"), Err(Kind::Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = whole(&bytes);
            let _ = Collector::default().take(&bytes);
        }
    }
}
