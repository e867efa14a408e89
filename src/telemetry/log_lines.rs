//! Log lines: one per event, with the fields of the spans around it beside the event's own.

use serde::ser::{SerializeMap, Serializer};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::fields::Fields;
use super::pretty::pretty_line;
use crate::domain::Timestamp;

/// The form of a line.
#[derive(Clone, Copy, Debug)]
pub enum LineFormat {
    /// A JSON object. The fields of events and spans are members of it.
    Json,
    /// For people.
    Pretty {
        /// Whether the terminal shows colours.
        has_colour: bool,
    },
}

/// Writes each event as one line.
///
/// `tracing-subscriber` has such a layer too. Its JSON puts the fields of spans into an object of
/// their own, or leaves them out; here they stand beside those of the event, where a search for
/// `request_id` finds them.
pub struct LogLines<W> {
    /// The form of each line.
    pub format: LineFormat,
    /// Takes each line, with the newline at its end.
    pub write: W,
}

impl<S, W> Layer<S> for LogLines<W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: Fn(&[u8]) + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        // From the innermost span outwards: the value that is nearest to the event counts.
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(outer) = span.extensions().get::<Fields>() {
                fields.add_absent(outer);
            }
        }
        let mut line = match self.format {
            LineFormat::Json => json_line(event.metadata(), &fields),
            LineFormat::Pretty { has_colour } => {
                pretty_line(event.metadata(), &fields, has_colour).into_bytes()
            }
        };
        line.push(b'\n');
        (self.write)(&line);
    }
}

fn json_line(metadata: &Metadata<'_>, fields: &Fields) -> Vec<u8> {
    let mut line = Vec::with_capacity(256);
    let written = (|| {
        let mut serializer = serde_json::Serializer::new(&mut line);
        let mut object = serializer.serialize_map(None)?;
        object.serialize_entry("timestamp", &Timestamp::now().to_string())?;
        object.serialize_entry("level", metadata.level().as_str())?;
        for (name, value) in &fields.0 {
            object.serialize_entry(name, value)?;
        }
        object.serialize_entry("target", metadata.target())?;
        object.end()
    })();
    written.expect("texts, numbers and booleans are JSON");
    line
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// The lines that `log` logs.
    pub fn lines_of(format: LineFormat, log: impl FnOnce()) -> Vec<String> {
        let written = Arc::new(Mutex::new(Vec::new()));
        let lines = LogLines {
            format,
            write: {
                let written = Arc::clone(&written);
                move |line: &[u8]| written.lock().unwrap().extend_from_slice(line)
            },
        };
        let subscriber = tracing_subscriber::registry().with(lines);
        tracing::subscriber::with_default(subscriber, log);
        let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn json_of(log: impl FnOnce()) -> Vec<serde_json::Value> {
        let lines = lines_of(LineFormat::Json, log);
        let parse = |line: String| serde_json::from_str(&line).unwrap();
        lines.into_iter().map(parse).collect()
    }

    #[test]
    fn json_line_holds_time_level_fields_and_target() {
        let lines = lines_of(LineFormat::Json, || {
            tracing::warn!(text = "a \"b\"", n = 5_u64, share = 0.5, ok = true, error = %"x\ny", "m");
        });
        let (timestamp, rest) = lines[0].split_at("{\"timestamp\":\"".len() + 27);
        let time = timestamp.trim_start_matches("{\"timestamp\":\"");
        assert!(humantime::parse_rfc3339(time).is_ok(), "{time}");
        assert_eq!(
            rest,
            concat!(
                r#"","level":"WARN","message":"m","text":"a \"b\"","n":5,"share":0.5,"ok":true,"#,
                r#""error":"x\ny","target":"prompt_service::telemetry::log_lines::tests"}"#
            )
        );
    }

    #[test]
    fn fields_of_all_spans_around_an_event_are_members_of_its_line() {
        let lines = json_of(|| {
            let empty = tracing::field::Empty;
            let request = tracing::error_span!("request", request_id = "r-1", user_id = empty);
            request.in_scope(|| {
                tracing::info!("unknown user");
                tracing::Span::current().record("user_id", 7);
                tracing::error_span!("call", prompt_id = 3).in_scope(|| tracing::info!("call"));
            });
            tracing::info!("outside");
        });
        let ids = |line: &serde_json::Value| {
            ["request_id", "user_id", "prompt_id"].map(|name| line[name].to_string())
        };
        assert_eq!(ids(&lines[0]), ["\"r-1\"", "null", "null"]);
        assert_eq!(ids(&lines[1]), ["\"r-1\"", "7", "3"]);
        assert_eq!(ids(&lines[2]), ["null", "null", "null"]);
    }

    #[test]
    fn innermost_value_of_a_name_is_the_only_one() {
        let lines = lines_of(LineFormat::Json, || {
            let outer = tracing::error_span!("outer", attempt = 1, user_id = 1);
            let _outer = outer.enter();
            let _inner = tracing::error_span!("inner", user_id = 2).entered();
            tracing::info!(attempt = 3);
        });
        assert!(
            lines[0].contains(r#""attempt":3,"user_id":2,"target""#),
            "{lines:?}"
        );
    }
}
