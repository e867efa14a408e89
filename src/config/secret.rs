//! Secrets: read from the environment only, never from a flag, never shown.

use std::ffi::OsString;
use std::fmt;

use super::{Error, Fallbacks};

/// A value that must not be shown: its `Debug` form hides it, and it has no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The settings that are secrets. Each is read from `NAME`, or from the file that `NAME_FILE` names.
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
    /// The keys of `OPENAI_FALLBACK`, each under the variable that the list names.
    pub openai_fallback_keys: Vec<(String, Secret)>,
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
            openai_fallback_keys: Vec::new(),
        })
    }

    /// Reads the keys that `fallbacks` name, those that are set.
    ///
    /// # Errors
    /// A key given in both ways, one that is no text, or a file that cannot be read; the name in the message is the setting's.
    pub fn read_fallback_keys(
        &mut self,
        fallbacks: &Fallbacks,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<(), Error> {
        for name in fallbacks
            .0
            .iter()
            .filter_map(|each| each.api_key_env.as_ref())
        {
            if let Some(key) = value_or_file("OPENAI_FALLBACK", name, &variable)? {
                self.openai_fallback_keys.push((name.clone(), key));
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

/// The secret in the variable `name`, or in the file that its `_FILE` form names; errors speak of `setting`.
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
            "set a secret or its _FILE form, not both",
        )),
        // Taken for unset, it would have the service run with another key, or on another store, than its operator believes.
        (Some(value), None) => match value.into_string() {
            Ok(value) => Ok(Some(Secret::new(value))),
            Err(_) => Err(Error::new(setting, "its value is no UTF-8 text")),
        },
        (None, Some(path)) => match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(Secret::new(text.strip_suffix('\n').unwrap_or(&text)))),
            Err(error) => Err(Error::new(
                setting,
                format!("its _FILE cannot be read: {}", error.kind()),
            )),
        },
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Secrets, Error> {
        let map: HashMap<_, _> = pairs.iter().copied().collect();
        Secrets::read(|name| map.get(name).map(OsString::from))
    }

    #[test]
    fn a_secret_may_come_from_a_file_without_its_trailing_newline() {
        let path =
            std::env::temp_dir().join(format!("prompt-service-secret-{}", std::process::id()));
        std::fs::write(&path, "from a file\n").unwrap();
        let secrets = read(&[("SECRET_KEY_FILE", path.to_str().unwrap())]).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(secrets.secret_key, Some(Secret::new("from a file")));
    }

    #[test]
    fn both_forms_at_once_are_refused() {
        let error = read(&[("SECRET_KEY", "a"), ("SECRET_KEY_FILE", "/b")]).unwrap_err();
        assert!(error.to_string().starts_with("SECRET_KEY: "));
    }

    #[test]
    fn a_secret_that_is_no_text_is_refused_by_name_and_not_taken_for_unset() {
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
        secrets.read_fallback_keys(&list, variable).unwrap();
        let expected = ("B_KEY".to_owned(), Secret::new("sk-b"));
        assert_eq!(secrets.openai_fallback_keys, [expected]);
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
