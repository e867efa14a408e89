//! Inspects a folder before anything is created in it.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use super::lock::is_held;
use super::{DataDir, Error};

/// The result of [`DataDir::inspect`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FolderState {
    /// The folder exists and can be written. Otherwise it can be created.
    pub is_there: bool,
    /// A server has locked it.
    pub is_in_use: bool,
}

impl DataDir {
    /// Inspects a folder. The file or folder that it creates as a test is removed at once.
    ///
    /// # Errors
    /// `Folder` if the folder can neither be written nor created, or is not a folder.
    pub fn inspect(path: &Path) -> Result<FolderState, Error> {
        let folder = Self {
            path: path.to_owned(),
        };
        let what = "the folder cannot be made";
        match fs::symlink_metadata(path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                try_folder(nearest_folder(path)).map_err(folder.failed(what))?;
                return Ok(FolderState {
                    is_there: false,
                    is_in_use: false,
                });
            }
            Err(error) => return Err(folder.failed(what)(error)),
        }
        try_file(path).map_err(folder.failed("the folder cannot be written"))?;
        let is_in_use = is_held(&path.join("lock"))
            .map_err(folder.failed("its lock file cannot be written"))?;
        Ok(FolderState {
            is_there: true,
            is_in_use,
        })
    }
}

/// The existing folder in which a missing one would be created, directly or with others in between.
fn nearest_folder(path: &Path) -> &Path {
    let is_there = |folder: &&Path| fs::symlink_metadata(folder).is_ok();
    match path.ancestors().skip(1).find(is_there) {
        Some(folder) => folder,
        // The parent of a relative path's first part is the empty path.
        None => Path::new("."),
    }
}

/// Creates an empty file beside another and removes it.
///
/// # Errors
/// Those of the file system.
pub fn try_file_beside(path: &Path) -> io::Result<()> {
    let path = std::path::absolute(path)?;
    try_file(path.parent().unwrap_or(Path::new("/")))
}

/// Creates an empty file in a folder and removes it. The modes alone do not show whether that
/// works: the file system may be read-only.
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

/// A name that no other process uses: others may be inspecting the same folder.
fn trial_name() -> io::Result<String> {
    let number = getrandom::u64().map_err(|_| io::ErrorKind::Other)?;
    Ok(format!(".prompt-service-{number:016x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inspecting_creates_nothing() {
        let outer = tempfile::tempdir().unwrap();
        let path = outer.path().join("a/data");
        let found = |is_there, is_in_use| FolderState {
            is_there,
            is_in_use,
        };
        assert_eq!(DataDir::inspect(&path).unwrap(), found(false, false));
        assert!(!DataDir::has_key(&path).unwrap());
        assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 0);
        let folder = DataDir::open(&path).unwrap();
        assert_eq!(DataDir::inspect(&path).unwrap(), found(true, false));
        assert!(!DataDir::has_key(&path).unwrap());
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        let held = folder.lock().unwrap();
        assert_eq!(DataDir::inspect(&path).unwrap(), found(true, true));
        drop(held);
        assert_eq!(DataDir::inspect(&path).unwrap(), found(true, false));
        folder.secret_key().unwrap();
        assert!(DataDir::has_key(&path).unwrap());
        fs::write(path.join("secret.key"), "short").unwrap();
        let bad = DataDir::has_key(&path);
        assert!(matches!(bad, Err(Error::BadKey { .. })), "{bad:?}");
    }

    #[test]
    fn folder_that_can_neither_be_written_nor_created_is_refused() {
        let outer = tempfile::tempdir().unwrap();
        let (file, link) = (outer.path().join("file"), outer.path().join("link"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        // Not even root can make a folder in /proc.
        for path in [&file, &file.join("a/b"), &link, Path::new("/proc/data/a")] {
            let refused = DataDir::inspect(path);
            assert!(matches!(refused, Err(Error::Folder { .. })), "{refused:?}");
        }
        assert_eq!(nearest_folder(Path::new("data/a")), Path::new("."));
        assert_eq!(nearest_folder(&outer.path().join("a/b")), outer.path());
    }
}
