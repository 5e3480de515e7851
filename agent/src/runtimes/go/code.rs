//! Offsets that are in the code of Go's own functions (x86_64).

/// Offsets beyond are none of Go's.
const MAX_OFFSET: u32 = 4096;

/// The way from a thread to the goroutine that it runs, which the code calls g, its thread m, and of that curg.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TaskOffsets {
    /// From the thread pointer: the g on whose stack the thread runs.
    pub(super) thread: i32,
    /// In a g: its m.
    pub(super) owner: u32,
    /// In an m: the g of the program.
    pub(super) current: u32,
}

/// Decodes `runtime.systemstack`, which compares the g of the thread with those that its m names:
///
/// ```text
/// mov %fs:THREAD,%rax          or  mov $THREAD,%rcx; mov %fs:(%rcx),%rax
/// mov OWNER(%rax),%rbx
/// cmp SIGNAL(%rbx),%rax; je …
/// mov (%rbx),%rdx; cmp %rdx,%rax; je …
/// cmp CURRENT(%rbx),%rax
/// ```
pub(super) fn task_offsets(code: &[u8]) -> Option<TaskOffsets> {
    let (thread, mut rest) = (0..code.len()).find_map(|at| thread_offset(&code[at..]))?;
    let owner = take_short(&mut rest, &[0x48, 0x8b, 0x58])?;
    take_short(&mut rest, &[0x48, 0x3b, 0x43])?;
    take_short(&mut rest, &[0x74])?;
    rest = rest.strip_prefix(&[0x48, 0x8b, 0x13, 0x48, 0x39, 0xd0])?;
    take_short(&mut rest, &[0x74])?;
    let current = match rest.strip_prefix(&[0x48, 0x3b, 0x83]) {
        Some(rest) => u32::from_le_bytes(*rest.first_chunk()?),
        None => take_short(&mut rest, &[0x48, 0x3b, 0x43])?,
    };
    let is_good = |offset: u32| offset > 0 && offset < MAX_OFFSET && offset.is_multiple_of(8);
    (thread % 8 == 0 && is_good(owner) && is_good(current)).then_some(TaskOffsets { thread, owner, current })
}

/// Decodes the instructions that read the g of a thread, and returns what follows.
fn thread_offset(code: &[u8]) -> Option<(i32, &[u8])> {
    let (offset, rest) = if let Some(rest) = code.strip_prefix(&[0x64, 0x48, 0x8b, 0x04, 0x25]) {
        rest.split_first_chunk()?
    } else {
        let (offset, rest) = code.strip_prefix(&[0x48, 0xc7, 0xc1])?.split_first_chunk()?;
        (offset, rest.strip_prefix(&[0x64, 0x48, 0x8b, 0x01])?)
    };
    Some((i32::from_le_bytes(*offset), rest))
}

/// Takes an instruction that ends with a positive offset of one byte.
fn take_short(code: &mut &[u8], instruction: &[u8]) -> Option<u32> {
    let (offset, rest) = code.strip_prefix(instruction)?.split_first()?;
    *code = rest;
    (*offset < 0x80).then_some((*offset).into())
}

/// Finds the offset at which `runtime_setProfLabel` stores its argument, `mov %rax,LABELS(REGISTER)`. Two offsets are none.
pub(super) fn labels_offset(code: &[u8]) -> Option<u32> {
    let mut found = code.windows(7).filter_map(|window| {
        let [0x48 | 0x49, 0x89, registers, offset @ ..] = window else { return None };
        // Long offset, from rax; 4 would mean a second register.
        if registers & 0xf8 != 0x80 || registers & 7 == 4 {
            return None;
        }
        let offset = u32::from_le_bytes(offset.try_into().ok()?);
        (offset > 0 && offset < MAX_OFFSET && offset.is_multiple_of(8)).then_some(offset)
    });
    let offset = found.next()?;
    found.all(|other| other == offset).then_some(offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of Go 1.24: the start of the function in a program at a fixed address, and in one that moves, with cgo.
    const FIXED: &str =
        "554889e5488b7c24106448 8b0425f8ffffff488b5830483b43507465488b134839d0745d483b83c0000000755d";
    const MOVED: &str =
        "554889e5488b7c241048c7c1d0ffffff64488b01488b5830483b4350745d488b134839d07455483b83c00000007555";
    /// Of Go 1.24.
    const SET: &str = "493b6610763e554889e54883ec084c893424833d00000000007418e800000000498903498b8e60010000\
                       49894b08488b0c24488981600100004883c4085dc34889442408e800000000488b442408ebab";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    #[test]
    fn offsets_are_read_from_code() {
        let of = |thread| Some(TaskOffsets { thread, owner: 0x30, current: 0xc0 });
        assert_eq!((task_offsets(&bytes(FIXED)), task_offsets(&bytes(MOVED))), (of(-8), of(-48)));
        assert_eq!(labels_offset(&bytes(SET)), Some(0x160));
    }

    #[test]
    fn other_code_gives_no_offsets() {
        for code in [FIXED, MOVED] {
            let whole = bytes(code);
            // The last instruction is a jump.
            for length in 0..whole.len() - 2 {
                assert_eq!(task_offsets(&whole[..length]), None, "{length}");
            }
        }
        assert_eq!(task_offsets(&bytes(&FIXED.replace("483b43", "483b53"))), None);
        assert_eq!(task_offsets(&bytes(&FIXED.replace("83c0000000", "83c1000000"))), None, "not aligned");
        assert_eq!(labels_offset(&bytes(&format!("{SET}4889816801 0000"))), None, "two offsets");
        assert_eq!(labels_offset(&bytes(FIXED)), None);
    }
}
