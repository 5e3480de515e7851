//! Profiles of one stream in one zstd frame, so that a profile repeats nothing of those shortly before it.
//!
//! The sender flushes the frame after each profile: what it wrote since the last flush is a piece. Both sides keep the last
//! bytes of the frame, the window, and nothing else. A piece has no meaning without the pieces before it, so pieces have
//! numbers from 1, and number 1 begins another frame.

use zstd::zstd_safe::{
    CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, compress_bound,
    zstd_sys::ZSTD_EndDirective,
};

/// The name of this encoding in the limits of a collector.
pub const PIECES: &str = "zstd-pieces";
/// Window of a frame, in bytes, and the size of the largest profile in it. An agent with
/// 19 series had 540 kB of profiles in each round of windows, so a repeated name is within the window.
pub const PIECES_WINDOW: usize = 1 << WINDOW_LOG;
const WINDOW_LOG: u32 = 20;
const LEVEL: i32 = 3;
/// A flush writes the end of a block behind what the bound counts.
const FLUSH_BYTES: usize = 1024;

/// Reasons why a piece cannot be read. The pieces after it cannot be read either.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PieceError {
    /// A piece is missing, or came twice.
    #[error("piece.number is {found}, after {before}: only the next number and 1 are valid")]
    Number {
        /// Number of the piece.
        found: u64,
        /// Number of the piece before it; 0 at the begin of the stream.
        before: u64,
    },
    /// The stated size is above the window.
    #[error("piece.bytes is {found}, the limit is {max}", max = PIECES_WINDOW)]
    Bytes {
        /// The stated size.
        found: u64,
    },
    /// The piece inflates to another size than it states.
    #[error("piece.bytes is {stated}, and pprof has {found} bytes after decompression")]
    Size {
        /// The stated size.
        stated: u64,
        /// Bytes that were inflated, of which there is at most one more than stated.
        found: usize,
    },
    /// The bytes are not the next ones of a zstd frame with a window of at most [`PIECES_WINDOW`].
    #[error("pprof is not the next piece of the zstd frame: {0}")]
    Zstd(String),
}

/// Compresses the profiles of one stream. Takes some 3 MiB of memory.
pub struct PieceEncoder {
    frame: CCtx<'static>,
    number: u64,
}

impl PieceEncoder {
    /// Begins a frame. Returns `None` if there is no memory.
    pub fn new() -> Option<Self> {
        let mut frame = CCtx::try_create()?;
        frame.set_parameter(CParameter::CompressionLevel(LEVEL)).ok()?;
        frame.set_parameter(CParameter::WindowLog(WINDOW_LOG)).ok()?;
        Some(Self { frame, number: 0 })
    }

    /// Returns the number of the next piece and its bytes, or `None` if the profile is larger than the window. After another
    /// failure, which only a lack of memory causes, the next piece begins another frame.
    pub fn encode(&mut self, raw: &[u8]) -> Option<(u64, Vec<u8>)> {
        if raw.len() > PIECES_WINDOW {
            return None;
        }
        let written = self.write(raw);
        if written.is_none() {
            self.restart();
            return None;
        }
        self.number += 1;
        Some((self.number, written?))
    }

    /// Lets the next piece begin another frame: the receiver will not read the last one.
    pub fn restart(&mut self) {
        // It fails only for a frame in use.
        let _ = self.frame.reset(ResetDirective::SessionOnly);
        self.number = 0;
    }

    fn write(&mut self, raw: &[u8]) -> Option<Vec<u8>> {
        let mut piece = Vec::with_capacity(compress_bound(raw.len()) + FLUSH_BYTES);
        let (mut input, mut output) = (InBuffer::around(raw), OutBuffer::around(&mut piece));
        let left =
            self.frame.compress_stream2(&mut output, &mut input, ZSTD_EndDirective::ZSTD_e_flush).ok()?;
        (left == 0 && input.pos() == raw.len()).then_some(piece)
    }
}

/// Inflates the pieces of one stream. Takes up to 1.5 MiB of memory once it has read a piece.
pub struct PieceDecoder {
    frame: DCtx<'static>,
    number: u64,
}

impl PieceDecoder {
    /// Waits for piece 1. Returns `None` if there is no memory.
    pub fn new() -> Option<Self> {
        let mut frame = DCtx::try_create()?;
        frame.set_parameter(DParameter::WindowLogMax(WINDOW_LOG)).ok()?;
        Some(Self { frame, number: 0 })
    }

    /// Returns the profile of a piece without compression. After an error only piece 1 of another frame is valid.
    pub fn decode(&mut self, number: u64, bytes: u64, piece: &[u8]) -> Result<Vec<u8>, PieceError> {
        let before = std::mem::take(&mut self.number);
        if number == 1 {
            let _ = self.frame.reset(ResetDirective::SessionOnly);
        } else if before == 0 || number != before + 1 {
            return Err(PieceError::Number { found: number, before });
        }
        let size = usize::try_from(bytes).ok().filter(|size| *size <= PIECES_WINDOW);
        let size = size.ok_or(PieceError::Bytes { found: bytes })?;
        let raw = self.inflate(piece, size)?;
        self.number = number;
        Ok(raw)
    }

    fn inflate(&mut self, piece: &[u8], size: usize) -> Result<Vec<u8>, PieceError> {
        let failed = |reason: &str| PieceError::Zstd(reason.to_owned());
        // Room for a byte more shows a piece that is larger than it states.
        let mut raw = Vec::with_capacity(size + 1);
        let (mut input, mut output) = (InBuffer::around(piece), OutBuffer::around(&mut raw));
        loop {
            let before = (input.pos(), output.pos());
            let left = self.frame.decompress_stream(&mut output, &mut input);
            let left = left.map_err(|code| failed(zstd::zstd_safe::get_error_name(code)))?;
            if left == 0 {
                // The sender never ends a frame: another one begins with piece 1.
                return Err(failed("it ends the frame"));
            }
            if output.pos() > size || (input.pos(), output.pos()) == before {
                break;
            }
        }
        let found = output.pos();
        if input.pos() < piece.len() || found != size {
            return Err(PieceError::Size { stated: size as u64, found });
        }
        Ok(raw)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pair() -> (PieceEncoder, PieceDecoder) {
        (PieceEncoder::new().unwrap(), PieceDecoder::new().unwrap())
    }

    /// Returns bytes that zstd cannot make smaller.
    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let step = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..len).map(step).collect()
    }

    #[test]
    fn repeated_content_takes_few_bytes() {
        let (mut encoder, mut decoder) = pair();
        let raw = noise(7, 50_000);
        let (_, first) = encoder.encode(&raw).unwrap();
        let (number, second) = encoder.encode(&raw).unwrap();
        assert!(first.len() >= raw.len() && second.len() < 100, "{} and {}", first.len(), second.len());
        assert_eq!(decoder.decode(1, 50_000, &first).as_ref(), Ok(&raw));
        assert_eq!(decoder.decode(number, 50_000, &second), Ok(raw));
    }

    /// Checks the edges: an empty profile, the largest one, and one above it, after which the frame goes on.
    #[test]
    fn profiles_up_to_the_window_fit() {
        let (mut encoder, mut decoder) = pair();
        for raw in [vec![], noise(1, PIECES_WINDOW), noise(2, 10), vec![0; PIECES_WINDOW]] {
            let (number, piece) = encoder.encode(&raw).unwrap();
            assert!(encoder.encode(&vec![1; PIECES_WINDOW + 1]).is_none());
            assert!(decoder.decode(number, raw.len() as u64, &piece) == Ok(raw));
        }
    }

    #[test]
    fn both_sides_stay_within_their_memory() {
        let (mut encoder, mut decoder) = pair();
        for seed in 0..8 {
            let raw = noise(seed, PIECES_WINDOW);
            let (number, piece) = encoder.encode(&raw).unwrap();
            assert!(decoder.decode(number, raw.len() as u64, &piece).is_ok());
        }
        let (sent, read) = (encoder.frame.sizeof(), decoder.frame.sizeof());
        assert!(sent < 4 << 20 && read < 1_600_000, "{sent} and {read} bytes");
    }

    /// Checks that each fault is an error that names its field, and that another frame may begin after it.
    #[test]
    fn pieces_that_lie_are_refused() {
        let (first, second) = (noise(3, 3000), noise(4, 3000));
        let (mut encoder, _) = pair();
        let one = encoder.encode(&first).unwrap().1;
        let two = encoder.encode(&second).unwrap().1;
        let ended = zstd::bulk::compress(&second, 3).unwrap();
        let mut wide = CCtx::create();
        wide.set_parameter(CParameter::WindowLog(WINDOW_LOG + 1)).unwrap();
        let wide = PieceEncoder { frame: wide, number: 0 }.encode(&second).unwrap().1;
        let bomb = PieceEncoder::new().unwrap().encode(&vec![0; PIECES_WINDOW]).unwrap().1;
        assert!(bomb.len() < 200);
        let cases: [(&str, u64, u64, &[u8], &str); 13] = [
            ("lost", 3, 3000, &two, "piece.number is 3, after 1"),
            ("number 0", 0, 3000, &two, "piece.number is 0, after 1"),
            ("number of 64 bits", u64::MAX, 3000, &two, "piece.number"),
            ("size of 64 bits", 2, u64::MAX, &two, "piece.bytes is 18446744073709551615, the limit"),
            ("above the window", 2, PIECES_WINDOW as u64 + 1, &two, "piece.bytes"),
            ("too small", 2, 2999, &two, "piece.bytes is 2999, and pprof has 3000"),
            ("too large", 2, 3001, &two, "piece.bytes is 3001, and pprof has 3000"),
            ("cut", 2, 3000, &two[..2000], "piece.bytes is 3000, and pprof has"),
            ("empty", 2, 3000, &[], "piece.bytes is 3000, and pprof has 0"),
            ("bomb", 1, 10, &bomb, "piece.bytes is 10, and pprof has 11"),
            ("ended", 1, 3000, &ended, "it ends the frame"),
            ("window", 1, 3000, &wide, "pprof is not the next piece"),
            ("text", 2, 3000, b"not a piece", "pprof is not the next piece"),
        ];
        for (name, number, bytes, piece, expected) in cases {
            let (_, mut decoder) = pair();
            assert_eq!(decoder.decode(1, 3000, &one).as_ref(), Ok(&first), "{name}");
            let error = decoder.decode(number, bytes, piece).unwrap_err().to_string();
            assert!(error.contains(expected), "{name}: {error}");
            let after = decoder.decode(2, 3000, &two);
            assert_eq!(after, Err(PieceError::Number { found: 2, before: 0 }), "{name}");
            assert_eq!(decoder.decode(1, 3000, &one).as_ref(), Ok(&first), "{name}");
            assert_eq!(decoder.decode(2, 3000, &two).as_ref(), Ok(&second), "{name}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// Any contents in any order, with frames begun again in between.
        #[test]
        fn any_profiles_are_read_back_equal(
            parts in prop::collection::vec((0..6_u64, 0..9000_usize, prop::bool::weighted(0.1)), 1..40),
        ) {
            let (mut encoder, mut decoder) = pair();
            for (seed, len, restart) in parts {
                if restart {
                    encoder.restart();
                }
                let raw = noise(seed, len);
                let (number, piece) = encoder.encode(&raw).unwrap();
                prop_assert_eq!(decoder.decode(number, len as u64, &piece), Ok(raw));
            }
        }

        /// Any bytes as a piece, of which the decoder writes no byte more than stated.
        #[test]
        fn any_bytes_end_in_a_result(bytes in 0..5000_u64, piece in prop::collection::vec(any::<u8>(), 0..300)) {
            let (mut encoder, mut decoder) = pair();
            let one = encoder.encode(&noise(5, 400)).unwrap().1;
            prop_assert!(decoder.decode(1, 400, &one).is_ok());
            if let Ok(raw) = decoder.decode(2, bytes, &piece) {
                prop_assert_eq!(raw.len() as u64, bytes);
            }
        }
    }
}
