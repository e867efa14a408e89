//! A file that appears under its name whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// The file until it is whole, under a name of its own, for its owner's eyes only; removed unless
/// kept.
#[derive(Debug)]
pub struct Draft {
    target: PathBuf,
    path: PathBuf,
}

impl Draft {
    /// Makes an empty file beside `target`.
    ///
    /// # Errors
    /// There is a file of that name already, or the folder cannot be written.
    pub fn of(target: &Path) -> anyhow::Result<(Self, File)> {
        if fs::symlink_metadata(target).is_ok() {
            bail!(exists(target));
        }
        let target = std::path::absolute(target)?;
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.partial", std::process::id()));
        let path = target.with_file_name(name);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("{} cannot be written", target.display()))?;
        Ok((Self { target, path }, file))
    }

    /// Where the file is for now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// A file of that name has appeared meanwhile, or the disk fails.
    pub fn keep(self) -> anyhow::Result<()> {
        let failed = || format!("{} cannot be written", self.target.display());
        File::open(&self.path)
            .and_then(|file| file.sync_all())
            .with_context(failed)?;
        // A link, because renaming would replace a file that has appeared meanwhile.
        match fs::hard_link(&self.path, &self.target) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                bail!(exists(&self.target))
            }
            linked => linked.with_context(failed)?,
        }
        fs::remove_file(&self.path).with_context(failed)?;
        let folder = self.target.parent().unwrap_or(Path::new("/"));
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .with_context(failed)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Absent once kept. Otherwise one that cannot be removed is only clutter.
        let _ = fs::remove_file(&self.path);
    }
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
    fn a_kept_draft_is_there_whole_and_private_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let (draft, mut file) = Draft::of(&target).unwrap();
        file.write_all(b"whole").unwrap();
        assert!(!target.exists());
        draft.keep().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"whole");
        let mode = fs::metadata(&target).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_dropped_draft_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        drop(Draft::of(&folder.path().join("out")).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn no_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let (late, _file) = Draft::of(&target).unwrap();
        fs::write(&target, "first").unwrap();
        assert!(Draft::of(&target).is_err());
        assert!(late.keep().is_err());
        assert_eq!(fs::read(&target).unwrap(), b"first");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
