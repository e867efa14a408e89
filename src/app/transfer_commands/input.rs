//! The file that an import reads, which may be standard input.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, stdin};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens the file; `-` is standard input. An import reads twice, so what cannot be gone back in is
/// first copied to a temporary file, which has no name and is gone with the process.
///
/// # Errors
/// Those of the system.
pub fn open(path: &Path) -> anyhow::Result<File> {
    if path.as_os_str() != "-" {
        return Ok(File::open(path)?);
    }
    let mut input = File::from(stdin().as_fd().try_clone_to_owned()?);
    if input.metadata()?.is_file() {
        return Ok(input);
    }
    let mut copy = nameless_file()?;
    io::copy(&mut input, &mut copy)?;
    copy.rewind()?;
    Ok(copy)
}

fn nameless_file() -> io::Result<File> {
    let number = getrandom::u64().map_err(|_| io::ErrorKind::Other)?;
    let path = std::env::temp_dir().join(format!("prompt-service-{number:016x}"));
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}
