//! The readers of CPython on any memory, for the fuzzer.

use super::{
    super::{
        Detected, FunctionText, Memory, Runtime as _, RuntimeFile,
        hostile::{Hostile, MAX_BYTES},
        memory::word,
    },
    CODE_BYTES, Python, layout,
};
use crate::model::sum_words;

/// The address of the interpreter's main structure.
const AT: u64 = 0x1000;

/// Attaches to a process with this memory, and reads a function of it.
pub fn python(bytes: &[u8]) {
    let Some(([kind, minor, object, code_type], bytes)) = bytes.split_first_chunk() else { return };
    if bytes.is_empty() {
        return;
    }
    let [object, code_type] = [object, code_type].map(|at| AT + u64::from(*at) * 8);
    let number = 6 + minor % 10;
    let detected = Detected {
        version: (3, number),
        version_text: String::new(),
        addresses: vec![AT, code_type],
        layout: layout::number(number, kind & 2 == 2),
    };
    let file = RuntimeFile { runtime: &Python, detected };
    let memory = || Hostile::new(bytes, (kind & 1 == 1).then_some(AT));
    let _ = Python.attach(&file, 0, &memory());
    let sum = layout::of(file.detected.layout).and_then(|layout| {
        let code: [u8; CODE_BYTES] = (&memory() as &dyn Memory).array(object).ok()?;
        let (fixed, words) = (layout.fixed.0 as usize, usize::from(layout.fixed.1));
        Some(sum_words((0..words).map(|index| word(&code, fixed + 8 * index))))
    });
    let Ok(function) = Python.read_function(&file, 0, object, sum.unwrap_or(0), &memory()) else { return };
    assert!(!function.name.contains(char::is_control) && !function.file.contains(char::is_control));
    assert!(function.bytes() <= MAX_BYTES, "{} bytes", function.bytes());
    for position in [0, 1, 7, 400, u32::MAX, i32::MAX as u32] {
        let _ = Python.line(&file, &function, position);
    }
}

/// Finds the lines of all instructions in a table of lines.
pub fn python_lines(bytes: &[u8]) {
    let Some(([minor, first @ ..], lines)) = bytes.split_first_chunk::<5>() else { return };
    let detected = Detected {
        version: (3, 8 + minor % 8),
        version_text: String::new(),
        addresses: Vec::new(),
        layout: 8 + minor % 8,
    };
    let file = RuntimeFile { runtime: &Python, detected };
    let function = FunctionText {
        first_line: u32::from_ne_bytes(*first),
        lines: lines.to_vec(),
        ..FunctionText::default()
    };
    for position in (0..512).chain([u32::MAX, i32::MAX as u32, 1 << 31]) {
        let _ = Python.line(&file, &function, position);
    }
}
