//! Numbers of a weights file: borrowed from the program, or owned and aligned to cache lines.

use std::fmt;
use std::ops::Deref;

/// Bytes of a cache line; weights start on one, so that no vector load straddles two.
pub(super) const LINE_BYTES: usize = 64;

/// A read-only array whose first item lies on a cache line.
pub(super) enum AlignedArray<T: 'static> {
    /// Part of a `static`.
    Borrowed(&'static [T]),
    /// A heap allocation with room to begin on a cache line. It never grows, so it is never moved.
    Owned {
        buffer: Vec<T>,
        start: usize,
        len: usize,
    },
}

impl<T: Copy + Default> AlignedArray<T> {
    /// An owned array of `len` items, filled by `fill`.
    pub fn build(len: usize, fill: impl FnOnce(&mut [T])) -> Self {
        let spare = LINE_BYTES / size_of::<T>();
        let mut buffer = vec![T::default(); len + spare];
        let start = buffer.as_ptr().align_offset(LINE_BYTES).min(spare);
        fill(&mut buffer[start..start + len]);
        Self::Owned { buffer, start, len }
    }
}

impl<T> Deref for AlignedArray<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Borrowed(items) => items,
            Self::Owned { buffer, start, len } => &buffer[*start..*start + *len],
        }
    }
}

impl<T> fmt::Debug for AlignedArray<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedArray({} items)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owned_arrays_start_on_a_cache_line_and_hold_what_was_written() {
        for len in [0, 1, 15, 64, 1000] {
            let array = AlignedArray::<f32>::build(len, |items| {
                items
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, x)| *x = i as f32)
            });
            assert_eq!(array.as_ptr() as usize % LINE_BYTES, 0);
            assert_eq!(array.len(), len);
            assert!(array.iter().enumerate().all(|(i, x)| *x == i as f32));
        }
    }
}
