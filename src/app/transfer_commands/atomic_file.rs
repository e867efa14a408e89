//! A file that appears under its name whole or not at all.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tempfile::NamedTempFile;

/// The file until it is whole: beside its target, under a name that ends in `.partial`, with mode
/// 0600. Removed unless kept.
#[derive(Debug)]
pub struct AtomicFile {
    target: PathBuf,
    partial: NamedTempFile,
}

impl AtomicFile {
    /// Makes an empty file beside `target`.
    ///
    /// # Errors
    /// There is a file of that name already, or the folder cannot be written.
    pub fn create(target: &Path) -> anyhow::Result<Self> {
        if fs::symlink_metadata(target).is_ok() {
            bail!(exists(target));
        }
        let target = std::path::absolute(target)?;
        let mut prefix = target.file_name().unwrap_or_default().to_owned();
        prefix.push(".");
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
        let partial = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(".partial")
            .make_in(folder(&target), |path| options.open(path))
            .with_context(|| cannot_be_written(&target))?;
        Ok(Self { target, partial })
    }

    /// The path of the file until it is kept.
    pub fn path(&self) -> &Path {
        self.partial.path()
    }

    /// The open file.
    pub fn file(&self) -> &File {
        self.partial.as_file()
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// A file of that name has appeared meanwhile, or the disk fails.
    pub fn keep(self) -> anyhow::Result<()> {
        let failed = || cannot_be_written(&self.target);
        self.partial.as_file().sync_all().with_context(failed)?;
        match self.partial.persist_noclobber(&self.target) {
            Ok(_) => {}
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => {
                bail!(exists(&self.target))
            }
            Err(error) => return Err(error.error).with_context(failed),
        }
        File::open(folder(&self.target))
            .and_then(|folder| folder.sync_all())
            .with_context(failed)
    }
}

fn folder(target: &Path) -> &Path {
    target.parent().unwrap_or(Path::new("/"))
}

fn cannot_be_written(target: &Path) -> String {
    format!("{} cannot be written", target.display())
}

fn exists(target: &Path) -> String {
    format!(
        "{} exists already: name another file, or move it away",
        target.display()
    )
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn kept_file_is_whole_and_private_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let partial = AtomicFile::create(&target).unwrap();
        partial.file().write_all(b"whole").unwrap();
        assert!(!target.exists());
        partial.keep().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"whole");
        let mode = fs::metadata(&target).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn dropped_file_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let partial = AtomicFile::create(&folder.path().join("out")).unwrap();
        let name = partial.path().to_string_lossy();
        assert!(name.ends_with(".partial"), "{name}");
        drop(partial);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn no_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let late = AtomicFile::create(&target).unwrap();
        fs::write(&target, "first").unwrap();
        assert!(AtomicFile::create(&target).is_err());
        assert!(late.keep().is_err());
        assert_eq!(fs::read(&target).unwrap(), b"first");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
