//! The fields of an event or a span, as they were recorded.

use std::fmt::Debug;

use tracing::field::{Field, Visit};

/// Fields by name, in the order in which they were recorded.
#[derive(Default)]
pub struct Fields(pub Vec<(&'static str, Value)>);

/// What a field holds.
#[derive(Clone, serde::Serialize)]
#[serde(untagged)]
pub enum Value {
    /// A number or a boolean.
    Plain(serde_json::Value),
    /// A text.
    Text(String),
    /// What `Debug` or `Display` writes of some other value.
    Formatted(String),
}

impl Fields {
    fn set(&mut self, field: &Field, value: Value) {
        match self.0.iter_mut().find(|(name, _)| *name == field.name()) {
            Some((_, earlier)) => *earlier = value,
            None => self.0.push((field.name(), value)),
        }
    }

    /// Adds those of `others` whose names are not there yet.
    pub fn add_absent(&mut self, others: &Self) {
        for (name, value) in &others.0 {
            if self.0.iter().all(|(known, _)| known != name) {
                self.0.push((name, value.clone()));
            }
        }
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, Value::Plain(value.into()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, Value::Plain(value.into()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, Value::Plain(value.into()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, Value::Plain(value.into()));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, Value::Text(value.to_owned()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.set(field, Value::Formatted(format!("{value:?}")));
    }
}
