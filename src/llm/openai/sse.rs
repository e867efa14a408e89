//! Server-sent events, read piece by piece as they come off a connection, in bounded memory.
//!
//! The grammar is that of the HTML standard, section 9.2.6; of the fields only `data` is of interest here.

/// An event longer than allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

/// Splits a stream of bytes into events. Pieces may end anywhere: in a line ending, in a character.
#[derive(Debug)]
pub struct Decoder {
    /// Bytes that a line, and the data of an event, may have.
    limit: usize,
    /// The line that has begun.
    line: Vec<u8>,
    /// The data of the event that has begun, its lines joined by LF.
    data: Vec<u8>,
    /// Whether the event has a data line, which may be an empty one.
    has_data: bool,
    /// The last piece ended in CR: an LF at the beginning of the next belongs to it.
    after_cr: bool,
    /// Before the first line, which alone may begin with a byte order mark.
    at_start: bool,
}

impl Decoder {
    /// A decoder for one stream whose events have at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            line: Vec::new(),
            data: Vec::new(),
            has_data: false,
            after_cr: false,
            at_start: true,
        }
    }

    /// Takes the next piece in, and hands over the data of each event that it completes.
    ///
    /// # Errors
    /// [`TooLong`], or the first error of `each`; the decoder is of no use after either.
    pub fn feed<E: From<TooLong>>(
        &mut self,
        mut piece: &[u8],
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.after_cr && !piece.is_empty() {
            piece = piece.strip_prefix(b"\n").unwrap_or(piece);
            self.after_cr = false;
        }
        while let Some(end) = piece.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            self.extend_line(&piece[..end])?;
            let rest = &piece[end + 1..];
            piece = match (piece[end], rest) {
                (b'\r', [b'\n', rest @ ..]) => rest,
                (b'\r', []) => {
                    self.after_cr = true;
                    rest
                }
                _ => rest,
            };
            if self.line.is_empty() {
                if self.has_data {
                    each(&self.data)?;
                }
                self.data.clear();
                self.has_data = false;
            } else {
                self.take_line()?;
            }
        }
        Ok(self.extend_line(piece)?)
    }

    /// The data of an event that had begun when the stream ended. The standard drops it; some servers leave the last blank line out.
    pub fn finish(mut self) -> Option<Vec<u8>> {
        // What is too long was refused when it came in.
        self.take_line().ok()?;
        self.has_data.then_some(self.data)
    }

    fn extend_line(&mut self, bytes: &[u8]) -> Result<(), TooLong> {
        if self.line.len() + bytes.len() > self.limit {
            return Err(TooLong);
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    /// Reads the line that is complete: a data line is kept, a comment or another field is not.
    fn take_line(&mut self) -> Result<(), TooLong> {
        const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();
        let mut line = self.line.as_slice();
        if std::mem::take(&mut self.at_start) {
            line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
        }
        let value = match line.strip_prefix(b"data") {
            Some([]) => Some(&[][..]),
            Some([b':', value @ ..]) => Some(value.strip_prefix(b" ").unwrap_or(value)),
            Some(_) | None => None,
        };
        if let Some(value) = value {
            if self.data.len() + value.len() + usize::from(self.has_data) > self.limit {
                return Err(TooLong);
            }
            if self.has_data {
                self.data.push(b'\n');
            }
            self.has_data = true;
            self.data.extend_from_slice(value);
        }
        self.line.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(pieces: &[&[u8]], limit: usize) -> Result<Vec<String>, TooLong> {
        let (mut decoder, mut events) = (Decoder::new(limit), Vec::new());
        for piece in pieces {
            decoder.feed(piece, |data| {
                events.push(String::from_utf8(data.to_vec()).unwrap());
                Ok::<_, TooLong>(())
            })?;
        }
        Ok(events)
    }

    #[test]
    fn the_three_line_endings_comments_and_other_fields() {
        let stream =
            b"\xef\xbb\xbfdata: a\n\n: comment\r\n\r\nevent: x\r\ndata:b\r\nid: 1\r\n\r\ndata\r\rdata: c\rdata: d\r\r";
        assert_eq!(
            decode(&[stream], 100).unwrap(),
            ["a", "b", "", "c\nd"].map(str::to_owned)
        );
    }

    #[test]
    fn an_event_without_its_blank_line_is_not_handed_over_but_can_be_asked_for() {
        let mut decoder = Decoder::new(100);
        let none = |_: &[u8]| -> Result<(), TooLong> { panic!("no event is complete") };
        decoder.feed(b"data: [DO", none).unwrap();
        decoder.feed(b"NE]", none).unwrap();
        assert_eq!(decoder.finish().unwrap(), b"[DONE]");
        assert_eq!(Decoder::new(1).finish(), None);
    }

    #[test]
    fn a_line_or_an_event_that_never_ends_is_refused_early() {
        assert_eq!(decode(&[&[b'x'; 101]], 100), Err(TooLong));
        assert_eq!(decode(&[&[b'x'; 60], &[b'x'; 60]], 100), Err(TooLong));
        let line = [b"data: ".as_slice(), &[b'x'; 40], b"\n"].concat();
        assert_eq!(decode(&[&line, &line], 100), Ok(vec![]));
        assert_eq!(decode(&[&line, &line, &line], 100), Err(TooLong));
    }

    #[test]
    fn an_error_of_the_reader_ends_it() {
        let mut decoder = Decoder::new(100);
        let mut calls = 0;
        let fail = |_: &[u8]| {
            calls += 1;
            Err(TooLong)
        };
        assert_eq!(decoder.feed(b"data: 1\n\ndata: 2\n\n", fail), Err(TooLong));
        assert_eq!(calls, 1);
    }

    proptest! {
        #[test]
        fn how_a_stream_is_cut_makes_no_difference(
            events in prop::collection::vec("[^\r\n]{0,12}(\n[^\r\n]{0,12}){0,2}", 0..8),
            endings in prop::collection::vec(0..3usize, 1..40),
            cuts in prop::collection::vec(0..400usize, 0..12),
        ) {
            let mut endings = endings.iter().cycle().map(|at| ["\n", "\r", "\r\n"][*at]);
            let mut stream = String::new();
            // CR followed by LF would be one ending: no two endings may meet so.
            let mut end = |stream: &mut String| {
                let ending = endings.next().unwrap();
                let ending = if stream.ends_with('\r') && ending.starts_with('\n') { "\r\n" } else { ending };
                stream.push_str(ending);
            };
            for event in &events {
                for line in event.split('\n') {
                    stream.push_str(": ping");
                    end(&mut stream);
                    stream.push_str("data: ");
                    stream.push_str(line);
                    end(&mut stream);
                }
                end(&mut stream);
            }
            let stream = stream.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut < stream.len()).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]]).collect();
            prop_assert_eq!(decode(&pieces, 1000).unwrap(), events);
        }

        #[test]
        fn no_bytes_make_it_panic_or_keep_more_than_allowed(
            pieces in prop::collection::vec(prop::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b':'), any::<u8>()], 0..40), 0..20),
        ) {
            let mut decoder = Decoder::new(32);
            for piece in &pieces {
                if decoder.feed(piece, |_| Ok::<_, TooLong>(())).is_err() {
                    break;
                }
                prop_assert!(decoder.line.len() <= 32 && decoder.data.len() <= 32);
            }
        }
    }
}
