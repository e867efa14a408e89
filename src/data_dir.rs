//! The data folder: made for its owner only, held by one server at a time, keeper of the generated key.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::config::{FileError, Secret};

/// Why the folder cannot be used: one line that says so and the mend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder cannot be made or written to.
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
    /// Another server holds it.
    #[error("DATA_DIR: {}: another prompt-service is using this folder; stop it or set DATA_DIR to another", .0.display())]
    InUse(PathBuf),
    /// Another server holds the database file, though not this folder.
    #[error("DATABASE_URL: {}: another prompt-service is using this file; stop it or name another file", .0.display())]
    DatabaseInUse(PathBuf),
    /// The lock file of the database file cannot be made or opened.
    #[error("DATABASE_URL: {}: the lock file beside it cannot be made or opened; see that its folder exists and is writable for this user, and that a lock file which is there is this user's", .path.display())]
    DatabaseLock {
        /// The database file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The key file does not hold a key and nothing else.
    #[error(
        "DATA_DIR: {}: secret.key {what}; restore it, or remove it to have a new one made (every token ends then)",
        .path.display()
    )]
    BadKey {
        /// The folder.
        path: PathBuf,
        /// What is wrong with the file.
        what: &'static str,
    },
}

/// The folder, made if it was missing.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
}

/// What [`DataDir::look`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The folder is there, and can be written. If not, it can be made.
    pub is_there: bool,
    /// A server holds it.
    pub is_in_use: bool,
}

/// Holds the folder, or a database file, for one server. Released when dropped, or by the kernel when the process ends in any way.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing the file is not enough: a child process that is about to become another program holds it open for a moment.
        let _ = self.file.unlock();
    }
}

impl DataDir {
    /// Opens the folder, making it with mode 0700 if it is missing.
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

    /// Looks at a folder. What it makes to find out what it may, it removes at once.
    ///
    /// # Errors
    /// `Folder` if the folder can be neither written nor made, or is none.
    pub fn look(path: &Path) -> Result<Found, Error> {
        let folder = Self {
            path: path.to_owned(),
        };
        let what = "the folder cannot be made";
        match fs::symlink_metadata(path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                try_folder(nearest_folder(path)).map_err(folder.failed(what))?;
                return Ok(Found {
                    is_there: false,
                    is_in_use: false,
                });
            }
            Err(error) => return Err(folder.failed(what)(error)),
        }
        try_file(path).map_err(folder.failed("the folder cannot be written"))?;
        let is_in_use = is_held(&path.join("lock"))
            .map_err(folder.failed("its lock file cannot be written"))?;
        Ok(Found {
            is_there: true,
            is_in_use,
        })
    }

    /// Whether a folder, which may be missing, holds a sound key.
    ///
    /// # Errors
    /// `BadKey`; `Folder` if the key cannot be read.
    pub fn has_key(path: &Path) -> Result<bool, Error> {
        let folder = Self {
            path: path.to_owned(),
        };
        Ok(folder.read_key(&path.join("secret.key"))?.is_some())
    }

    /// Takes the folder for this server.
    ///
    /// # Errors
    /// `InUse` if another process has it; `Folder`.
    pub fn lock(&self) -> Result<Lock, Error> {
        let file = open_lock(&self.path.join("lock"))
            .map_err(self.failed("its lock file cannot be written"))?;
        match file.try_lock() {
            Ok(()) => Ok(Lock { file }),
            Err(TryLockError::WouldBlock) => Err(Error::InUse(self.path.clone())),
            Err(TryLockError::Error(error)) => {
                Err(self.failed("its lock file cannot be locked")(error))
            }
        }
    }

    /// The key kept in `secret.key`, made at random (64 hex digits, mode 0600) if there is none.
    ///
    /// # Errors
    /// `BadKey`; `Folder`.
    pub fn secret_key(&self) -> Result<Secret, Error> {
        let path = self.path.join("secret.key");
        if let Some(key) = self.read_key(&path)? {
            return Ok(key);
        }
        // Written whole under another name and then linked: a crash leaves no half of a key, and of two processes that
        // make one at once the first to link wins.
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

/// Takes an SQLite file for this server, whatever its data folder: by a lock file beside it, named `….lock`. The file itself must not be
/// opened for this, since closing it again would release SQLite's own locks.
///
/// # Errors
/// `DatabaseInUse` if another process has it; `DatabaseLock`.
pub fn lock_database(path: &Path) -> Result<Lock, Error> {
    let failed = |source| Error::DatabaseLock {
        path: path.to_owned(),
        source,
    };
    let file = open_lock(&database_lock(path)).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(Lock { file }),
        Err(TryLockError::WouldBlock) => Err(Error::DatabaseInUse(path.to_owned())),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// Whether a server holds the SQLite file.
///
/// # Errors
/// `DatabaseLock`.
pub fn is_database_in_use(path: &Path) -> Result<bool, Error> {
    is_held(&database_lock(path)).map_err(|source| Error::DatabaseLock {
        path: path.to_owned(),
        source,
    })
}

fn database_lock(path: &Path) -> PathBuf {
    // One file has one lock, by whatever way it is named. One that does not exist yet is no link.
    let mut name = fs::canonicalize(path)
        .unwrap_or_else(|_| path.to_owned())
        .into_os_string();
    name.push(".lock");
    PathBuf::from(name)
}

/// Whether somebody holds a lock file, which is left missing if it is.
fn is_held(path: &Path) -> io::Result<bool> {
    let file = match OpenOptions::new().write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match file.try_lock() {
        Ok(()) => {
            drop(Lock { file });
            Ok(false)
        }
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// The folder that a missing one would be made in, itself or by way of others.
fn nearest_folder(path: &Path) -> &Path {
    let is_there = |folder: &&Path| fs::symlink_metadata(folder).is_ok();
    match path.ancestors().skip(1).find(is_there) {
        Some(folder) => folder,
        // The parent of a relative path's first part is the empty path.
        None => Path::new("."),
    }
}

/// Makes an empty file in a folder and removes it. Modes alone do not tell: the file system may be
/// read-only.
fn try_file(folder: &Path) -> io::Result<()> {
    let trial = folder.join(trial_name()?);
    let mut options = OpenOptions::new();
    options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&trial)?;
    fs::remove_file(&trial)
}

/// The same with a folder.
fn try_folder(folder: &Path) -> io::Result<()> {
    let trial = folder.join(trial_name()?);
    DirBuilder::new().mode(0o700).create(&trial)?;
    fs::remove_dir(&trial)
}

/// One that nobody else takes: others may be looking at the same folder.
fn trial_name() -> io::Result<String> {
    let number = getrandom::u64().map_err(|_| io::ErrorKind::Other)?;
    Ok(format!(".prompt-service-{number:016x}"))
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
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
    fn a_new_folder_and_its_key_are_for_the_owner_only() {
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
    fn a_key_is_made_once_and_read_without_its_newline() {
        let (_outer, folder) = folder();
        let key = folder.secret_key().unwrap();
        assert_eq!(key.expose().len(), 64);
        assert!(key.expose().bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_eq!(folder.secret_key().unwrap(), key);
    }

    #[test]
    fn a_broken_key_is_refused_not_replaced() {
        let (_outer, folder) = folder();
        fs::write(folder.path.join("secret.key"), "short").unwrap();
        assert!(matches!(folder.secret_key(), Err(Error::BadKey { .. })));
        let crlf = [&[b'k'; 64][..], b"\r\n"].concat();
        for bytes in [&[0xff; 64][..], &crlf] {
            fs::write(folder.path.join("secret.key"), bytes).unwrap();
            assert!(matches!(folder.secret_key(), Err(Error::BadKey { .. })));
        }
    }

    #[test]
    fn a_look_makes_nothing() {
        let outer = tempfile::tempdir().unwrap();
        let path = outer.path().join("a/data");
        let found = |is_there, is_in_use| Found {
            is_there,
            is_in_use,
        };
        assert_eq!(DataDir::look(&path).unwrap(), found(false, false));
        assert!(!DataDir::has_key(&path).unwrap());
        assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 0);
        let folder = DataDir::open(&path).unwrap();
        assert_eq!(DataDir::look(&path).unwrap(), found(true, false));
        assert!(!DataDir::has_key(&path).unwrap());
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        let held = folder.lock().unwrap();
        assert_eq!(DataDir::look(&path).unwrap(), found(true, true));
        drop(held);
        assert_eq!(DataDir::look(&path).unwrap(), found(true, false));
        folder.secret_key().unwrap();
        assert!(DataDir::has_key(&path).unwrap());
        fs::write(path.join("secret.key"), "short").unwrap();
        let bad = DataDir::has_key(&path);
        assert!(matches!(bad, Err(Error::BadKey { .. })), "{bad:?}");
    }

    #[test]
    fn a_folder_that_can_be_neither_written_nor_made_is_found_without_making_it() {
        let outer = tempfile::tempdir().unwrap();
        let (file, link) = (outer.path().join("file"), outer.path().join("link"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        // Not even root can make a folder in /proc.
        for path in [&file, &file.join("a/b"), &link, Path::new("/proc/data/a")] {
            let refused = DataDir::look(path);
            assert!(matches!(refused, Err(Error::Folder { .. })), "{refused:?}");
        }
        assert_eq!(nearest_folder(Path::new("data/a")), Path::new("."));
        assert_eq!(nearest_folder(&outer.path().join("a/b")), outer.path());
    }

    #[test]
    fn one_server_holds_a_database_file_by_whatever_name() {
        let outer = tempfile::tempdir().unwrap();
        let (file, link) = (outer.path().join("a.db"), outer.path().join("link.db"));
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let held = lock_database(&file).unwrap();
        fs::write(&file, "").unwrap();
        for name in [&file, &link, &outer.path().join(".").join("a.db")] {
            let refused = lock_database(name).unwrap_err();
            assert!(matches!(refused, Error::DatabaseInUse(_)), "{refused}");
        }
        assert!(is_database_in_use(&link).unwrap());
        assert!(!is_database_in_use(&outer.path().join("b.db")).unwrap());
        assert!(
            !outer.path().join("b.db.lock").exists(),
            "a look makes no lock"
        );
        assert!(lock_database(&outer.path().join("b.db")).is_ok());
        assert_eq!(mode(&outer.path().join("a.db.lock")), 0o600);
        drop(held);
        assert!(lock_database(&link).is_ok());
        let nowhere = lock_database(&outer.path().join("none/a.db"));
        assert!(matches!(nowhere, Err(Error::DatabaseLock { .. })));
    }

    #[test]
    fn one_server_holds_the_folder_until_it_lets_go() {
        let (_outer, folder) = folder();
        let held = folder.lock().unwrap();
        assert!(matches!(folder.lock(), Err(Error::InUse(_))));
        drop(held);
        assert!(folder.lock().is_ok());
    }
}
