//! Rows in memory, of one user or of all: ids, f16 vectors and their sign codes.
//!
//! A slab is a list of segments of 4,096 rows, all full except the last. It is shared
//! copy-on-write: a scan holds an `Arc` of the slab and sees it as it was when the scan began. A
//! writer copies only the parts that it changes and a scan still holds, at most about 0.6 MB
//! however many rows there are. No writer waits for a scan, and growth moves no rows.

use std::iter::repeat_n;
use std::sync::Arc;

use super::kernel::{BLOCK_ROWS, CodeLine, LANES, RowLine};

/// Rows of a segment. Its codes are one piece of 192 KiB (at 384 dimensions), long enough to be
/// read at the speed of the memory.
pub const SEGMENT_ROWS: usize = 4096;

/// Rows of a piece of a segment's vectors: 384 KiB at 384 dimensions. One append copies no more of
/// them.
const PIECE_ROWS: usize = 512;

/// Bits of a code's word.
const WORD_BITS: usize = 64;

/// The sizes that follow from a vector's dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowShape {
    /// Numbers of a vector, at least 1.
    pub dimension: usize,
    /// Cache lines of an f16 row.
    pub lines: usize,
    /// 64-bit words of a sign code.
    pub words: usize,
}

impl RowShape {
    /// The sizes for `dimension` numbers; 0 is taken as 1.
    pub fn new(dimension: usize) -> Self {
        let dimension = dimension.max(1);
        Self {
            dimension,
            lines: dimension.div_ceil(LANES),
            words: dimension.div_ceil(WORD_BITS),
        }
    }

    /// Bytes of a vector as stored: f16 without padding.
    pub fn stored_bytes(self) -> usize {
        2 * self.dimension
    }
}

/// Up to [`SEGMENT_ROWS`] rows. The arrays may be longer than `len`. The rest is zero or left over,
/// and never read.
#[derive(Clone)]
pub struct Segment {
    len: usize,
    /// No id in the segment is lower. With `highest`, it lets a search for an id skip most
    /// segments.
    lowest: i64,
    /// No id in the segment is higher.
    highest: i64,
    ids: Arc<[i64]>,
    /// `[blocks][words]`, see [`CodeLine`].
    codes: Arc<[CodeLine]>,
    /// Pieces of [`PIECE_ROWS`] rows, each `[rows][lines]`.
    pieces: Vec<Arc<[RowLine]>>,
}

/// Rows in no particular order.
#[derive(Clone)]
pub struct Slab {
    shape: RowShape,
    segments: Vec<Arc<Segment>>,
    len: usize,
}

impl Slab {
    /// A slab without rows.
    pub fn new(shape: RowShape) -> Self {
        Self {
            shape,
            segments: Vec::new(),
            len: 0,
        }
    }

    /// The sizes of its rows.
    pub fn shape(&self) -> RowShape {
        self.shape
    }

    /// How many rows it has.
    pub fn n_rows(&self) -> usize {
        self.len
    }

    /// Bytes of its arrays, including spare room.
    pub fn bytes(&self) -> usize {
        // All segments but the last are full, and full ones are alike.
        match (self.segments.first(), self.segments.last()) {
            (Some(first), Some(last)) => {
                first.bytes() * (self.segments.len() - 1) + last.bytes() + size_of::<Self>()
            }
            _ => size_of::<Self>(),
        }
    }

    /// The segments in order.
    pub fn segments(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().map(Arc::as_ref)
    }

    /// The id of row `at`, if there is such a row.
    pub fn id(&self, at: usize) -> Option<i64> {
        let segment = self.segments.get(at / SEGMENT_ROWS)?;
        segment.ids().get(at % SEGMENT_ROWS).copied()
    }

    /// The vector of row `at`. Panics if there is no such row.
    pub fn row(&self, at: usize) -> &[RowLine] {
        self.segments[at / SEGMENT_ROWS].row(self.shape, at % SEGMENT_ROWS)
    }

    /// The index of the row with that id. Takes about a nanosecond per segment, and a nanosecond
    /// per three rows of the segments whose range of ids includes the id.
    pub fn find(&self, id: i64) -> Option<usize> {
        self.segments
            .iter()
            .enumerate()
            .rev()
            .filter(|(_, segment)| (segment.lowest..=segment.highest).contains(&id))
            .find_map(|(index, segment)| Some(index * SEGMENT_ROWS + segment.find(id)?))
    }

    /// Adds rows. `stored`: `[ids.len()][dimension]` f16, little-endian. The ids are new; the sizes
    /// match.
    pub fn extend(&mut self, ids: &[i64], stored: &[u8]) {
        let row_bytes = self.shape.stored_bytes();
        assert_eq!(stored.len(), ids.len() * row_bytes, "a vector for each id");
        let (mut ids, mut stored) = (ids, stored);
        while !ids.is_empty() {
            if self.len.is_multiple_of(SEGMENT_ROWS) {
                self.segments.push(Arc::new(Segment::empty()));
            }
            let room = SEGMENT_ROWS - self.len % SEGMENT_ROWS;
            let n = room.min(ids.len());
            let last = self
                .segments
                .last_mut()
                .expect("one was pushed if none had room");
            Arc::make_mut(last).extend(self.shape, &ids[..n], &stored[..n * row_bytes]);
            self.len += n;
            (ids, stored) = (&ids[n..], &stored[n * row_bytes..]);
        }
    }

    /// Removes row `at` by moving the last row into its place. Panics if there is no such row.
    pub fn swap_remove(&mut self, at: usize) {
        let shape = self.shape;
        let last = self.len - 1;
        if at != last {
            let moved = Arc::clone(&self.segments[last / SEGMENT_ROWS]);
            let from = last % SEGMENT_ROWS;
            let target = Arc::make_mut(&mut self.segments[at / SEGMENT_ROWS]);
            target.overwrite(
                shape,
                at % SEGMENT_ROWS,
                moved.ids[from],
                moved.row(shape, from),
            );
        }
        self.len = last;
        if last.is_multiple_of(SEGMENT_ROWS) {
            self.segments.pop();
        } else if let Some(segment) = self.segments.last_mut() {
            let segment = Arc::make_mut(segment);
            segment.len -= 1;
            segment.pieces.truncate(segment.len.div_ceil(PIECE_ROWS));
        }
    }
}

impl Segment {
    /// Its rows' ids: `[n_rows]`.
    pub fn ids(&self) -> &[i64] {
        &self.ids[..self.len]
    }

    /// Its rows' sign codes: `[blocks][words]`.
    pub fn codes(&self) -> &[CodeLine] {
        &self.codes
    }

    /// Its rows' vectors in pieces, each `[n][lines]`, with the pieces' ids.
    pub fn pieces(&self, shape: RowShape) -> impl Iterator<Item = (&[i64], &[RowLine])> {
        let pieces = self.ids().chunks(PIECE_ROWS).zip(&self.pieces);
        pieces.map(move |(ids, piece)| (ids, &piece[..ids.len() * shape.lines]))
    }

    fn empty() -> Self {
        Self {
            len: 0,
            lowest: i64::MAX,
            highest: i64::MIN,
            ids: Arc::new([]),
            codes: Arc::new([]),
            pieces: Vec::new(),
        }
    }

    fn bytes(&self) -> usize {
        let pieces: usize = self.pieces.iter().map(|piece| size_of_val(&**piece)).sum();
        size_of::<Self>() + size_of_val(&*self.ids) + size_of_val(&*self.codes) + pieces
    }

    fn row(&self, shape: RowShape, at: usize) -> &[RowLine] {
        let start = at % PIECE_ROWS * shape.lines;
        &self.pieces[at / PIECE_ROWS][start..start + shape.lines]
    }

    fn find(&self, id: i64) -> Option<usize> {
        // Each chunk is compared to its end, so that the compiler makes vector code of it.
        const CHUNK: usize = 64;
        let chunks = self.ids().chunks(CHUNK);
        let (chunk, ids) = chunks.enumerate().find(|(_, ids)| {
            ids.iter()
                .fold(false, |found, other| found | (*other == id))
        })?;
        Some(chunk * CHUNK + ids.iter().position(|other| *other == id)?)
    }

    fn extend(&mut self, shape: RowShape, ids: &[i64], stored: &[u8]) {
        self.reserve(shape, self.len + ids.len());
        let own_ids = Arc::make_mut(&mut self.ids);
        let codes = Arc::make_mut(&mut self.codes);
        let mut rows = ids.iter().zip(stored.chunks_exact(shape.stored_bytes()));
        let end = self.len + ids.len();
        while self.len < end {
            let piece = Arc::make_mut(&mut self.pieces[self.len / PIECE_ROWS]);
            let free = piece
                .chunks_exact_mut(shape.lines)
                .skip(self.len % PIECE_ROWS);
            // The rows come second: `zip` must not take one when the piece is full.
            for (lines, (id, stored)) in free.zip(&mut rows) {
                write_row(lines, stored);
                write_code(codes, shape, self.len, lines);
                own_ids[self.len] = *id;
                self.lowest = self.lowest.min(*id);
                self.highest = self.highest.max(*id);
                self.len += 1;
            }
        }
    }

    fn overwrite(&mut self, shape: RowShape, at: usize, id: i64, lines: &[RowLine]) {
        let start = at % PIECE_ROWS * shape.lines;
        let piece = Arc::make_mut(&mut self.pieces[at / PIECE_ROWS]);
        piece[start..start + shape.lines].copy_from_slice(lines);
        write_code(Arc::make_mut(&mut self.codes), shape, at, lines);
        Arc::make_mut(&mut self.ids)[at] = id;
        self.lowest = self.lowest.min(id);
        self.highest = self.highest.max(id);
    }

    /// Makes room for `rows` rows in all.
    fn reserve(&mut self, shape: RowShape, rows: usize) {
        if rows > self.ids.len() {
            let capacity = grown_capacity(self.ids.len(), rows, SEGMENT_ROWS);
            self.ids = grown(&self.ids, capacity, 0);
            let code_lines = capacity / BLOCK_ROWS * shape.words;
            self.codes = grown(&self.codes, code_lines, CodeLine::ZERO);
        }
        for piece in 0..rows.div_ceil(PIECE_ROWS) {
            let needed = (rows - piece * PIECE_ROWS).min(PIECE_ROWS);
            if piece == self.pieces.len() {
                self.pieces.push(Arc::new([]));
            }
            let lines = &mut self.pieces[piece];
            let present = lines.len() / shape.lines;
            if needed > present {
                let capacity = grown_capacity(present, needed, PIECE_ROWS);
                *lines = grown(lines, capacity * shape.lines, RowLine::ZERO);
            }
        }
    }
}

/// The capacity to grow to, in whole blocks: as much as needed if rows come in bulk, half as much
/// again if they come one by one.
fn grown_capacity(present: usize, needed: usize, most: usize) -> usize {
    needed
        .max(present + present / 2)
        .next_multiple_of(BLOCK_ROWS)
        .min(most)
}

fn grown<T: Copy>(present: &[T], len: usize, fill: T) -> Arc<[T]> {
    let added = len.saturating_sub(present.len());
    present
        .iter()
        .copied()
        .chain(repeat_n(fill, added))
        .collect()
}

/// Unpacks a stored vector. The padding of its last line becomes zero.
fn write_row(lines: &mut [RowLine], stored: &[u8]) {
    for (line, bytes) in lines.iter_mut().zip(stored.chunks(2 * LANES)) {
        let mut unpacked = RowLine::ZERO;
        for (lane, bytes) in unpacked.0.iter_mut().zip(bytes.chunks_exact(2)) {
            *lane = u16::from_le_bytes([bytes[0], bytes[1]]);
        }
        *line = unpacked;
    }
}

fn write_code(codes: &mut [CodeLine], shape: RowShape, at: usize, lines: &[RowLine]) {
    let block = &mut codes[at / BLOCK_ROWS * shape.words..][..shape.words];
    for (word, lines) in block.iter_mut().zip(lines.chunks(WORD_BITS / LANES)) {
        word.0[at % BLOCK_ROWS] = sign_word(lines);
    }
}

/// The signs of up to 64 numbers, the first in the lowest bit; 1 is negative.
fn sign_word(lines: &[RowLine]) -> u64 {
    lines.iter().rev().fold(0, |word, line| {
        let mut signs = 0_u32;
        for (lane, bits) in line.0.iter().enumerate() {
            signs |= u32::from(bits >> 15) << lane;
        }
        word << LANES | u64::from(signs)
    })
}

/// The sign code of a query: `[words]`, by the same rule as the code of a row.
pub fn query_code(shape: RowShape, query: &[f32]) -> Vec<u64> {
    let mut code = vec![0_u64; shape.words];
    for (word, numbers) in code.iter_mut().zip(query.chunks(WORD_BITS)) {
        for (bit, number) in numbers.iter().enumerate() {
            *word |= u64::from(number.is_sign_negative()) << bit;
        }
    }
    code
}
