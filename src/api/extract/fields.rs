//! A body's fields, and the rules by which the serializers of the replaced system read them.

use std::collections::HashMap;

use crate::domain::account::{NO_NUL, NOT_A_STRING, NOT_BLANK, NOT_NULL, REQUIRED, trimmed};
use crate::error::{Error, FieldErrors};

/// Says that a field is no list of texts.
const NOT_TEXTS: &str = "Expected a list of strings.";

/// One field as it was received.
#[derive(Clone, Debug, PartialEq)]
pub enum Field {
    /// JSON's null.
    Null,
    /// JSON's true or false.
    Flag(bool),
    /// A JSON number, as it was written: no digit is lost to a binary form.
    Number(String),
    /// A JSON string, or a form's text.
    Text(String),
    /// A JSON list, as it was written. Most routes take none, so it is read only where one is.
    List(String),
    /// An object, a file, or bytes that are no text.
    NotText,
}

/// A text or a number, as it was written.
#[derive(Clone, Debug, PartialEq)]
pub enum Scalar {
    /// A JSON number.
    Number(String),
    /// A text.
    Text(String),
}

/// A body's fields. If a name comes twice, the last one counts. Names that the route does not read
/// are ignored.
#[derive(Debug, Default)]
pub struct Fields {
    fields: HashMap<String, Field>,
    errors: FieldErrors,
}

impl FromIterator<(String, Field)> for Fields {
    fn from_iter<I: IntoIterator<Item = (String, Field)>>(fields: I) -> Self {
        Self {
            fields: fields.into_iter().collect(),
            errors: Vec::new(),
        }
    }
}

impl Fields {
    /// Sets a field, and replaces an earlier one of that name.
    pub fn insert(&mut self, name: String, field: Field) {
        self.fields.insert(name, field);
    }

    /// Bytes of text in all fields together.
    pub fn text_bytes(&self) -> usize {
        let bytes = |field: &Field| match field {
            Field::Text(text) | Field::Number(text) | Field::List(text) => text.len(),
            Field::Null | Field::Flag(_) | Field::NotText => 0,
        };
        self.fields.values().map(bytes).sum()
    }

    /// Whether the field is there, whatever it holds.
    pub fn has(&self, name: &str) -> bool {
        self.fields.contains_key(name)
    }

    /// A text as it was received, or the message that says why there is none. For fields that have
    /// further rules.
    pub fn raw_text(&mut self, name: &str) -> Result<String, &'static str> {
        raw_text_of(self.fields.remove(name).ok_or(REQUIRED)?)
    }

    /// A required text, trimmed; a number counts as its text. Empty if it breaks a rule:
    /// [`Self::check`] then reports it.
    pub fn text(&mut self, name: &'static str) -> String {
        let outcome = self.raw_text(name).and_then(sound);
        self.note(name, outcome).unwrap_or_default()
    }

    /// A text that may be left out or be null; blank counts as left out.
    pub fn optional_text(&mut self, name: &'static str) -> Option<String> {
        let field = self.fields.remove(name)?;
        if field == Field::Null || is_blank(&field) {
            return None;
        }
        let outcome = raw_text_of(field).and_then(sound);
        self.note(name, outcome)
    }

    /// A text that may be left out, which is `None`, or be null, which is `Some(None)`. For
    /// changes, where both mean different things.
    pub fn nullable_text(&mut self, name: &'static str) -> Option<Option<String>> {
        let text = match self.nullable_scalar(name)? {
            None => return Some(None),
            Some(Scalar::Text(text)) => Ok(text),
            Some(Scalar::Number(_)) => Err(NOT_A_STRING),
        };
        self.note(name, text).map(Some)
    }

    /// A text or a number, in the same way.
    pub fn nullable_scalar(&mut self, name: &'static str) -> Option<Option<Scalar>> {
        let scalar = match self.fields.remove(name)? {
            Field::Null => return Some(None),
            Field::Number(number) => Ok(Scalar::Number(number)),
            Field::Text(text) => Ok(Scalar::Text(text)),
            Field::Flag(_) | Field::List(_) | Field::NotText => Err(NOT_A_STRING),
        };
        self.note(name, scalar).map(Some)
    }

    /// A list of texts that may be left out, which is `None`, or be null, which is `Some(None)`.
    pub fn nullable_texts(&mut self, name: &'static str) -> Option<Option<Vec<String>>> {
        let outcome = match self.fields.remove(name)? {
            Field::Null => return Some(None),
            Field::List(json) => serde_json::from_str(&json).map_err(|_| NOT_TEXTS),
            Field::Text(_) | Field::Flag(_) | Field::Number(_) | Field::NotText => Err(NOT_TEXTS),
        };
        self.note(name, outcome).map(Some)
    }

    /// Reports that a field breaks a rule of its own.
    pub fn refuse(&mut self, name: &'static str, message: impl Into<String>) {
        self.errors.push((name, vec![message.into()]));
    }

    /// A boolean, `false` if left out, in all spellings that the replaced system accepted.
    pub fn flag(&mut self, name: &'static str) -> bool {
        self.optional_flag(name).unwrap_or_default()
    }

    /// The same, with `None` if it is left out, for a flag whose default depends on something else.
    pub fn optional_flag(&mut self, name: &'static str) -> Option<bool> {
        let outcome = match self.fields.remove(name)? {
            Field::Flag(flag) => Ok(flag),
            Field::Null => Err(NOT_NULL),
            Field::Number(text) | Field::Text(text) => spelled(trimmed(&text)),
            Field::List(_) | Field::NotText => Err("Must be a valid boolean."),
        };
        self.note(name, outcome)
    }

    /// Reports the errors of the fields read so far.
    ///
    /// # Errors
    /// `InvalidFields` if there are any.
    pub fn check(&mut self) -> Result<(), Error> {
        if self.errors.is_empty() {
            Ok(())
        } else {
            Err(Error::InvalidFields(std::mem::take(&mut self.errors)))
        }
    }

    fn note<T>(&mut self, name: &'static str, outcome: Result<T, &str>) -> Option<T> {
        outcome
            .map_err(|message| self.errors.push((name, vec![message.to_owned()])))
            .ok()
    }
}

fn raw_text_of(field: Field) -> Result<String, &'static str> {
    match field {
        Field::Null => Err(NOT_NULL),
        Field::Number(text) | Field::Text(text) => Ok(text),
        Field::Flag(_) | Field::List(_) | Field::NotText => Err(NOT_A_STRING),
    }
}

fn sound(text: String) -> Result<String, &'static str> {
    let inner = trimmed(&text);
    if inner.is_empty() {
        return Err(NOT_BLANK);
    }
    if inner.contains('\0') {
        return Err(NO_NUL);
    }
    // Most texts have nothing to trim and are kept as they are.
    Ok(if inner.len() == text.len() {
        text
    } else {
        inner.to_owned()
    })
}

fn is_blank(field: &Field) -> bool {
    matches!(field, Field::Text(text) if trimmed(text).is_empty())
}

fn spelled(word: &str) -> Result<bool, &'static str> {
    match word.to_ascii_lowercase().as_str() {
        "t" | "y" | "yes" | "true" | "on" | "1" | "1.0" => Ok(true),
        "f" | "n" | "no" | "false" | "off" | "0" | "0.0" => Ok(false),
        _ => Err("Must be a valid boolean."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(field: Field) -> Fields {
        [("field".to_owned(), field)].into_iter().collect()
    }

    fn text(field: Field) -> Result<String, Error> {
        let mut fields = one(field);
        let text = fields.text("field");
        fields.check().map(|()| text)
    }

    fn word(word: &str) -> Field {
        Field::Text(word.to_owned())
    }

    #[test]
    fn texts_are_trimmed_and_numbers_are_texts() {
        assert_eq!(text(word("  hi \n")).unwrap(), "hi");
        for number in ["123", "1.5", "123456789012345678901234567890"] {
            assert_eq!(text(Field::Number(number.to_owned())).unwrap(), number);
        }
    }

    #[test]
    fn values_that_are_no_text_are_refused() {
        for bad in [
            Field::Null,
            word(""),
            word("   "),
            Field::Flag(true),
            Field::NotText,
            Field::List("[]".to_owned()),
            word("a\0b"),
        ] {
            assert!(text(bad.clone()).is_err(), "{bad:?}");
        }
        let mut none = Fields::default();
        assert_eq!(none.text("prompt"), "");
        assert!(none.check().is_err());
        assert!(none.check().is_ok(), "an error is reported once");
    }

    #[test]
    fn flags_are_read_in_every_recorded_spelling() {
        let flag = |field: Field| {
            let mut fields = one(field);
            let flag = fields.flag("field");
            fields.check().map(|()| flag)
        };
        for yes in [
            Field::Flag(true),
            word("yes"),
            word("on"),
            word("t"),
            word("1"),
            word("TRUE"),
            Field::Number("1".into()),
        ] {
            assert!(flag(yes.clone()).unwrap(), "{yes:?}");
        }
        for no in [Field::Flag(false), word("no"), Field::Number("0".into())] {
            assert!(!flag(no.clone()).unwrap(), "{no:?}");
        }
        for bad in [
            Field::Null,
            word("maybe"),
            Field::Number("2".into()),
            Field::NotText,
        ] {
            assert!(flag(bad.clone()).is_err(), "{bad:?}");
        }
        assert!(!Fields::default().flag("websocket"));
    }

    #[test]
    fn lists_hold_texts_alone() {
        let list = |field| {
            let mut fields = one(field);
            let list = fields.nullable_texts("field");
            fields.check().map(|()| list.flatten())
        };
        let json = |json: &str| list(Field::List(json.to_owned()));
        let both = Some(vec!["a".to_owned(), "b".to_owned()]);
        assert_eq!(json(r#"["a", "b"]"#).unwrap(), both);
        assert_eq!(json("[]").unwrap(), Some(Vec::new()));
        assert_eq!(list(Field::Null).unwrap(), None);
        for bad in ["[1]", "[null]", r#"["a", ["b"]]"#] {
            assert!(json(bad).is_err(), "{bad}");
        }
        for bad in [word("a,b"), Field::Flag(true), Field::NotText] {
            assert!(list(bad.clone()).is_err(), "{bad:?}");
        }
        assert_eq!(Fields::default().nullable_texts("field"), None);
        assert_eq!(one(Field::Null).nullable_texts("field"), Some(None));
    }

    #[test]
    fn null_is_told_from_what_was_left_out() {
        assert_eq!(Fields::default().nullable_text("field"), None);
        assert_eq!(one(Field::Null).nullable_text("field"), Some(None));
        let blank = Some(Some(" ".to_owned()));
        assert_eq!(one(word(" ")).nullable_text("field"), blank);
        let number = Field::Number("1.50".to_owned());
        let scalar = Some(Some(Scalar::Number("1.50".to_owned())));
        assert_eq!(one(number.clone()).nullable_scalar("field"), scalar);
        assert_eq!(one(Field::Null).nullable_scalar("field"), Some(None));
        let mut fields = one(number);
        assert_eq!(fields.nullable_text("field"), None);
        assert!(fields.check().is_err());
        let mut fields = one(word("x"));
        fields.refuse("field", "It is taken.");
        assert!(fields.check().is_err());
    }

    #[test]
    fn optional_texts_may_be_left_out_null_or_blank() {
        for none in [Field::Null, word(""), word("  ")] {
            assert_eq!(one(none).optional_text("field"), None);
        }
        assert_eq!(Fields::default().optional_text("field"), None);
        assert_eq!(one(word("x")).optional_text("field").as_deref(), Some("x"));
        let mut list = one(Field::NotText);
        assert_eq!(list.optional_text("field"), None);
        assert!(list.check().is_err());
    }
}
