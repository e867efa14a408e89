//! The data folder: private to its owner, locked by one server at a time. It holds the generated
//! key.

mod inspect;
mod lock;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub use self::inspect::{FolderState, try_file_beside};
pub use self::lock::{FileLock, is_database_in_use, lock_database};
use crate::config::{FileError, Secret};

/// Why the folder cannot be used: one line that says so, with the repair.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder cannot be created or written to.
    #[error("DATA_DIR: {}: {what}; make the folder writable for this user or set DATA_DIR to another", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What could not be done.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another server has locked it.
    #[error("DATA_DIR: {}: another prompt-service is using this folder; stop it or set DATA_DIR to another", .0.display())]
    InUse(PathBuf),
    /// Another server has locked the database file, though not this folder.
    #[error("DATABASE_URL: {}: another prompt-service is using this file; stop it or name another file", .0.display())]
    DatabaseInUse(PathBuf),
    /// The lock file of the database file cannot be created or opened.
    #[error("DATABASE_URL: {}: the lock file beside it cannot be made or opened; see that its folder exists and is writable for this user, and that a lock file which is there is this user's", .path.display())]
    DatabaseLock {
        /// The database file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The key file holds something other than a key.
    #[error(
        "DATA_DIR: {}: secret.key {what}; restore it, or remove it to have a new one made (every token ends then)",
        .path.display()
    )]
    BadKey {
        /// The folder.
        path: PathBuf,
        /// Why the file cannot be used.
        what: &'static str,
    },
}

/// The folder, created if it was missing.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
}

impl DataDir {
    /// Opens the folder, creating it with mode 0700 if it is missing.
    ///
    /// # Errors
    /// `Folder`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let folder = Self {
            path: path.to_owned(),
        };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(folder.failed("the folder cannot be made"))?;
        Ok(folder)
    }

    /// Whether a folder, which may be missing, holds a valid key.
    ///
    /// # Errors
    /// `BadKey`; `Folder` if the key cannot be read.
    pub fn has_key(path: &Path) -> Result<bool, Error> {
        let folder = Self {
            path: path.to_owned(),
        };
        Ok(folder.read_key(&path.join("secret.key"))?.is_some())
    }

    /// The key in `secret.key`. If there is none, a random one is created (64 hex digits, mode
    /// 0600).
    ///
    /// # Errors
    /// `BadKey`; `Folder`.
    pub fn secret_key(&self) -> Result<Secret, Error> {
        let path = self.path.join("secret.key");
        if let Some(key) = self.read_key(&path)? {
            return Ok(key);
        }
        // Written completely under another name and then linked: a crash leaves no partial key, and
        // of two processes that create one at once the first to link wins.
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)
            .map_err(|_| self.failed("no randomness to make a key")(io::ErrorKind::Other.into()))?;
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let draft = self.path.join(format!("secret.key.{}", std::process::id()));
        let written = write_new(&draft, &hex).and_then(|()| fs::hard_link(&draft, &path));
        let removed = fs::remove_file(&draft);
        match written {
            Ok(()) => removed.map_err(self.failed("a draft of its key cannot be removed"))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(self.failed("its key cannot be written")(error)),
        }
        File::open(&self.path)
            .and_then(|folder| folder.sync_all())
            .map_err(self.failed("its key cannot be kept"))?;
        self.read_key(&path)?
            .ok_or_else(|| self.bad_key("was removed while it was made"))
    }

    fn read_key(&self, path: &Path) -> Result<Option<Secret>, Error> {
        match Secret::read_file(path) {
            Ok(key) if key.expose().len() < 32 => {
                Err(self.bad_key("is not a key of at least 32 bytes"))
            }
            Ok(key) => Ok(Some(key)),
            Err(FileError::Unreadable(error)) if error.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(FileError::Unreadable(error)) => Err(self.failed("its key cannot be read")(error)),
            Err(FileError::Flaw(what)) => Err(self.bad_key(what)),
        }
    }

    fn bad_key(&self, what: &'static str) -> Error {
        Error::BadKey {
            path: self.path.clone(),
            what,
        }
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let path = self.path.clone();
        move |source| Error::Folder { path, what, source }
    }
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn folder() -> (tempfile::TempDir, DataDir) {
        let outer = tempfile::tempdir().unwrap();
        let inner = DataDir::open(&outer.path().join("data")).unwrap();
        (outer, inner)
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn new_folder_and_its_key_are_private_to_the_owner() {
        let (_outer, folder) = folder();
        folder.secret_key().unwrap();
        assert_eq!(mode(&folder.path), 0o700);
        assert_eq!(mode(&folder.path.join("secret.key")), 0o600);
        assert_eq!(
            fs::read_dir(&folder.path).unwrap().count(),
            1,
            "no draft is left"
        );
    }

    #[test]
    fn key_is_created_once_and_read_without_its_newline() {
        let (_outer, folder) = folder();
        let key = folder.secret_key().unwrap();
        assert_eq!(key.expose().len(), 64);
        assert!(key.expose().bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_eq!(folder.secret_key().unwrap(), key);
    }

    #[test]
    fn broken_key_is_refused_and_not_replaced() {
        let (_outer, folder) = folder();
        fs::write(folder.path.join("secret.key"), "short").unwrap();
        assert!(matches!(folder.secret_key(), Err(Error::BadKey { .. })));
        let crlf = [&[b'k'; 64][..], b"\r\n"].concat();
        for bytes in [&[0xff; 64][..], &crlf] {
            fs::write(folder.path.join("secret.key"), bytes).unwrap();
            assert!(matches!(folder.secret_key(), Err(Error::BadKey { .. })));
        }
    }
}
