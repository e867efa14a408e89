//! Secrets: read from the environment only, never from a flag, never shown.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::Error;

/// The longest file that is read for a secret, in bytes. A key or an address takes a few hundred.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// A value that must not be shown: its `Debug` form hides it, and it has no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// Reads a file that holds the value, and perhaps one line feed after it.
    ///
    /// Anything else that an editor or a shell leaves in such a file is refused. As a part of the
    /// value it would silently change the key.
    ///
    /// # Errors
    /// `Unreadable`; `Flaw` if the file has more than the value.
    pub fn read_file(path: &Path) -> Result<Self, FileError> {
        let mut bytes = Vec::new();
        File::open(path)?
            .take(MAX_FILE_BYTES + 1)
            .read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(FileError::Flaw("is longer than 64 KiB"));
        }
        let text = String::from_utf8(bytes).map_err(|_| FileError::Flaw("is no UTF-8 text"))?;
        let value = text.strip_suffix('\n').unwrap_or(&text);
        match flaw(value) {
            Some(flaw) => Err(FileError::Flaw(flaw)),
            None => Ok(Self::new(value)),
        }
    }

    /// The value itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// Why a file has no usable secret. The text completes a sentence that begins with the file's name,
/// and quotes nothing of the file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file cannot be read.
    #[error("cannot be read: {}", .0.kind())]
    Unreadable(#[from] io::Error),
    /// The file has more than the value, or no value.
    #[error("{0}")]
    Flaw(&'static str),
}

/// A flaw of a secret's text: something that cannot be meant as a part of the secret.
fn flaw(text: &str) -> Option<&'static str> {
    if text.is_empty() {
        Some("is empty")
    } else if text.starts_with('\u{feff}') {
        Some("begins with a byte order mark (BOM): save it as UTF-8 without one")
    } else if text.contains('\r') {
        Some("has Windows line ends (CRLF): save it with LF alone")
    } else if text.ends_with('\n') {
        Some("ends with an empty line: remove it")
    } else if text.contains('\n') {
        Some("has more than one line: a secret is a single one")
    } else if text != text.trim() {
        Some("begins or ends with a blank: remove it")
    } else if text.contains(char::is_control) {
        Some("has a control character in it: remove it")
    } else {
        None
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The settings that are secrets. Each is read from `NAME`, or from the file that `NAME_FILE`
/// names.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    /// `DATABASE_URL`.
    pub database_url: Option<Secret>,
    /// `REDIS_URL`.
    pub redis_url: Option<Secret>,
    /// `SECRET_KEY`.
    pub secret_key: Option<Secret>,
    /// `SECRET_KEY_FALLBACKS`, split at commas.
    pub secret_key_fallbacks: Vec<Secret>,
    /// `OPENAI_API_KEY`.
    pub openai_api_key: Option<Secret>,
    /// The keys of `OPENAI_FALLBACK` and `UPSTREAMS`, each under the variable that the list names.
    pub upstream_keys: Vec<(String, Secret)>,
}

impl Secrets {
    /// Reads the secrets through `variable`, which looks a name up in the environment.
    ///
    /// # Errors
    /// A secret given in both ways, one that is no text, or a file that cannot be read.
    pub fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, Error> {
        let read = |name: &'static str| read_one(name, &variable);
        let fallbacks = read("SECRET_KEY_FALLBACKS")?;
        Ok(Self {
            database_url: read("DATABASE_URL")?,
            redis_url: read("REDIS_URL")?,
            secret_key: read("SECRET_KEY")?,
            secret_key_fallbacks: fallbacks
                .iter()
                .flat_map(|all| all.expose().split(','))
                .map(str::trim)
                .filter(|key| !key.is_empty())
                .map(Secret::new)
                .collect(),
            openai_api_key: read("OPENAI_API_KEY")?,
            upstream_keys: Vec::new(),
        })
    }

    /// Reads the keys of upstreams that the variables of those names hold, if they are set.
    /// `setting` has the names.
    ///
    /// # Errors
    /// A key given in both ways, one that is no text, or a file that cannot be read. The message
    /// names the setting.
    pub fn read_upstream_keys<'a>(
        &mut self,
        setting: &'static str,
        names: impl IntoIterator<Item = &'a str>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<(), Error> {
        for name in names {
            if let Some(key) = value_or_file(setting, name, &variable)? {
                self.upstream_keys.push((name.to_owned(), key));
            }
        }
        Ok(())
    }
}

fn read_one(
    name: &'static str,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Option<Secret>, Error> {
    value_or_file(name, name, variable)
}

/// The secret in the variable `name`, or in the file that its `_FILE` form names. Errors name
/// `setting`.
fn value_or_file(
    setting: &'static str,
    name: &str,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Option<Secret>, Error> {
    // An empty variable counts as unset: compose files pass every name through, set or not.
    let value = variable(name).filter(|value| !value.is_empty());
    let file = variable(&format!("{name}_FILE")).filter(|path| !path.is_empty());
    match (value, file) {
        (Some(_), Some(_)) => Err(Error::new(
            setting,
            format!("set {name} or {name}_FILE, not both"),
        )),
        // Counted as unset, such a value would make the service run with another key, or on another
        // store, than its operator believes.
        (Some(value), None) => {
            let value = value
                .into_string()
                .map_err(|_| Error::new(setting, "its value is no UTF-8 text"))?;
            match flaw(&value) {
                Some(flaw) => Err(Error::new(setting, format!("its value {flaw}"))),
                None => Ok(Some(Secret::new(value))),
            }
        }
        (None, Some(path)) => Secret::read_file(Path::new(&path))
            .map(Some)
            .map_err(|error| Error::new(setting, format!("the file of {name}_FILE {error}"))),
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::config::Fallbacks;

    fn read(pairs: &[(&str, &str)]) -> Result<Secrets, Error> {
        let map: HashMap<_, _> = pairs.iter().copied().collect();
        Secrets::read(|name| map.get(name).map(OsString::from))
    }

    /// The key that a file of these bytes gives.
    fn key_in_file(bytes: &[u8]) -> Result<Option<Secret>, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let secrets = read(&[("SECRET_KEY_FILE", file.path().to_str().unwrap())]);
        secrets.map(|secrets| secrets.secret_key)
    }

    #[test]
    fn a_secret_may_come_from_a_file_without_its_trailing_newline() {
        let key = Some(Secret::new("django-insecure-4x$ab(9! é"));
        for bytes in ["django-insecure-4x$ab(9! é\n", "django-insecure-4x$ab(9! é"] {
            assert_eq!(key_in_file(bytes.as_bytes()).unwrap(), key);
        }
    }

    #[test]
    fn text_that_an_editor_adds_to_a_secret_is_refused_and_named() {
        for (bytes, expected) in [
            (&b"hunter2\r\n"[..], "CRLF"),
            (b"hunter2\r", "CRLF"),
            (b"hunter2 \n", "blank"),
            (b"hunter2 ", "blank"),
            (b" hunter2\n", "blank"),
            (b"hunter2\t\n", "blank"),
            (b"hunter2\n\n", "empty line"),
            (b"hunter2\n\n\n", "empty line"),
            (b"\nhunter2", "more than one line"),
            (b"hunter2\nhunter2\n", "more than one line"),
            (b"\xef\xbb\xbfhunter2\n", "BOM"),
            (b"\xff\xfeh\0u\0", "UTF-8"),
            (b"hunter2\0\n", "control"),
            (b"", "empty"),
            (b"\n", "empty"),
            (&[b'k'; (64 << 10) + 1], "64 KiB"),
        ] {
            let error = key_in_file(bytes).unwrap_err().to_string();
            let names = error.starts_with("SECRET_KEY: the file of SECRET_KEY_FILE ");
            assert!(names && error.contains(expected), "{expected}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn value_of_a_variable_is_checked_like_a_file() {
        for value in ["hunter2\n", "hunter2 ", " hunter2", "hunter2\r"] {
            let error = read(&[("SECRET_KEY", value)]).unwrap_err().to_string();
            assert!(error.starts_with("SECRET_KEY: its value "), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_refused_by_its_variables_name() {
        for path in ["/nonexistent", "/"] {
            let error = read(&[("REDIS_URL_FILE", path)]).unwrap_err().to_string();
            assert!(error.starts_with("REDIS_URL: the file of REDIS_URL_FILE cannot be read"));
        }
    }

    #[test]
    fn both_forms_at_once_are_refused() {
        let error = read(&[("SECRET_KEY", "a"), ("SECRET_KEY_FILE", "/b")]).unwrap_err();
        assert!(error.to_string().starts_with("SECRET_KEY: "));
    }

    #[test]
    fn secret_that_is_no_text_is_refused_and_does_not_count_as_unset() {
        use std::os::unix::ffi::OsStringExt;
        let bytes = || OsString::from_vec(b"hunter2 \xff".to_vec());
        for setting in ["SECRET_KEY", "DATABASE_URL", "SECRET_KEY_FALLBACKS"] {
            let error = Secrets::read(|name| (name == setting).then(bytes)).unwrap_err();
            let error = error.to_string();
            assert!(error.starts_with(&format!("{setting}: ")), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_fallbacks_key_is_read_from_the_variable_it_names() {
        let list: Fallbacks = r#"[{"model": "m", "base_url": "https://a", "api_key_env": "A_KEY"},
            {"model": "m", "base_url": "https://b", "api_key_env": "B_KEY"},
            {"model": "m", "base_url": "https://c"}]"#
            .parse()
            .unwrap();
        let mut secrets = Secrets::default();
        let variable = |name: &str| (name == "B_KEY").then(|| OsString::from("sk-b"));
        let names = list.key_variables();
        secrets
            .read_upstream_keys("OPENAI_FALLBACK", names, variable)
            .unwrap();
        let expected = ("B_KEY".to_owned(), Secret::new("sk-b"));
        assert_eq!(secrets.upstream_keys, [expected]);
    }

    #[test]
    fn empty_counts_as_unset_and_fallbacks_are_split() {
        let secrets = read(&[("REDIS_URL", ""), ("SECRET_KEY_FALLBACKS", "one, two,")]).unwrap();
        assert_eq!(secrets.redis_url, None);
        assert_eq!(
            secrets.secret_key_fallbacks,
            [Secret::new("one"), Secret::new("two")]
        );
    }

    #[test]
    fn debug_hides_the_value() {
        assert!(!format!("{:?}", Secret::new("hunter2")).contains("hunter2"));
    }
}
