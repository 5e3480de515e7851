//! Frames that interpreters keep in lists of their own, as samples carry them.

/// Tag in the top four bits of a word: the object of a function.
const FUNCTION: u64 = 8;
/// Tag of a word: a sum over that object, and the position in the function.
const POSITION: u64 = 9;
const TAG_SHIFT: u32 = 60;
/// The number of the object's bits, or of an index that replaces it.
const FUNCTION_MASK: u64 = (1 << TAG_SHIFT) - 1;
const SUM_SHIFT: u32 = 32;
/// The number of bits of the sum over an object.
pub(crate) const SUM_BITS: u32 = 28;

/// A word of a user stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StackWord {
    /// An address of code.
    Address(u64),
    /// The function of a list frame: first the address of its object, later a number of the process's functions.
    Function(u64),
    /// Follows a function: the sum over its object, and the position in the function.
    Position {
        /// By which another object at the same address differs.
        sum: u32,
        /// The low 32 bits of the position.
        position: u32,
    },
}

impl StackWord {
    /// Decodes a word. No address has one of the tags: user addresses have fewer than 60 bits.
    pub(crate) fn decode(word: u64) -> Self {
        match word >> TAG_SHIFT {
            FUNCTION => Self::Function(word & FUNCTION_MASK),
            POSITION => {
                Self::Position { sum: ((word & FUNCTION_MASK) >> SUM_SHIFT) as u32, position: word as u32 }
            }
            _ => Self::Address(word),
        }
    }

    /// Encodes a word.
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Address(address) => address,
            Self::Function(function) => FUNCTION << TAG_SHIFT | function & FUNCTION_MASK,
            Self::Position { sum, position } => {
                let sum = u64::from(sum) & ((1 << SUM_BITS) - 1);
                POSITION << TAG_SHIFT | sum << SUM_SHIFT | u64::from(position)
            }
        }
    }

    /// Reports whether a word of a stack is an address.
    pub(crate) fn is_address(word: u64) -> bool {
        matches!(Self::decode(word), Self::Address(_))
    }
}

/// The way to the frames of an interpreter in one process: `struct list_frames` of gannet.h without its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListLayout {
    /// Offset from the thread pointer of the word from which the steps begin.
    pub(crate) thread_offset: i64,
    /// Offsets of the words that lead from there to the newest frame.
    pub(crate) steps: &'static [i32],
    /// The step whose word is an address in the native frame of the newest run, counted from 1; 0 for none.
    pub(crate) native_step: u8,
    /// Words of a frame.
    pub(crate) words: u8,
    /// Number of the word that is the function.
    pub(crate) function: u8,
    /// Bits of that word that are its address.
    pub(crate) function_mask: u64,
    /// Number of the word that is the position.
    pub(crate) position: u8,
    /// Whether the position is an address, which counts from the function's object.
    pub(crate) position_is_address: bool,
    /// Number of the word that is the next frame.
    pub(crate) next: u8,
    /// How a run ends.
    pub(crate) end: ListEnd,
    /// Offset and number of the words of the function's object that the sum is over.
    pub(crate) sum: (u32, u8),
}

/// How a run of list frames ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ListEnd {
    /// Behind the frame in which this byte has this value.
    Last(u8, u8),
    /// At an entry in which this byte has this value. It is no frame, and lies in the native frame of the run.
    Native(u8, u8),
    /// Behind each frame.
    Each,
}

/// Sums up words of an object as the BPF programs do.
pub(crate) fn sum_words(words: impl Iterator<Item = u64>) -> u32 {
    let sum = words.fold(0_u64, |sum, word| {
        let sum = (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        sum ^ sum >> 32
    });
    sum as u32 & ((1 << SUM_BITS) - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn no_address_is_taken_for_a_list_frame() {
        for address in [0, 0x7fff_ffff_ffff, (1 << 56) - 1, 0xffff_ffff_ff60_0000, u64::MAX] {
            assert_eq!(StackWord::decode(address), StackWord::Address(address));
        }
    }

    proptest! {
        #[test]
        fn every_word_survives_decoding(word: u64) {
            prop_assert_eq!(StackWord::decode(word).encode(), word);
        }
    }
}
