//! Frames that interpreters keep in lists of their own, as samples carry them.

/// Tag in the top four bits of a word: the object of a function.
const FUNCTION: u64 = 8;
/// Tag of a word: a sum over that object, and the position in the function.
const POSITION: u64 = 9;
/// Tag of a word behind a raw stack: a run ends.
const RUN_END: u64 = 10;
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

/// The list frames of a thread whose stack was taken raw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RawLists {
    /// An address within the native frame of the newest run; 0 if it is not known.
    pub newest_native: u64,
    /// The runs, newest first.
    pub runs: Vec<ListRun>,
}

/// The list frames that one native frame stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListRun {
    /// Two words for each frame, newest first.
    pub words: Vec<u64>,
    /// An address within the native frame; 0 if it is not known.
    pub native: u64,
}

impl RawLists {
    /// Reads the words behind a raw stack; `None` if there are none.
    pub(crate) fn of_words(words: &[u64]) -> Option<Self> {
        let (newest_native, words) = words.split_first()?;
        let mut runs = vec![ListRun::default()];
        for word in words {
            if word >> TAG_SHIFT == RUN_END {
                if let Some(run) = runs.last_mut() {
                    run.native = word & FUNCTION_MASK;
                }
                runs.push(ListRun::default());
            } else if let Some(run) = runs.last_mut() {
                run.words.push(*word);
            }
        }
        // Behind the last end stands nothing, unless the list could not be read to its end.
        runs.pop_if(|run| run.words.is_empty());
        Some(Self { newest_native: *newest_native, runs })
    }

    /// Takes the next run, if it is that of a native frame from stack pointer `low` up to its address `high`.
    pub(crate) fn take_run(&mut self, low: u64, high: u64) -> Option<ListRun> {
        let holds = |address: u64| address == 0 || (low..high).contains(&address);
        if !holds(self.newest_native) || !holds(self.runs.first()?.native) {
            return None;
        }
        self.newest_native = 0;
        Some(self.runs.remove(0))
    }
}

/// Copies of the memory that holds the texts of a function, made while its process ran.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FunctionCopy {
    /// Address of the function's object.
    pub object: u64,
    /// The sum over it.
    pub sum: u32,
    /// Addresses and what was there: the object and its texts.
    pub pieces: Vec<(u64, Vec<u8>)>,
}

/// The way to the frames of an interpreter in one process: `struct list_frames` of gannet.h without its image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListLayout {
    /// Offset from the thread pointer of the word from which the steps begin.
    pub(crate) thread_offset: i64,
    /// Whether that is an address instead: all threads have one list.
    pub(crate) is_absolute: bool,
    /// Offsets of the words that lead from there to the newest frame.
    pub(crate) steps: Steps,
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
    /// Instead of that, the bytes from one frame to the next; 0 if frames are linked.
    pub(crate) stride: u8,
    /// Number of the word that leads to the last of three words, which count as words 13 to 15 of the frame; 0 if there are none.
    /// If a frame has no function, word 13 is the function. If it has a function but no position, it has no name.
    pub(crate) variables: u8,
    /// A byte that has this value in the entry that ends the list and is no frame; its number and the value, 0 for none.
    pub(crate) oldest: (u8, u8),
    /// How a run ends.
    pub(crate) end: ListEnd,
    /// The first byte of the sum in functions of C code, whose frames end no run; 0 if no frames are of such.
    pub(crate) native_function: u8,
    /// The registers, by DWARF number, in which the loop has its newest frame and the position there, which is newer than the one
    /// in the frame; 0 for none.
    pub(crate) registers: (u8, u8),
    /// Offset and number of the words of the function's object that the sum is over.
    pub(crate) sum: (u32, u8),
    /// The number of this layout among those of all runtimes, from 1 on.
    pub(crate) number: u8,
    /// The step whose word leads to an object that holds the thread pointer, counted from 1, or 0 if the first word does; and the
    /// offset in that object, 0 for none. Other processes of the same executable are checked by it.
    pub(crate) self_at: (u8, i32),
    /// The way to the texts of functions.
    pub(crate) texts: TextLayout,
}

/// Offsets of words, each of which leads to the next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Steps {
    offsets: [i32; Self::MAX],
    count: usize,
}

impl Steps {
    /// The most that the BPF programs take.
    pub(crate) const MAX: usize = 4;

    /// Returns the offsets.
    pub(crate) fn as_slice(&self) -> &[i32] {
        &self.offsets[..self.count]
    }
}

impl From<&[i32]> for Steps {
    /// Takes the first offsets, at most [`Self::MAX`].
    fn from(offsets: &[i32]) -> Self {
        let count = offsets.len().min(Self::MAX);
        let mut steps = Self { count, ..Self::default() };
        steps.offsets[..count].copy_from_slice(&offsets[..count]);
        steps
    }
}

/// The way from the object of a function to its texts, which the BPF programs copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TextLayout {
    /// Bytes of the object that the texts need; 0 if there are no texts to copy.
    pub(crate) object_bytes: u8,
    /// Name, file and line table: number of the word of the object that leads there, bytes in front of the text, and the number
    /// of bits by which the length is shifted to get bytes.
    pub(crate) texts: [(u8, u8, u8); 3],
    /// Number of the word of a text that is its length.
    pub(crate) length: u8,
}

/// How a run of list frames ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ListEnd {
    /// Behind the frame in which this byte has this value.
    Last(u8, u8),
    /// Behind the frame in which this byte has this bit.
    LastBit(u8, u8),
    /// At an entry in which this byte has this value. It is no frame, and lies in the native frame of the run.
    Native(u8, u8),
    /// Behind each frame.
    #[default]
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

    #[test]
    fn a_run_belongs_to_the_native_frame_that_holds_its_address() {
        let function = StackWord::Function(7).encode();
        let position = StackWord::Position { sum: 1, position: 2 }.encode();
        let end = |native: u64| RUN_END << TAG_SHIFT | native;
        let words =
            [0x110, function, position, end(0x118), function, position, end(0x218), function, position];
        let mut lists = RawLists::of_words(&words).unwrap();
        assert_eq!(lists.runs.len(), 3);
        assert_eq!(lists.take_run(0x80, 0x100), None, "the newest run is that of a caller");
        assert_eq!(lists.take_run(0x100, 0x118), None, "the end is in another frame");
        assert_eq!(lists.take_run(0x100, 0x120).unwrap().words, [function, position]);
        assert_eq!(lists.take_run(0x120, 0x200), None);
        assert_eq!(lists.take_run(0x200, 0x220).unwrap().native, 0x218);
        // The list could not be read further.
        assert_eq!(lists.take_run(0x300, 0x320).unwrap().native, 0);
        assert_eq!(lists.take_run(0x400, 0x420), None);
        assert_eq!(RawLists::of_words(&[]), None);
    }

    proptest! {
        #[test]
        fn every_word_survives_decoding(word: u64) {
            prop_assert_eq!(StackWord::decode(word).encode(), word);
        }
    }
}
