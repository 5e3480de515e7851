//! The layouts against running interpreters: the walk of the BPF programs, done from here on a stopped process, must find the
//! stack that the process printed.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
};

use super::{
    super::{Memory, ProcessMemory, RuntimeFile, memory::word, process::find},
    layout,
};
use crate::model::{ListEnd, ListLayout, sum_words};

/// Prints its stack, `FUNCTION LINE;...` leaf first, and spins.
const PROGRAM: &str = "
import sys, time
def leaf(n):
    frame, frames = sys._getframe(), []
    while frame:
        name = getattr(frame.f_code, 'co_qualname', frame.f_code.co_name)
        frames.append(f'{name} {frame.f_lineno}')
        frame = frame.f_back
    print(';'.join(frames), flush=True)
    while True: pass
class Service:
    def handle(self, depth):
        if depth: return self.handle(depth - 1)
        return sorted([1],
            key=leaf)
def numbers():
    yield Service().handle(30)
def \u{e4}\u{4e2d}():
    return [number for number in numbers()]
\u{e4}\u{4e2d}()
";

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Finds the interpreter's file in a process, and its bias.
fn interpreter(pid: u32) -> (Arc<RuntimeFile>, u64) {
    let (file, bias) = find(pid).unwrap().unwrap();
    (Arc::new(file), bias)
}

/// Takes the list frames of a thread as `unwind.h` does: function, sum and position, `None` for the end of a run.
fn walk(memory: &dyn Memory, thread: u64, layout: &ListLayout) -> Vec<Option<(u64, u32, u32)>> {
    let mut at = memory.u64(thread.wrapping_add_signed(layout.thread_offset)).unwrap();
    for step in layout.steps.as_slice() {
        at = memory.u64(at.wrapping_add_signed((*step).into())).unwrap();
    }
    let mut frames = Vec::new();
    while at != 0 && frames.len() < 200 {
        let bytes = memory.bytes(at, usize::from(layout.words) * 8).unwrap();
        let part = |number: u8| word(&bytes, usize::from(number) * 8);
        let is_end = match layout.end {
            ListEnd::Last(byte, value) | ListEnd::Native(byte, value) => bytes[usize::from(byte)] == value,
            ListEnd::LastBit(byte, bit) => bytes[usize::from(byte)] & bit != 0,
            ListEnd::Each => true,
        };
        if !(is_end && matches!(layout.end, ListEnd::Native(..))) {
            let function = part(layout.function) & layout.function_mask;
            let base = if layout.position_is_address { function } else { 0 };
            let position = part(layout.position).wrapping_sub(base) as u32;
            let (offset, words) = (u64::from(layout.sum.0), usize::from(layout.sum.1));
            let object = memory.bytes(function + offset, words * 8).unwrap();
            let sum = sum_words((0..words).map(|index| word(&object, index * 8)));
            frames.push(Some((function, sum, position)));
        }
        if is_end {
            frames.push(None);
        }
        at = part(layout.next);
    }
    frames
}

fn check(python: &str, version: (u8, u8)) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.py");
    std::fs::write(&path, PROGRAM).unwrap();
    let child =
        Command::new(python).arg(&path).env_remove("PYTHONPATH").stdout(Stdio::piped()).spawn().unwrap();
    let mut running = Running(child);
    let mut printed = String::new();
    BufReader::new(running.0.stdout.take().unwrap()).read_line(&mut printed).unwrap();
    let pid = running.0.id();
    std::thread::sleep(std::time::Duration::from_millis(50));
    // SAFETY: takes numbers alone.
    unsafe { libc::kill(pid.cast_signed(), libc::SIGSTOP) };

    let (file, bias) = interpreter(pid);
    assert_eq!(file.detected.version, version);
    let memory: &dyn Memory = &ProcessMemory { tgid: pid };
    let attached = file.runtime.attach(&file, bias, memory).unwrap();
    let crate::runtimes::Attachment::List(layout) = attached else { panic!("{attached:?}") };
    let own = layout::of(file.detected.layout).unwrap();
    let interpreter = memory.u64(file.detected.addresses[0] + bias + own.interpreter).unwrap();
    let state = memory.u64(interpreter + own.threads).unwrap();
    let thread = memory.u64(state + own.thread_id).unwrap();
    let frames = walk(memory, thread, &layout);
    let named: Vec<String> = frames
        .iter()
        .flatten()
        .map(|(function, sum, position)| {
            let text = file.runtime.read_function(&file, bias, *function, *sum, memory).unwrap();
            assert_eq!(Path::new(&text.file), path, "{text:?}");
            format!("{} {}", text.name, file.runtime.line(&file, &text, *position))
        })
        .collect();
    let mut expected: Vec<String> = printed.trim().split(';').map(str::to_owned).collect();
    // It printed while it was at the third line of the loop, and spins below.
    expected[0] = "leaf 10".to_owned();
    assert_eq!(named, expected, "{python}");
    let runs = frames.iter().filter(|frame| frame.is_none()).count();
    // C code calls `leaf`, and the generator at its first step; up to 3.10 it calls everything.
    let wanted = if version.1 <= 10 { named.len() } else { 3 };
    assert_eq!(runs, wanted, "{python}: {frames:?}");
}

#[test]
fn a_running_python_of_this_system_has_the_printed_stack() {
    // A link to the version that the distribution has: `python3.11` on Debian 12.
    let path = std::fs::canonicalize("/usr/bin/python3").unwrap();
    let path = path.to_str().unwrap();
    let minor = path.rsplit('.').next().unwrap().parse().unwrap();
    check(path, (3, minor));
}
