//! The names of all settings, and the search for the setting that a misspelled variable means.

use clap::Args;

use super::{Fallbacks, Settings, UpstreamList};

/// The settings that are secrets. They have no flag, so [`Settings`] does not list them.
pub const SECRETS: [&str; 5] = [
    "SECRET_KEY",
    "SECRET_KEY_FALLBACKS",
    "DATABASE_URL",
    "REDIS_URL",
    "OPENAI_API_KEY",
];

/// Names that other programs use for one of our settings, and that no rule below finds.
const ALIASES: [(&str, &str); 1] = [("OPENAI_API_BASE", "OPENAI_BASE_URL")];

/// Every variable that the service reads: settings, secrets, and the secrets' `_FILE` forms.
pub fn variables() -> Vec<String> {
    let settings = Settings::augment_args(clap::Command::new(""));
    let settings = settings.get_arguments().filter_map(clap::Arg::get_env);
    let settings = settings.map(|name| name.to_string_lossy().into_owned());
    let secrets = SECRETS
        .iter()
        .flat_map(|name| [(*name).to_owned(), format!("{name}_FILE")]);
    settings.chain(secrets).collect()
}

/// Names that flags of other programs have for our secrets. As variables they are other programs'.
const SECRET_FLAGS: [(&str, &str); 7] = [
    ("API_KEY", "OPENAI_API_KEY"),
    ("DATABASE", "DATABASE_URL"),
    ("DB_URL", "DATABASE_URL"),
    ("POSTGRES_URL", "DATABASE_URL"),
    ("REDIS", "REDIS_URL"),
    ("REDIS_PASSWORD", "REDIS_URL"),
    ("SECRET", "SECRET_KEY"),
];

/// The secret that the name of a flag, in capitals, is or is likely to mean. A `_FILE`, `_PATH` or
/// `_ENV` at its end does not count.
pub fn secret_meant(name: &str) -> Option<&'static str> {
    let place = ["_FILE", "_PATH", "_ENV"]
        .iter()
        .find_map(|end| name.strip_suffix(end));
    let name = place.unwrap_or(name);
    if let Some((_, secret)) = SECRET_FLAGS.iter().find(|(flag, _)| *flag == name) {
        return Some(secret);
    }
    let close = SECRETS.into_iter().filter(|secret| is_close(name, secret));
    close.min_by_key(|secret| distance(name, secret))
}

/// A sentence for each variable of the environment that is no setting and looks like one, but for
/// the keys that `OPENAI_FALLBACK` and the list of `UPSTREAMS` name.
pub(super) fn misspelt_variables(settings: &Settings, list: &UpstreamList) -> Vec<String> {
    let fallbacks = settings.upstream.openai_fallback.as_ref();
    let keys: Vec<&str> = fallbacks
        .into_iter()
        .flat_map(Fallbacks::key_variables)
        .chain(list.key_variables())
        .collect();
    let is_key = |name: &str| keys.contains(&name.strip_suffix("_FILE").unwrap_or(name));
    let variables = settings.given.variables.iter().map(String::as_str);
    misspelt(variables.filter(|name| !is_key(name)))
}

/// A sentence for each of `names` that is no setting and looks like one. Other names are ignored:
/// an environment has variables of many programs.
fn misspelt<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let known = variables();
    let mut sentences: Vec<String> = names
        .into_iter()
        .filter(|name| !known.iter().any(|known| known == name))
        .filter_map(|name| {
            let upper = name.to_ascii_uppercase();
            if let Some(plain) = upper.strip_suffix("_FILE")
                && known.iter().any(|known| known == plain)
            {
                return Some(format!(
                    "{name} is not read: only a secret may come from a file; set {plain}"
                ));
            }
            let meant = meant(&upper, &known)?;
            Some(format!("{name} is not a setting: did you mean {meant}?"))
        })
        .collect();
    sentences.sort();
    sentences
}

/// The setting that a name in capitals is likely to mean.
fn meant<'a>(name: &str, known: &'a [String]) -> Option<&'a str> {
    if let Some((_, meant)) = ALIASES.iter().find(|(alias, _)| *alias == name) {
        return Some(meant);
    }
    known
        .iter()
        .filter(|setting| is_close(name, setting))
        .min_by_key(|setting| distance(name, setting))
        .map(String::as_str)
}

/// Whether the name is a setting's but for underscores, for one word that is left out (not the
/// first), or for small changes of its words.
fn is_close(name: &str, setting: &str) -> bool {
    if name.replace('_', "") == setting.replace('_', "") {
        return true;
    }
    let (words, wanted): (Vec<&str>, Vec<&str>) =
        (name.split('_').collect(), setting.split('_').collect());
    if words.len() == wanted.len() {
        return words.iter().zip(&wanted).all(|(a, b)| is_alike(a, b));
    }
    words.len() > 1
        && words[0] == wanted[0]
        && (1..wanted.len()).any(|left_out| {
            let mut rest = wanted.clone();
            rest.remove(left_out);
            rest.iter().zip(&words).all(|(a, b)| is_alike(a, b)) && rest.len() == words.len()
        })
}

/// Whether two words differ by one slip of a finger, or by their ending (`ADDR` and `ADDRESS`,
/// `PROXY` and `PROXIES`).
fn is_alike(a: &str, b: &str) -> bool {
    let common = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    let shorter = a.len().min(b.len());
    let longer = a.len().max(b.len());
    distance(a, b) <= 1
        || (common == shorter && shorter >= 3)
        || (common >= 4 && longer - common <= 3)
}

/// How many letters must be inserted, left out, replaced, or swapped with their neighbour to make
/// one text the other (the optimal string alignment distance).
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_name_is_reported_with_the_setting_that_it_means() {
        for (name, setting) in [
            ("OPENAI_BASEURL", "OPENAI_BASE_URL"),
            ("OPENAI_BASE_URI", "OPENAI_BASE_URL"),
            ("OPENAI_API_BASE", "OPENAI_BASE_URL"),
            ("OPEN_AI_API_KEY", "OPENAI_API_KEY"),
            ("OPENAI_APIKEY", "OPENAI_API_KEY"),
            ("OPENAI_KEY", "OPENAI_API_KEY"),
            ("openai_api_key", "OPENAI_API_KEY"),
            ("PROMT_THROTTLE", "PROMPT_THROTTLE"),
            ("PROMPT_THROTLE", "PROMPT_THROTTLE"),
            ("PROMPT_THROTTLES", "PROMPT_THROTTLE"),
            ("SECERT_KEY", "SECRET_KEY"),
            ("SECRET_KEY_FIEL", "SECRET_KEY_FILE"),
            ("SECRET_KEYS_FALLBACK", "SECRET_KEY_FALLBACKS"),
            ("DATABASE_URI", "DATABASE_URL"),
            ("DATABASE_POOL", "DATABASE_POOL_SIZE"),
            ("DATADIR", "DATA_DIR"),
            ("DATA_DIRECTORY", "DATA_DIR"),
            ("BIND_ADDRESS", "BIND_ADDR"),
            ("TRUSTED_PROXY", "TRUSTED_PROXIES"),
            ("CORS_ORIGINS", "CORS_ALLOWED_ORIGINS"),
            ("CORS_ORIGIN", "CORS_ALLOWED_ORIGINS"),
            ("REGISTRATIONS", "REGISTRATION"),
        ] {
            let sentence = format!("{name} is not a setting: did you mean {setting}?");
            assert_eq!(misspelt([name]), [sentence]);
        }
        assert_eq!(
            misspelt(["OPENAI_MODEL_FILE"]),
            ["OPENAI_MODEL_FILE is not read: only a secret may come from a file; set OPENAI_MODEL"]
        );
    }

    #[test]
    fn settings_and_the_names_of_other_programs_are_passed_over() {
        let known = variables();
        assert_eq!(misspelt(known.iter().map(String::as_str)), [""; 0]);
        let others = [
            "PATH",
            "HOME",
            "LOGNAME",
            "LOG_LEVEL",
            "RUST_BACKTRACE",
            "RUST_LOG_STYLE",
            "DATA",
            "PORT",
            "HOST",
            "XDG_DATA_DIRS",
            "PGDATABASE",
            "POSTGRES_PASSWORD",
            "REDIS_PASSWORD",
            "REDIS_HOST",
            "REDIS_PORT",
            "DATABASE_NAME",
            "OLD_DATABASE_URL",
            "NEW_DATABASE_URL",
            "DJANGO_SECRET_KEY",
            "SECRET_KEY_BASE",
            "COOKIE_SECRET",
            "SESSION_COOKIE_SECURE",
            "REGISTRY",
            "OPENAI_ORG_ID",
            "OPENAI_API_TYPE",
            "OPENROUTER_API_KEY",
            "BACKUP_API_KEY",
            "BACKUP_API_KEY_FILE",
            "BASE_URL",
            "API_KEY",
            "SSL_CERT_FILE",
            "SQLITE_TMPDIR",
            "NO_COLOR",
            "TERM",
            "A",
            "",
        ];
        assert_eq!(misspelt(others), [""; 0]);
    }
}
