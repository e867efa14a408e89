//! What a service logs, kept to be looked at.

use std::sync::{Arc, Mutex, OnceLock};

use prompt_service::telemetry::{LineFormat, LogLines};
use serde_json::Value;
use tracing::Dispatch;
use tracing_subscriber::layer::SubscriberExt;

/// The log of one service, in the form that operators get, at every level.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// A subscriber that writes here.
    pub fn dispatch(&self) -> Dispatch {
        // While there is only one subscriber, the first thread that reaches a log statement decides
        // for all threads whether it has a listener. A thread of another test has no subscriber and
        // would disable the statement here.
        static SECOND: OnceLock<Dispatch> = OnceLock::new();
        SECOND.get_or_init(|| Dispatch::new(tracing_subscriber::registry()));
        let written = Arc::clone(&self.0);
        let lines = LogLines {
            format: LineFormat::Json,
            write: move |line: &[u8]| written.lock().unwrap().extend_from_slice(line),
        };
        Dispatch::new(tracing_subscriber::registry().with(lines))
    }

    /// All of it so far.
    pub fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// Its lines so far.
    pub fn lines(&self) -> Vec<Value> {
        let text = self.text();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// The line about the request of that id, if it is there yet.
    pub fn request(&self, id: &str) -> Option<Value> {
        let is_its = |line: &Value| {
            line["request_id"] == id
                && matches!(line["message"].as_str(), Some("request" | "request failed"))
        };
        self.lines().into_iter().find(is_its)
    }
}
