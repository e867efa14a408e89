//! `UPSTREAMS`: upstreams that are chosen by the model that a caller asks for.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;

use super::endpoint::{Endpoint, ModelPattern, ServedModels, checked_key, is_model_name};
use super::fallback::{is_taken, is_variable_name};
use super::{BaseUrl, Error, Secret};

pub(super) const SETTING: &str = "UPSTREAMS";
const FILE_SETTING: &str = "UPSTREAMS_FILE";
/// `OPENAI_API_KEY` is a setting, and the key of an upstream.
const FIRST_KEY: &str = "OPENAI_API_KEY";
/// The longest file that is read, in bytes. An entry takes a few hundred.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Most upstreams. Each has connections of its own.
const MOST: usize = 64;
/// Longest name of an upstream, in bytes.
const NAME_BYTES: usize = 64;
const SHAPE: &str = r#"must be a JSON list of {"name": "…", "base_url": "…", "key_env": "NAME", "models": ["…"], "aliases": {"…": "…"}, "fallback": ["…"]}, of which key_env, aliases and fallback may be missing"#;

/// One entry of `UPSTREAMS`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListedUpstream {
    /// Its name in metrics and in the log.
    pub name: String,
    /// Its address.
    pub base_url: String,
    /// The variable that holds the key; none sends no `Authorization`.
    pub key_env: Option<String>,
    /// The models that it serves: names, and beginnings of names with a `*` after them.
    pub models: Vec<String>,
    /// Names under which callers can ask for a model, and the model that is asked.
    #[serde(default)]
    pub aliases: BTreeMap<String, String>,
    /// The names of the upstreams that are asked, in this order, when this one fails.
    #[serde(default)]
    pub fallback: Vec<String>,
}

/// The whole of `UPSTREAMS`, a JSON list.
#[derive(Clone, Debug, Default)]
pub struct UpstreamList(pub Vec<ListedUpstream>);

impl FromStr for UpstreamList {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        // The parser's own message may quote the text, and somebody may have put a key into it.
        let list: Vec<ListedUpstream> = serde_json::from_str(text).map_err(|_| SHAPE)?;
        for upstream in &list {
            if let Some(name) = &upstream.key_env
                && !is_variable_name(name)
            {
                return Err("key_env must be the name of a variable, such as BACKUP_API_KEY");
            }
        }
        Ok(Self(list))
    }
}

impl UpstreamList {
    /// Reads the list in a file.
    ///
    /// # Errors
    /// The file cannot be read, or is no such list. The message quotes nothing of it.
    pub(super) fn read_file(path: &Path) -> Result<Self, Error> {
        let problem = |problem: String| Error::new(FILE_SETTING, problem);
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text))
            .map_err(|error| problem(format!("the file cannot be read: {}", error.kind())))?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(problem("the file is longer than 1 MiB".to_owned()));
        }
        text.parse()
            .map_err(|wrong: &str| problem(format!("the file {wrong}")))
    }

    /// The variables that hold the keys.
    pub fn key_variables(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|each| each.key_env.as_deref())
    }
}

/// Checks the upstreams, and gives each the key that it names. The key of a variable goes to one
/// origin: that of the entries that name the variable.
///
/// # Errors
/// The first entry that cannot be used.
pub(super) fn checked(
    list: &UpstreamList,
    keys: &[(String, Secret)],
) -> Result<Vec<Endpoint>, Error> {
    let list = &list.0;
    if list.len() > MOST {
        return Err(Error::new(SETTING, "has more than 64 upstreams"));
    }
    let mut owners: Vec<(&str, BaseUrl)> = Vec::new();
    let mut endpoints = Vec::new();
    for (at, upstream) in list.iter().enumerate() {
        let problem = |problem: &str| Error::new(SETTING, format!("entry {}: {problem}", at + 1));
        if !is_name(&upstream.name) {
            return Err(problem(
                "its name must have 1 to 64 small letters, digits, dots, dashes and underscores",
            ));
        }
        if list[..at].iter().any(|other| other.name == upstream.name) {
            return Err(problem("its name is that of an entry before: rename one"));
        }
        let base_url = BaseUrl::parse(&upstream.base_url)
            .map_err(|wrong| problem(&format!("its base_url {wrong}")))?;
        let key = match &upstream.key_env {
            None => None,
            Some(name) => {
                if name != FIRST_KEY && is_taken(name) {
                    return Err(problem(
                        "key_env names a setting of the service, which is no key of an upstream",
                    ));
                }
                let owner = owners.iter().find(|(known, _)| known == name);
                if owner.is_some_and(|(_, origin)| !origin.is_same_origin(&base_url)) {
                    return Err(problem(
                        "key_env names a variable whose key goes to another origin: give each origin a variable of its own",
                    ));
                }
                owners.push((name, base_url.clone()));
                let found = keys.iter().find(|(known, _)| known == name);
                let (_, key) =
                    found.ok_or_else(|| problem("the variable that key_env names is not set"))?;
                Some(key.clone())
            }
        };
        endpoints.push(Endpoint {
            name: upstream.name.clone(),
            api_key: checked_key(SETTING, key)?,
            base_url,
            models: models(upstream).map_err(problem)?,
            fallback: fallback(list, at).map_err(problem)?,
        });
    }
    Ok(endpoints)
}

fn models(upstream: &ListedUpstream) -> Result<ServedModels, &'static str> {
    if upstream.models.is_empty() && upstream.aliases.is_empty() {
        return Err("it has no models");
    }
    let patterns: Option<Vec<_>> = upstream
        .models
        .iter()
        .map(|pattern| ModelPattern::parse(pattern))
        .collect();
    let patterns = patterns.ok_or(
        "each of its models must be a name of 1 to 200 bytes, or the beginning of names with a * after it",
    )?;
    let is_plain = |name: &String| is_model_name(name) && !name.contains('*');
    if !upstream
        .aliases
        .iter()
        .all(|(alias, model)| is_plain(alias) && is_plain(model))
    {
        return Err("its aliases must be names of models, of 1 to 200 bytes and without *");
    }
    Ok(ServedModels::Matching {
        patterns,
        aliases: upstream.aliases.clone(),
    })
}

/// The indexes of the fallbacks of an entry.
fn fallback(list: &[ListedUpstream], at: usize) -> Result<Vec<usize>, &'static str> {
    let mut seen = HashSet::from([at]);
    let find = |name: &String| {
        let found = list.iter().position(|other| other.name == *name);
        let found = found.ok_or("its fallback names an upstream that is not in the list")?;
        match seen.insert(found) {
            true => Ok(found),
            false => Err("its fallback names itself, or an upstream twice"),
        }
    };
    list[at].fallback.iter().map(find).collect()
}

fn is_name(name: &str) -> bool {
    let is_good =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    (1..=NAME_BYTES).contains(&name.len()) && name.bytes().all(is_good)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(list: &str) -> Result<Vec<Endpoint>, Error> {
        let set = [
            "OPENAI_API_KEY",
            "SECRET_KEY",
            "DATA_DIR",
            "UPSTREAMS",
            "A_KEY",
        ];
        let keys = set.map(|name| (name.to_owned(), Secret::new("hunter2")));
        let list = list
            .parse::<UpstreamList>()
            .map_err(|problem| Error::new(SETTING, problem))?;
        checked(&list, &keys)
    }

    #[test]
    fn upstreams_have_their_models_aliases_keys_and_fallbacks() {
        let list = r#"[
            {"name": "openai", "base_url": "https://api.openai.com/v1", "key_env": "OPENAI_API_KEY",
             "models": ["gpt-*", "o3"], "aliases": {"fast": "gpt-6-luna"}, "fallback": ["local-2"]},
            {"name": "local-2", "base_url": "http://ollama:11434/v1", "models": ["*"]}]"#;
        let endpoints = load(list).unwrap();
        assert_eq!(endpoints[0].name, "openai");
        assert_eq!(endpoints[0].api_key, Some(Secret::new("hunter2")));
        assert_eq!(endpoints[0].fallback, [1]);
        assert_eq!(endpoints[1].api_key, None);
        let ServedModels::Matching { patterns, aliases } = &endpoints[0].models else {
            panic!("{:?}", endpoints[0].models);
        };
        assert_eq!(aliases["fast"], "gpt-6-luna");
        assert!(patterns[0].matches("gpt-7") && !patterns[0].matches("o3"));
        assert!(patterns[1].matches("o3") && !patterns[1].matches("o3-mini"));
    }

    #[test]
    fn an_entry_that_cannot_be_used_is_named_without_its_values() {
        let entry = |rest: &str| {
            format!(
                r#"[{{"name": "a", "base_url": "https://a.example/v1", "models": ["m"], {rest}}}]"#
            )
        };
        let pair = |one: &str, two: &str| {
            format!(
                r#"[{{"name": "a", "base_url": "https://a.example/v1", "models": ["m"], {one}}},
                    {{"name": "b", "base_url": "https://b.example/v1", "models": ["m"], {two}}}]"#
            )
        };
        let plain = |name: &str, url: &str, models: &str| {
            format!(r#"[{{"name": "{name}", "base_url": "{url}", "models": {models}}}]"#)
        };
        for (list, part) in [
            ("hunter2".to_owned(), "must be a JSON list"),
            (entry(r#""api_key": "hunter2""#), "must be a JSON list"),
            (
                entry(r#""key_env": "sk-hunter2""#),
                "must be the name of a variable",
            ),
            (entry(r#""key_env": "SECRET_KEY""#), "names a setting"),
            (entry(r#""key_env": "SECRET_KEY_FILE""#), "names a setting"),
            (entry(r#""key_env": "UPSTREAMS""#), "names a setting"),
            (entry(r#""key_env": "HUNTER2""#), "is not set"),
            (
                pair(r#""key_env": "A_KEY""#, r#""key_env": "A_KEY""#),
                "goes to another origin",
            ),
            (entry(r#""fallback": ["hunter2"]"#), "not in the list"),
            (entry(r#""fallback": ["a"]"#), "names itself"),
            (
                pair(r#""fallback": ["b", "b"]"#, r#""aliases": {}"#),
                "twice",
            ),
            (entry(r#""aliases": {"x": "hunter2*"}"#), "its aliases"),
            (entry(r#""aliases": {"": "hunter2"}"#), "its aliases"),
            (
                plain("Hunter2", "https://a.example", r#"["m"]"#),
                "its name",
            ),
            (plain("", "https://a.example", r#"["m"]"#), "its name"),
            (
                plain("a", "http://8.8.8.8/hunter2", r#"["m"]"#),
                "its base_url",
            ),
            (plain("a", "https://a.example", "[]"), "has no models"),
            (
                plain("a", "https://a.example", r#"["hunter*2"]"#),
                "its models",
            ),
            (plain("a", "https://a.example", r#"[""]"#), "its models"),
        ] {
            let error = load(&list).unwrap_err().to_string();
            assert!(
                error.starts_with("UPSTREAMS: ") && error.contains(part),
                "{list}: {error}"
            );
            assert!(!error.to_lowercase().contains("hunter2"), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        let twice = r#"[{"name": "a", "base_url": "https://a.example", "models": ["m"]},
                        {"name": "a", "base_url": "https://a.example", "models": ["m"]}]"#;
        let error = load(twice).unwrap_err().to_string();
        assert!(error.starts_with("UPSTREAMS: entry 2: its name"), "{error}");
    }

    #[test]
    fn a_list_may_come_from_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let list = r#"[{"name": "a", "base_url": "https://a.example", "models": ["m"]}]"#;
        std::fs::write(file.path(), list).unwrap();
        assert_eq!(UpstreamList::read_file(file.path()).unwrap().0.len(), 1);
        for bytes in [&b"hunter2"[..], b"\xff", &[b' '; (1 << 20) + 1]] {
            std::fs::write(file.path(), bytes).unwrap();
            let error = UpstreamList::read_file(file.path())
                .unwrap_err()
                .to_string();
            assert!(error.starts_with("UPSTREAMS_FILE: the file "), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let error = UpstreamList::read_file(Path::new("/nonexistent")).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("UPSTREAMS_FILE: the file cannot be read")
        );
    }
}
