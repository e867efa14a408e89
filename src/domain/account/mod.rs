//! The rules for the fields of a new account, and the checked types that prove them.
//!
//! The rules and their wording are those of Django and Django REST framework, which clients of the
//! old service know. Two are milder, so that its published example works: `a@b.c` is an address,
//! and `secret123` a password.

mod email;
mod password;
mod username;

pub use email::Email;
pub use password::NewPassword;
pub use username::{Username, canonical_username};

/// Says that a field is absent.
pub const REQUIRED: &str = "This field is required.";
/// Says that a field is null.
pub const NOT_NULL: &str = "This field may not be null.";
/// Says that a field is empty or white space only.
pub const NOT_BLANK: &str = "This field may not be blank.";
/// Says that a field is a boolean, a list or an object.
pub const NOT_A_STRING: &str = "Not a valid string.";
/// Says that a field holds U+0000.
pub const NO_NUL: &str = "Null characters are not allowed.";
/// Says that a name belongs to another account. Only the store knows that; the text is kept with
/// the others.
pub const USERNAME_TAKEN: &str = "A user with that username already exists.";
/// Says that an address is invalid; here also used for a value of the wrong type, in place of
/// [`NOT_A_STRING`].
pub const INVALID_EMAIL: &str = "Enter a valid email address.";

/// The problems of one field, in words for the user. Never quotes the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// The field's name in the request.
    pub field: &'static str,
    /// One sentence for each rule broken; at least one.
    pub messages: Vec<&'static str>,
}

/// The checked fields of a new account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewAccount {
    /// Its name.
    pub username: Username,
    /// Its address.
    pub email: Email,
    /// Its password, to be hashed.
    pub password: NewPassword,
}

impl NewAccount {
    /// Checks all fields at once. Each argument is the field's text, or the message that says why
    /// there is none ([`REQUIRED`], [`NOT_NULL`], …).
    ///
    /// Errors: every field that breaks a rule, in the order username, email, password. The rules on
    /// a password's strength are checked only when all fields are valid, because they compare the
    /// password with the name.
    pub fn parse(
        username: Result<&str, &'static str>,
        email: Result<&str, &'static str>,
        password: Result<&str, &'static str>,
    ) -> Result<Self, Vec<FieldError>> {
        let username = username.map_err(|m| vec![m]).and_then(Username::parse);
        let email = email.map_err(|m| vec![m]).and_then(Email::parse);
        let password = password.map_err(|m| vec![m]).and_then(password::text);
        match (username, email, password) {
            (Ok(username), Ok(email), Ok(text)) => match NewPassword::strong(text, &username) {
                Ok(password) => Ok(Self {
                    username,
                    email,
                    password,
                }),
                Err(messages) => Err(vec![FieldError {
                    field: "password",
                    messages,
                }]),
            },
            (username, email, password) => Err([
                ("username", username.err()),
                ("email", email.err()),
                ("password", password.err()),
            ]
            .into_iter()
            .filter_map(|(field, messages)| messages.map(|messages| FieldError { field, messages }))
            .collect()),
        }
    }
}

/// A field's text without the white space around it: what Python's `str.strip` removes, which is
/// Unicode's `White_Space` and the four separators U+001C to U+001F. Names, addresses and passwords
/// are trimmed at registration, so a login must trim them too.
pub fn trimmed(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

/// Whether `text` has more than `limit` characters (code points). Reads no more of it than needed.
fn longer_than(text: &str, limit: usize) -> bool {
    // A character takes at least one byte, so short texts need no counting.
    text.len() > limit && text.chars().nth(limit).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(
        username: &str,
        email: &str,
        password: &str,
    ) -> Vec<(&'static str, Vec<&'static str>)> {
        NewAccount::parse(Ok(username), Ok(email), Ok(password))
            .unwrap_err()
            .into_iter()
            .map(|error| (error.field, error.messages))
            .collect()
    }

    #[test]
    fn published_example_is_accepted() {
        let account = NewAccount::parse(Ok("alice"), Ok("a@b.c"), Ok("secret123")).unwrap();
        assert_eq!(account.username.as_str(), "alice");
        assert_eq!(account.email.as_str(), "a@b.c");
        assert_eq!(account.password.as_str(), "secret123");
    }

    #[test]
    fn white_space_around_every_field_is_removed() {
        let account =
            NewAccount::parse(Ok(" alice\n"), Ok("\ta@b.c "), Ok("\u{1f} secret123\u{a0}"))
                .unwrap();
        assert_eq!(account.username.as_str(), "alice");
        assert_eq!(account.email.as_str(), "a@b.c");
        assert_eq!(account.password.as_str(), "secret123");
    }

    #[test]
    fn every_broken_field_is_named_in_order() {
        assert_eq!(
            NewAccount::parse(Err(REQUIRED), Err(NOT_NULL), Err(NOT_A_STRING)).unwrap_err(),
            [
                FieldError {
                    field: "username",
                    messages: vec![REQUIRED]
                },
                FieldError {
                    field: "email",
                    messages: vec![NOT_NULL]
                },
                FieldError {
                    field: "password",
                    messages: vec![NOT_A_STRING]
                },
            ]
        );
    }

    #[test]
    fn blank_fields_are_refused() {
        assert_eq!(
            errors("", " ", "\t\n"),
            [
                ("username", vec![NOT_BLANK]),
                ("email", vec![NOT_BLANK]),
                ("password", vec![NOT_BLANK])
            ]
        );
    }

    #[test]
    fn strength_of_a_password_is_checked_only_when_all_fields_are_valid() {
        let fields: Vec<_> = errors("two words", "x", "abc")
            .into_iter()
            .map(|(field, _)| field)
            .collect();
        assert_eq!(fields, ["username", "email"]);
    }

    #[test]
    fn debug_output_hides_the_password() {
        let account = NewAccount::parse(Ok("alice"), Ok("a@b.c"), Ok("secret123")).unwrap();
        assert!(!format!("{account:?}").contains("secret123"));
    }

    #[test]
    fn hostile_sizes_and_bytes_are_refused_cheaply() {
        for unit in [
            "a",
            "1",
            "\u{fdfa}",
            "e\u{301}",
            "@",
            ".",
            "a.",
            "\0",
            "\u{10ffff}",
        ] {
            let huge = unit.repeat((1 << 20) / unit.len());
            let fields: Vec<_> = errors(&huge, &huge, "Str0ng-enough")
                .into_iter()
                .map(|(field, _)| field)
                .collect();
            assert_eq!(fields, ["username", "email"], "{unit:?}");
            assert_eq!(errors("alice", "a@b.c", &huge)[0].0, "password", "{unit:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_checked_without_a_panic(username: String, email: String, password: String) {
            if let Ok(account) = NewAccount::parse(Ok(&username), Ok(&email), Ok(&password)) {
                // What was accepted is accepted again, unchanged.
                let again = NewAccount::parse(
                    Ok(account.username.as_str()), Ok(account.email.as_str()), Ok(account.password.as_str()));
                proptest::prop_assert_eq!(again, Ok(account));
            }
        }
    }
}
