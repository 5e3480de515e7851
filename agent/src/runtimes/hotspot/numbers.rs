//! Integers in compressed streams of the virtual machine: one to five bytes each, six bits of the value in all but the first.

/// From this byte on, another one follows.
const FIRST_LONG: u32 = 192;
const MAX_BYTES: u32 = 5;
const BITS: u32 = 6;

/// Reads integers from bytes.
pub(super) struct Numbers<'b> {
    bytes: std::slice::Iter<'b, u8>,
    /// Since version 20 no byte of an integer is 0.
    least: u32,
}

impl<'b> Numbers<'b> {
    pub(super) fn new(bytes: &'b [u8], without_zero: bool) -> Self {
        Self { bytes: bytes.iter(), least: without_zero.into() }
    }

    /// Reads a plain byte.
    pub(super) fn byte(&mut self) -> Option<u8> {
        self.bytes.next().copied()
    }

    /// Reads an integer.
    pub(super) fn unsigned(&mut self) -> Option<u32> {
        let mut sum = 0_u32;
        for number in 0..MAX_BYTES {
            let byte = u32::from(self.byte()?);
            sum = sum.wrapping_add(byte.checked_sub(self.least)? << (BITS * number));
            if byte < FIRST_LONG {
                break;
            }
        }
        Some(sum)
    }

    /// Reads an integer whose lowest bit is its sign.
    pub(super) fn signed(&mut self) -> Option<i32> {
        let value = self.unsigned()?;
        Some((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_have_one_to_five_bytes() {
        let read = |bytes: &[u8], without_zero| Numbers::new(bytes, without_zero).unsigned();
        assert_eq!(read(&[0], false), Some(0));
        assert_eq!(read(&[191], false), Some(191));
        assert_eq!(read(&[192, 0], false), Some(192));
        assert_eq!(read(&[200, 3], false), Some(200 + 3 * 64));
        assert_eq!(read(&[255; 5], false).map(|_| ()), Some(()));
        assert_eq!(read(&[1], true), Some(0));
        assert_eq!(read(&[191], true), Some(190));
        assert_eq!(read(&[192, 1], true), Some(191));
        assert_eq!(read(&[0], true), None);
        assert_eq!(read(&[192], false), None);
        assert_eq!(Numbers::new(&[5], false).signed(), Some(-3));
        assert_eq!(Numbers::new(&[6], false).signed(), Some(3));
    }
}
