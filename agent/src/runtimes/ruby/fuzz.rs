//! The readers of Ruby on any memory, for the fuzzer.

use super::{
    super::{
        Detected, Memory, Runtime as _, RuntimeFile,
        hostile::{Hostile, MAX_BYTES},
    },
    BODY, Ruby, thread_state,
};
use crate::model::sum_words;

/// The address of the memory.
const AT: u64 = 0x1000;

/// Attaches to a process with this memory, and reads a function of it.
pub fn ruby(bytes: &[u8]) {
    let Some(([kind, object], bytes)) = bytes.split_first_chunk() else { return };
    if bytes.is_empty() {
        return;
    }
    let object = AT + u64::from(*object) * 8;
    let version = (3, [1, 3, 4][usize::from(kind >> 1) % 3]);
    let detected =
        Detected { version, version_text: String::new(), addresses: vec![AT, 0, AT, 0x80], layout: 1 };
    let file = RuntimeFile { runtime: &Ruby, detected };
    let memory = || Hostile::new(bytes, (kind & 1 == 1).then_some(AT));
    let _ = thread_state(bytes, AT);
    let _ = Ruby.attach(&file, 0, &memory());
    let body = (&memory() as &dyn Memory).u64(object + BODY as u64);
    let sum = body.map_or(0, |body| sum_words([body].into_iter()));
    let Ok(function) = Ruby.read_function(&file, 0, object, sum, &memory()) else { return };
    assert!(!function.name.contains(char::is_control) && !function.file.contains(char::is_control));
    assert!(function.bytes() <= MAX_BYTES, "{} bytes", function.bytes());
    for position in [0, 1, 8, 0x600, u32::MAX, 1 << 31] {
        let _ = Ruby.line(&file, &function, position);
    }
}
