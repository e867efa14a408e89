//! Room on the disk that is kept for the writes that must succeed on a full disk.
//!
//! A write needs room even if it deletes: SQLite appends the changed pages to its log first. The
//! reserve is a file beside the database whose blocks are allocated and never used. Cutting it
//! gives room to the log at a moment when there is no other room. The file holds no data: it may be
//! deleted, and the next start creates it again.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// The size of a reserve, in bytes. A deletion writes about 100 kB to the log, and the database
/// file may lag behind the log by a quarter of the reserve and one answer (1 MiB unless set
/// otherwise).
const RESERVE_BYTES: u64 = 8 << 20;

/// The part of the file system that the reserve may take: an eighth of a few MiB is still enough
/// for a deletion.
const FILE_SYSTEM_PARTS: u64 = 8;

/// A reserve that is not whole is made in steps of this part of a whole one.
const STEPS: u64 = 8;

/// The most steps of a reserve that is not whole. The rest of the room is left to the log, so that
/// writes that need no growth of the database file go on: without any room for the log, the pages
/// that deletions free could not be used.
const SHORT_STEPS: u64 = 4;

/// The reserve of one database file.
#[derive(Clone, Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    /// Bytes of a whole reserve.
    size: u64,
}

impl Reserve {
    /// The reserve of the database at `database`: smaller on a small file system.
    pub fn of(database: &Path) -> Self {
        let mut name = database.as_os_str().to_owned();
        name.push("-reserve");
        // A file beyond the limit on its size would end the process with a signal.
        let largest_file = getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX);
        let size = RESERVE_BYTES
            .min(file_system_bytes(database) / FILE_SYSTEM_PARTS)
            .min(largest_file / 4)
            .max(STEPS);
        Self {
            path: PathBuf::from(name),
            size,
        }
    }

    /// How far the database file may lag behind the log, in bytes, so that a whole reserve has room
    /// for the difference and for what a deletion adds.
    pub fn lag(&self) -> u64 {
        self.size / 4
    }

    /// Makes the reserve whole if there is as much room again beside it. Otherwise makes it as
    /// large as possible, up to half of a whole one, while a step of room stays free. Returns
    /// whether it is whole.
    pub fn fill(&self) -> bool {
        let Ok(file) = self.open() else { return false };
        match resize(&file, self.size, self.size) {
            Ok(()) => return true,
            // The file system cannot allocate in advance, so there is no reserve and no shortage of
            // it.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return true,
            Err(_) => {}
        }
        let step = self.size / STEPS;
        for steps in (0..=SHORT_STEPS).rev() {
            if resize(&file, steps * step, step).is_ok() {
                break;
            }
        }
        false
    }

    /// Whether the file system has next to no room besides the reserve. Only reads numbers.
    pub fn is_all_there_is(&self) -> bool {
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        statvfs(folder).is_ok_and(|found| {
            found.f_blocks > 0 && found.f_bavail.saturating_mul(found.f_frsize) < self.size / STEPS
        })
    }

    /// Gives the reserve's room back to the file system.
    pub fn release(&self) {
        // A failure leaves the reserve as it was, and the write that needs its room fails.
        let released = OpenOptions::new().write(true).open(&self.path);
        if let Ok(file) = released {
            // Synchronised, because some file systems free blocks only when they have committed
            // that.
            let _ = file.set_len(0).and_then(|()| file.sync_all());
        }
    }

    /// Whether there is room for so many bytes, the released reserve's room included. True if this
    /// cannot be tried.
    pub fn has_room(&self, bytes: u64) -> bool {
        if bytes == 0 {
            return true;
        }
        self.open().is_ok_and(|file| {
            let tried = resize(&file, 0, bytes);
            matches!(tried, Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS))
        })
    }

    fn open(&self) -> io::Result<File> {
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&self.path)
    }
}

/// Gives the file a size of `bytes`, all allocated, if `beside` more bytes could be allocated too.
/// On an error the file is cut to its previous size, or to `bytes` if that is less.
fn resize(file: &File, bytes: u64, beside: u64) -> Result<(), Errno> {
    let before = file.metadata().map_or(0, |metadata| metadata.len());
    // Some file systems leave a part allocated when they fail.
    let cut = |length| file.set_len(length).map_err(|_| Errno::IO);
    match fallocate(file, FallocateFlags::empty(), 0, bytes + beside) {
        Ok(()) => cut(bytes),
        Err(error) => {
            cut(before.min(bytes))?;
            Err(error)
        }
    }
}

/// The size of the file system that the database is on. Unknown counts as unlimited.
fn file_system_bytes(database: &Path) -> u64 {
    let folder = database.parent().unwrap_or(Path::new("/"));
    match statvfs(folder) {
        Ok(found) if found.f_blocks > 0 => found.f_blocks.saturating_mul(found.f_frsize),
        Ok(_) | Err(_) => u64::MAX,
    }
}
