//! How much a thread may take of a core that others want.

/// How much nicer than the rest of the process background threads are: at 10 a thread gets about a tenth of a core that
/// another wants, and all of one that nobody wants.
pub const NICENESS: i32 = 10;

/// Puts the calling thread behind the rest of the process, for good.
pub fn lower_priority() {
    // Only a wish: a system that refuses it runs the thread at normal priority. On Linux the call is about the calling
    // thread; elsewhere it would slow the whole process.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::nice(NICENESS);
}
