//! The readers of PHP on any memory, for the fuzzer.

use super::{
    super::{
        Detected, Memory, Runtime as _, RuntimeFile,
        hostile::{Hostile, MAX_BYTES},
        memory::word,
    },
    Php, layout,
};
use crate::model::sum_words;

/// The address of the globals.
const AT: u64 = 0x1000;

/// Attaches to a process with this memory, and reads a function of it.
pub fn php(bytes: &[u8]) {
    let Some(([kind, object], bytes)) = bytes.split_first_chunk() else { return };
    if bytes.is_empty() {
        return;
    }
    let object = AT + u64::from(*object) * 8;
    let version = (8, [2, 4][usize::from(kind >> 1 & 1)]);
    let detected = Detected { version, version_text: String::new(), addresses: vec![AT], layout: 1 };
    let file = RuntimeFile { runtime: &Php, detected };
    let memory = || Hostile::new(bytes, (kind & 1 == 1).then_some(AT));
    let _ = Php.attach(&file, 0, &memory());
    let sum = layout::of(version).and_then(|layout| {
        let fixed = (&memory() as &dyn Memory).bytes(object, usize::from(layout.sum_words) * 8).ok()?;
        Some(sum_words((0..fixed.len()).step_by(8).map(|at| word(&fixed, at))))
    });
    let Ok(function) = Php.read_function(&file, 0, object, sum.unwrap_or(0), &memory()) else { return };
    assert!(!function.name.contains(char::is_control) && !function.file.contains(char::is_control));
    assert!(function.bytes() <= MAX_BYTES, "{} bytes", function.bytes());
    for position in [0, 1, 32, 0x700, u32::MAX, 1 << 31] {
        let _ = Php.line(&file, &function, position);
    }
}
