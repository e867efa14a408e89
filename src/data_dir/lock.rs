//! Locks between servers on one machine: one lock file for the folder and one for the database
//! file.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{DataDir, Error};

/// A lock of the folder or of a database file, held by one server. Released when dropped, or by the
/// kernel when the process ends in any way.
#[derive(Debug)]
pub struct FileLock {
    file: File,
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // Closing the file is not enough: a child process between fork and exec holds it open for a
        // moment.
        let _ = self.file.unlock();
    }
}

impl DataDir {
    /// Locks the folder for this server.
    ///
    /// # Errors
    /// `InUse` if another process has locked it; `Folder`.
    pub fn lock(&self) -> Result<FileLock, Error> {
        let file = open_lock(&self.path.join("lock"))
            .map_err(self.failed("its lock file cannot be written"))?;
        match file.try_lock() {
            Ok(()) => Ok(FileLock { file }),
            Err(TryLockError::WouldBlock) => Err(Error::InUse(self.path.clone())),
            Err(TryLockError::Error(error)) => {
                Err(self.failed("its lock file cannot be locked")(error))
            }
        }
    }
}

/// Locks an SQLite file for this server, whatever its data folder, by a lock file beside it, named
/// `….lock`. The file itself must not be opened for this, because closing it again would release
/// SQLite's own locks.
///
/// # Errors
/// `DatabaseInUse` if another process has locked it; `DatabaseLock`.
pub fn lock_database(path: &Path) -> Result<FileLock, Error> {
    let failed = |source| Error::DatabaseLock {
        path: path.to_owned(),
        source,
    };
    let file = open_lock(&database_lock(path)).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(FileLock { file }),
        Err(TryLockError::WouldBlock) => Err(Error::DatabaseInUse(path.to_owned())),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// Whether a server has locked the SQLite file.
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
    // One file has one lock, whatever name or link it is opened by. A file that does not exist yet
    // is not a link.
    let mut name = fs::canonicalize(path)
        .unwrap_or_else(|_| path.to_owned())
        .into_os_string();
    name.push(".lock");
    PathBuf::from(name)
}

/// Whether a process holds the lock file. A missing file is not created.
pub(super) fn is_held(path: &Path) -> io::Result<bool> {
    let file = match OpenOptions::new().write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match file.try_lock() {
        Ok(()) => {
            drop(FileLock { file });
            Ok(false)
        }
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn one_server_locks_a_database_file_under_all_its_names() {
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
            "inspecting creates no lock file"
        );
        assert!(lock_database(&outer.path().join("b.db")).is_ok());
        let lock = fs::metadata(outer.path().join("a.db.lock")).unwrap();
        assert_eq!(lock.permissions().mode() & 0o777, 0o600);
        drop(held);
        assert!(lock_database(&link).is_ok());
        let nowhere = lock_database(&outer.path().join("none/a.db"));
        assert!(matches!(nowhere, Err(Error::DatabaseLock { .. })));
    }

    #[test]
    fn one_server_locks_the_folder_until_it_unlocks_it() {
        let outer = tempfile::tempdir().unwrap();
        let folder = DataDir::open(outer.path()).unwrap();
        let held = folder.lock().unwrap();
        assert!(matches!(folder.lock(), Err(Error::InUse(_))));
        drop(held);
        assert!(folder.lock().is_ok());
    }
}
