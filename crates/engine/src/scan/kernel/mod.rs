//! The arithmetic of a scan: dot products over f16 rows, Hamming distances over sign codes.
//!
//! Each instruction set has the whole loop inside one function that is compiled for it: a call per
//! row would cost more than the row. A row's score depends only on the query and the row, not on
//! its position. So equal rows have equal scores. Instruction sets add in different orders: their
//! scores differ by rounding, at most [`SCORE_TOLERANCE`] for unit vectors.

mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

/// f16 numbers in a cache line; rows are padded with zeros to a multiple of it.
pub const LANES: usize = 32;

/// Rows of sign codes in a block.
pub const BLOCK_ROWS: usize = 8;

/// How far two kernels' scores of one row may lie apart. Summing 384 products of unit vectors in
/// f32 is off by less than 384 · 2⁻²⁴ ≈ 2.3e-5 in the worst order and by about 1e-7 in practice.
pub const SCORE_TOLERANCE: f32 = 2e-6;

/// One cache line of an f16 row, as IEEE 754 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct RowLine(pub [u16; LANES]);

/// One cache line of a query.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub struct QueryLine(pub [f32; LANES]);

/// One 64-bit word of the sign codes of eight rows: entry `r` belongs to the block's row `r`. A
/// block of a slab with `w` words a row is `w` such lines, so one load fetches the same word of
/// eight rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct CodeLine(pub [u64; BLOCK_ROWS]);

impl RowLine {
    /// Thirty-two zeros.
    pub const ZERO: Self = Self([0; LANES]);
}

impl CodeLine {
    /// No bit set.
    pub const ZERO: Self = Self([0; BLOCK_ROWS]);
}

/// A row whose sign code is near the query's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The index of the row in its slab.
    pub row: u32,
    /// In how many signs it differs from the query.
    pub distance: u32,
}

/// An instruction set of this processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    X86(x86::X86),
    Portable,
}

impl Kernel {
    /// The fastest kernel that this processor can run.
    pub fn detect() -> Self {
        Self::available()[0]
    }

    /// Every kernel that this processor can run, fastest first. The portable one is always the
    /// last.
    pub fn available() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let special = x86::X86::available().map(Level::X86);
        #[cfg(not(target_arch = "x86_64"))]
        let special = std::iter::empty();
        special.chain([Level::Portable]).map(Self).collect()
    }

    /// A name for the log: `avx512`, `avx2` or `portable`.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::X86(isa) => isa.name(),
            Level::Portable => "portable",
        }
    }

    /// How many bytes a scan may read on an async thread: as many as take about 0.3 ms. Longer
    /// scans run on the blocking threads. The switch takes about 20 µs.
    pub fn bytes_in_place(self) -> usize {
        match self.0 {
            // At 25 GB/s.
            #[cfg(target_arch = "x86_64")]
            Level::X86(_) => 8 << 20,
            // 6 GB/s of vectors, and 2 GB/s of sign codes, on a machine without the kernels above.
            Level::Portable => 1 << 20,
        }
    }

    /// Writes the dot product of the query and each row to `scores`.
    /// `rows`: `[scores.len()][query.len()]` lines. Panics if the lengths do not match.
    pub fn scores(self, query: &[QueryLine], rows: &[RowLine], scores: &mut [f32]) {
        assert_eq!(
            rows.len(),
            query.len() * scores.len(),
            "a score for each row"
        );
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::X86(isa) => isa.scores(query, rows.chunks_exact(query.len()), scores),
            Level::Portable => portable::scores(query, rows.chunks_exact(query.len()), scores),
        }
    }

    /// Like [`scores`](Self::scores) for rows that lie apart. They are prefetched while earlier
    /// ones are computed. Each of `rows` has `query.len()` lines. Panics if the lengths do not
    /// match.
    pub fn scores_scattered(self, query: &[QueryLine], rows: &[&[RowLine]], scores: &mut [f32]) {
        assert_eq!(rows.len(), scores.len(), "a score for each row");
        assert!(
            rows.iter().all(|row| row.len() == query.len()),
            "rows as long as the query"
        );
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::X86(isa) => isa.scores(query, x86::FetchAhead { rows }, scores),
            Level::Portable => portable::scores(query, rows.iter().copied(), scores),
        }
    }

    /// Adds to `found` the rows whose sign code differs from `query` in at most `limit` bits, in
    /// rising order. `codes`: blocks of `query.len()` lines, the first of them for row `first_row`
    /// and the seven after it. Only the first `n_rows` rows count, not the padding of the last
    /// block. Panics if there are fewer blocks than rows need.
    pub fn near(
        self,
        query: &[u64],
        codes: &[CodeLine],
        first_row: u32,
        n_rows: usize,
        limit: u32,
        found: &mut Vec<Candidate>,
    ) {
        assert!(
            codes.len() >= n_rows.div_ceil(BLOCK_ROWS) * query.len(),
            "a code for each row"
        );
        let span = Span {
            query,
            codes,
            first_row,
            n_rows,
            limit,
        };
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::X86(isa) => isa.near(span, found),
            Level::Portable => portable::near(span, found),
        }
    }
}

/// The arguments of [`Kernel::near`].
#[derive(Clone, Copy)]
struct Span<'a> {
    query: &'a [u64],
    codes: &'a [CodeLine],
    first_row: u32,
    n_rows: usize,
    limit: u32,
}

impl Span<'_> {
    /// Adds the rows of a block whose bit is set in `near`, leaving out those that only pad it.
    #[inline(always)]
    fn push_block(&self, block: usize, near: u8, distances: [u64; 8], found: &mut Vec<Candidate>) {
        let mut near = near;
        while near != 0 {
            let lane = near.trailing_zeros() as usize;
            near &= near - 1;
            let place = block * BLOCK_ROWS + lane;
            if place < self.n_rows {
                found.push(Candidate {
                    row: self.first_row + place as u32,
                    distance: distances[lane] as u32,
                });
            }
        }
    }
}
