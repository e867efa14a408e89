//! Secrets in files, for containers that share them: a value of the environment, or a random one
//! that is made once. An image without a shell has no other way to make a password.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, anyhow, bail, ensure};

use crate::config::{FileError, Secret};

/// Readable for all users, because the containers that share the folder run as different users.
/// Only those containers have the volume.
const MODE: u32 = 0o444;
/// 256 bits of randomness, as strong as SHA-256.
const SECRET_BYTES: usize = 32;

/// Writes each of `files` into `folder`. A file given as `NAME` gets the value of the variable of
/// that name, else keeps its present value, else gets a new random secret (64 hex digits). A file
/// given as `NAME=FORM` gets the value of the variable, else the form, in which `{OTHER}` stands
/// for an earlier one of the secrets, percent-encoded as a part of an address.
///
/// # Errors
/// One line: a name, a form or a value that cannot be used, or a folder that cannot be written. The
/// line has no value in it.
pub fn run(
    folder: &Path,
    files: &[String],
    variable: impl Fn(&str) -> Option<OsString>,
) -> anyhow::Result<()> {
    let mut secrets = HashMap::new();
    for file in files {
        let (name, form) = match file.split_once('=') {
            Some((name, form)) => (name, Some(form)),
            None => (file.as_str(), None),
        };
        ensure!(
            is_variable(name),
            "{name:?} is no name of a variable: capital letters, digits and _"
        );
        let path = folder.join(name);
        let written = written(&path).map_err(|error| anyhow!("{name}: its file {error}"))?;
        let value = match (given(name, &variable)?, form) {
            (Some(value), _) => value,
            (None, Some(form)) => filled(form, &secrets).map_err(|unknown| {
                anyhow!("{name}: its form names {unknown}, which no earlier file holds")
            })?,
            (None, None) => match &written {
                Some(value) => value.clone(),
                None => random()?,
            },
        };
        if written.as_ref() != Some(&value) {
            write(folder, name, &value)
                .with_context(|| format!("{name}: its file cannot be written"))?;
        }
        secrets.insert(name, value);
    }
    Ok(())
}

fn is_variable(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
}

/// The value in the environment; an empty variable counts as unset, as everywhere.
fn given(
    name: &str,
    variable: impl Fn(&str) -> Option<OsString>,
) -> anyhow::Result<Option<String>> {
    let Some(value) = variable(name).filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    match value.into_string() {
        Ok(value) if value.trim() == value && !value.chars().any(char::is_control) => {
            Ok(Some(value))
        }
        _ => bail!("{name}: a secret is one line of text, without a blank at its ends"),
    }
}

/// The value in a file, as the server reads it; `None` if the file is missing or empty.
fn written(path: &Path) -> Result<Option<String>, FileError> {
    match fs::metadata(path) {
        Ok(found) if found.is_file() && found.len() == 0 => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Ok(_) | Err(_) => {}
    }
    let secret = Secret::read_file(path)?;
    Ok(Some(secret.expose().to_owned()))
}

fn random() -> anyhow::Result<String> {
    let mut bytes = [0; SECRET_BYTES];
    getrandom::fill(&mut bytes)
        .map_err(|_| anyhow!("there is no randomness to make a secret of"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The form with the secrets filled in; as an error, the name of one that does not exist.
fn filled(form: &str, secrets: &HashMap<&str, String>) -> Result<String, String> {
    let mut rest = form;
    let mut filled = String::new();
    while let Some((before, after)) = rest.split_once('{') {
        let (name, after) = after.split_once('}').unwrap_or((after, ""));
        let secret = secrets.get(name).ok_or_else(|| name.to_owned())?;
        filled.push_str(before);
        filled.push_str(&percent_encoded(secret));
        rest = after;
    }
    filled.push_str(rest);
    Ok(filled)
}

/// Encodes all characters that are not unreserved (RFC 3986, section 2.3), because they may have a
/// meaning in an address.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Puts the value into the file, whole or not at all: a container may read it at any moment.
fn write(folder: &Path, name: &str, value: &str) -> io::Result<()> {
    let draft = folder.join(format!(".{name}.draft"));
    // A file that a killed process left would make the rename fail.
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(MODE)
        .open(&draft)?;
    let written = file
        .write_all(value.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&draft, folder.join(name)));
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const FILES: [&str; 3] = [
        "PASSWORD",
        "SECRET_KEY",
        "URL=postgres://prompt:{PASSWORD}@postgres/prompts",
    ];

    fn make(folder: &Path, files: &[&str], given: &[(&str, &str)]) -> anyhow::Result<()> {
        let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
        let given: HashMap<_, _> = given.iter().copied().collect();
        run(folder, &files, |name| given.get(name).map(OsString::from))
    }

    fn read(folder: &Path, name: &str) -> String {
        fs::read_to_string(folder.join(name)).unwrap()
    }

    #[test]
    fn missing_secrets_are_made_once_and_forms_are_filled() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        make(folder, &FILES, &[]).unwrap();
        let (password, key) = (read(folder, "PASSWORD"), read(folder, "SECRET_KEY"));
        assert_ne!(password, key);
        for secret in [&password, &key] {
            assert_eq!(secret.len(), 64);
            assert!(secret.bytes().all(|byte| byte.is_ascii_hexdigit()));
        }
        let url = read(folder, "URL");
        assert_eq!(
            url,
            format!("postgres://prompt:{password}@postgres/prompts")
        );
        let mode = fs::metadata(folder.join("URL")).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, MODE);
        make(folder, &FILES, &[]).unwrap();
        assert_eq!(
            (read(folder, "PASSWORD"), read(folder, "SECRET_KEY")),
            (password, key)
        );
        assert_eq!(fs::read_dir(folder).unwrap().count(), FILES.len());
    }

    #[test]
    fn a_file_is_read_as_the_server_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        fs::write(folder.join("PASSWORD"), "hunter2\n").unwrap();
        make(folder, &FILES, &[]).unwrap();
        assert_eq!(
            read(folder, "URL"),
            "postgres://prompt:hunter2@postgres/prompts"
        );
        fs::write(folder.join("PASSWORD"), "hunter2\r\n").unwrap();
        let error = make(folder, &FILES, &[]).unwrap_err().to_string();
        assert!(
            error.starts_with("PASSWORD: its file has Windows line ends"),
            "{error}"
        );
        let error = make(folder, &FILES, &[("PASSWORD", "hunter2 ")]).unwrap_err();
        assert!(error.to_string().starts_with("PASSWORD: "), "{error}");
    }

    #[test]
    fn a_value_of_the_environment_wins_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        make(folder, &FILES, &[]).unwrap();
        let key = read(folder, "SECRET_KEY");
        make(folder, &FILES, &[("PASSWORD", "p@ss: wörd/%")]).unwrap();
        let url = "postgres://prompt:p%40ss%3A%20w%C3%B6rd%2F%25@postgres/prompts";
        for given in [&[("PASSWORD", "")][..], &[]] {
            assert_eq!(read(folder, "PASSWORD"), "p@ss: wörd/%");
            assert_eq!(read(folder, "URL"), url);
            assert_eq!(read(folder, "SECRET_KEY"), key);
            make(folder, &FILES, given).unwrap();
        }
        make(folder, &FILES, &[("URL", "postgres://elsewhere/db")]).unwrap();
        assert_eq!(read(folder, "URL"), "postgres://elsewhere/db");
    }

    #[test]
    fn file_that_a_killed_process_left_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("PASSWORD"), "").unwrap();
        let draft = folder.path().join(".SECRET_KEY.draft");
        fs::write(&draft, "half").unwrap();
        fs::set_permissions(&draft, fs::Permissions::from_mode(MODE)).unwrap();
        make(folder.path(), &FILES, &[]).unwrap();
        assert_eq!(read(folder.path(), "PASSWORD").len(), 64);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), FILES.len());
    }

    #[test]
    fn unusable_names_forms_and_values_are_refused_without_the_value() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        for (files, given, said) in [
            (vec!["../x"], vec![], "\"../x\" is no name"),
            (vec![""], vec![], "\"\" is no name"),
            (vec!["URL={NONE}"], vec![], "URL: its form names NONE"),
            (
                vec!["A", "URL={A"],
                vec![("A", "hunter2\nx")],
                "A: a secret is one line",
            ),
        ] {
            let error = make(folder, &files, &given).unwrap_err().to_string();
            assert!(error.starts_with(said), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let error = make(&folder.join("none"), &["A"], &[]).unwrap_err();
        assert_eq!(error.to_string(), "A: its file cannot be written");
    }
}
