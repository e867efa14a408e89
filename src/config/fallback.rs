//! `OPENAI_FALLBACK`: the upstreams to ask when the first fails, and the origin that each key may
//! be sent to.

use std::str::FromStr;

use serde::Deserialize;

use super::endpoint::{Endpoint, ServedModels, checked_key, checked_model};
use super::{BaseUrl, Error, Secret, names};

const SETTING: &str = "OPENAI_FALLBACK";
/// The first upstream's key.
const FIRST_KEY: &str = "OPENAI_API_KEY";

/// One entry of `OPENAI_FALLBACK`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fallback {
    /// The model that is asked.
    pub model: String,
    /// Its address.
    pub base_url: String,
    /// The variable that holds the key; none sends no `Authorization`.
    pub api_key_env: Option<String>,
}

/// The whole of `OPENAI_FALLBACK`, a JSON list.
#[derive(Clone, Debug, Default)]
pub struct Fallbacks(pub Vec<Fallback>);

impl Fallbacks {
    /// The variables that hold the keys.
    pub fn key_variables(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|each| each.api_key_env.as_deref())
    }
}

impl FromStr for Fallbacks {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        // The parser's own message may quote the text, and somebody may have put a key into it.
        let list: Vec<Fallback> = serde_json::from_str(text).map_err(
            |_| r#"must be a JSON list of {"model": "…", "base_url": "…", "api_key_env": "NAME"}"#,
        )?;
        for fallback in &list {
            if let Some(name) = &fallback.api_key_env
                && !is_variable_name(name)
            {
                return Err("api_key_env must be the name of a variable, such as BACKUP_API_KEY");
            }
        }
        Ok(Self(list))
    }
}

/// Checks the fallbacks of an upstream at `first`, and gives each the key that it names.
///
/// The key of a variable goes to one origin: that of the entries that name the variable.
/// `OPENAI_API_KEY` goes to the first upstream's origin.
///
/// # Errors
/// The first entry that cannot be used.
pub(super) fn checked(
    fallbacks: &[Fallback],
    first: &BaseUrl,
    keys: &[(String, Secret)],
) -> Result<Vec<Endpoint>, Error> {
    let mut owners = vec![(FIRST_KEY, first.clone())];
    let mut endpoints = Vec::new();
    for (at, fallback) in fallbacks.iter().enumerate() {
        let problem = |problem: &str| Error::new(SETTING, format!("entry {}: {problem}", at + 1));
        let base_url = BaseUrl::parse(&fallback.base_url)
            .map_err(|wrong| problem(&format!("its base_url {wrong}")))?;
        let key = match &fallback.api_key_env {
            None => None,
            Some(name) => {
                if name != FIRST_KEY && is_taken(name) {
                    return Err(problem(
                        "api_key_env names a setting of the service, which is no key of an upstream",
                    ));
                }
                let owner = owners.iter().find(|(known, _)| known == name);
                if owner.is_some_and(|(_, origin)| !origin.is_same_origin(&base_url)) {
                    return Err(problem(
                        "api_key_env names a variable whose key goes to another origin: give each origin a variable of its own",
                    ));
                }
                owners.push((name, base_url.clone()));
                let found = keys.iter().find(|(known, _)| known == name);
                let (_, key) = found
                    .ok_or_else(|| problem("the variable that api_key_env names is not set"))?;
                Some(key.clone())
            }
        };
        endpoints.push(Endpoint {
            name: format!("fallback-{}", at + 1),
            models: ServedModels::Always(checked_model(SETTING, &fallback.model)?),
            api_key: checked_key(SETTING, key)?,
            base_url,
            fallback: Vec::new(),
        });
    }
    Ok(endpoints)
}

/// Whether the variable is read by this service itself.
pub(super) fn is_taken(name: &str) -> bool {
    let name = name.strip_suffix("_FILE").unwrap_or(name);
    names::variables().iter().any(|known| known == name)
}

/// A name that a shell could set, in capitals. A key that was put in its place by mistake hardly
/// ever looks like that.
pub(super) fn is_variable_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_uppercase() || c == '_')
        && name
            .chars()
            .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_fallbacks_is_checked_without_being_quoted() {
        for bad in [
            "x",
            "{}",
            r#"[{"model": "a"}]"#,
            r#"[{"model": "a", "base_url": "https://a", "api_key": "sk-hunter2"}]"#,
            r#"[{"model": "a", "base_url": "https://a", "api_key_env": "sk-hunter2"}]"#,
        ] {
            let error = bad.parse::<Fallbacks>().unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
        assert!("".parse::<Fallbacks>().unwrap().0.is_empty());
    }

    fn load(list: &str) -> Result<Vec<Endpoint>, Error> {
        let first = BaseUrl::parse("https://first.example/v1").unwrap();
        let set = [
            "OPENAI_API_KEY",
            "OPENAI_API_KEY_FILE",
            "SECRET_KEY",
            "SECRET_KEY_FILE",
            "DATABASE_URL",
            "REDIS_URL",
            "SECRET_KEY_FALLBACKS",
            "OPENAI_MODEL",
            "DATA_DIR",
            "A_KEY",
        ];
        let keys = set.map(|name| (name.to_owned(), Secret::new("hunter2")));
        checked(&list.parse::<Fallbacks>().unwrap().0, &first, &keys)
    }

    fn entry(url: &str, key: &str) -> String {
        format!(r#"{{"model": "m", "base_url": "{url}", "api_key_env": "{key}"}}"#)
    }

    #[test]
    fn a_secret_of_the_service_is_no_key_of_an_upstream() {
        for name in [
            "SECRET_KEY",
            "SECRET_KEY_FILE",
            "SECRET_KEY_FALLBACKS",
            "DATABASE_URL",
            "REDIS_URL",
            "OPENAI_MODEL",
            "DATA_DIR",
            "OPENAI_API_KEY_FILE",
        ] {
            let list = format!("[{}]", entry("https://first.example/v1", name));
            let error = load(&list).unwrap_err().to_string();
            assert!(error.starts_with("OPENAI_FALLBACK: entry 1: "), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_key_goes_to_one_origin() {
        let same = "https://FIRST.example:443/v2";
        for (urls, key, is_good) in [
            (&[same][..], "OPENAI_API_KEY", true),
            (&["https://other.example/v1"], "OPENAI_API_KEY", false),
            (&["https://first.example:8443/v1"], "OPENAI_API_KEY", false),
            (&["http://first.example/v1"], "OPENAI_API_KEY", false),
            (
                &["https://a.example/v1", "https://a.example/v2"],
                "A_KEY",
                true,
            ),
            (
                &["https://a.example/v1", "https://b.example/v1"],
                "A_KEY",
                false,
            ),
        ] {
            let list: Vec<_> = urls.iter().map(|url| entry(url, key)).collect();
            let list = format!("[{}]", list.join(","));
            match load(&list) {
                Ok(endpoints) => assert!(is_good && endpoints.len() == urls.len(), "{list}"),
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.starts_with("OPENAI_FALLBACK: entry "), "{error}");
                    assert!(!is_good, "{list}: {error}");
                }
            }
        }
    }
}
