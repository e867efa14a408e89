//! One line's JSON object, read field by field, so that an error can name the field.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde_json::error::Category;
use serde_json::value::RawValue;

/// The longest name of an unknown field that is shown.
const MAX_NAME_BYTES: usize = 40;

/// The problem of one line. Quotes at most a field's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineProblem {
    /// The bytes are not text.
    #[error("it is not UTF-8 from column {0} on")]
    NotUtf8(usize),
    /// The text is not JSON.
    #[error("it is not JSON from column {0} on")]
    NotJson(usize),
    /// The text is the beginning of JSON.
    #[error("it ends before its JSON does: is the file cut off?")]
    CutOff,
    /// The text is JSON, but not an object.
    #[error("it is not a JSON object")]
    NotObject,
    /// A field is missing.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A field comes more than once.
    #[error("`{0}` comes more than once")]
    Repeated(&'static str),
    /// A field has a name that is not known here. The name is left out if it is not a plain one.
    #[error(
        "it has a field that is not known here{}{}{}",
        if .0.is_some() { ": `" } else { "" },
        .0.as_deref().unwrap_or_default(),
        if .0.is_some() { "`" } else { "" }
    )]
    Unknown(Option<Box<str>>),
    /// A value is of another type than its field's, or has no meaning.
    #[error("`{field}` must be {expected}")]
    Value {
        /// The field.
        field: &'static str,
        /// What the field takes.
        expected: &'static str,
    },
    /// The line is too long to be read.
    #[error("it is longer than 64 MiB")]
    TooLong,
}

/// The fields of an object that have not been taken yet.
#[derive(Debug)]
pub(super) struct Fields<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Fields<'a> {
    /// Reads a line: its fields in their order.
    pub fn of(line: &'a [u8]) -> Result<Self, LineProblem> {
        let text = std::str::from_utf8(line)
            .map_err(|error| LineProblem::NotUtf8(column(line, error.valid_up_to())))?;
        serde_json::from_str(text).map_err(|error| match error.classify() {
            Category::Eof => LineProblem::CutOff,
            Category::Data => LineProblem::NotObject,
            Category::Syntax | Category::Io => {
                // The parser counts bytes, and from 1.
                LineProblem::NotJson(column(line, error.column().saturating_sub(1)))
            }
        })
    }

    /// Takes a field; `None` if it is missing.
    pub fn take<T: DeserializeOwned>(
        &mut self,
        field: &'static str,
        expected: &'static str,
    ) -> Result<Option<T>, LineProblem> {
        let Some(at) = self.0.iter().position(|(name, _)| name == field) else {
            return Ok(None);
        };
        let (_, value) = self.0.swap_remove(at);
        if self.0.iter().any(|(name, _)| name == field) {
            return Err(LineProblem::Repeated(field));
        }
        serde_json::from_str(value.get())
            .map(Some)
            .map_err(|_| LineProblem::Value { field, expected })
    }

    /// Takes a field that must be there.
    pub fn need<T: DeserializeOwned>(
        &mut self,
        field: &'static str,
        expected: &'static str,
    ) -> Result<T, LineProblem> {
        self.take(field, expected)?
            .ok_or(LineProblem::Missing(field))
    }

    /// Refuses fields that have not been taken: a misspelt field must not lose its value.
    pub fn end(self) -> Result<(), LineProblem> {
        let Some((name, _)) = self.0.into_iter().next() else {
            return Ok(());
        };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        let is_shown = name.len() <= MAX_NAME_BYTES && name.chars().all(is_plain);
        Err(LineProblem::Unknown(is_shown.then(|| name.into())))
    }
}

/// The column of a byte in a line, in characters and from 1, as editors show it.
fn column(line: &[u8], byte: usize) -> usize {
    let before = line.get(..byte).unwrap_or(line);
    String::from_utf8_lossy(before).chars().count() + 1
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Fields(members))
            }
        }

        deserializer.deserialize_map(Members)
    }
}
