//! The readers of bytes that other programs wrote, each as a function that takes any bytes. It may refuse them, but not panic,
//! loop, or contradict itself. `scripts/fuzz` runs them under a fuzzer; the tests here run the inputs that are kept.

#![allow(clippy::panic, clippy::expect_used, reason = "a panic is how a target reports a fault")]

mod elf;
mod messages;
mod names;
mod rules;
mod unwind;

/// A reader under test.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The name for `scripts/fuzz`, and the directory of its kept inputs.
    pub name: &'static str,
    /// Reads any bytes.
    pub run: fn(&[u8]),
}

/// The readers of all crates, in no order.
pub const TARGETS: &[Target] = &[
    Target { name: "elf", run: elf::file },
    Target { name: "go_table", run: elf::go_table },
    Target { name: "symbols", run: names::symbols },
    Target { name: "minidebuginfo", run: names::minidebuginfo },
    Target { name: "start_lines", run: names::start_lines },
    Target { name: "compressed_sections", run: names::compressed_sections },
    Target { name: "perf_map", run: gannet_agent::symbols::fuzz::perf_map },
    Target { name: "jitdump", run: gannet_agent::symbols::fuzz::jitdump },
    Target { name: "demangle", run: gannet_agent::symbols::fuzz::demangled },
    Target { name: "php", run: gannet_agent::runtimes::fuzz::php },
    Target { name: "python", run: gannet_agent::runtimes::fuzz::python },
    Target { name: "python_lines", run: gannet_agent::runtimes::fuzz::python_lines },
    Target { name: "ruby", run: gannet_agent::runtimes::fuzz::ruby },
    Target { name: "java_structs", run: gannet_agent::runtimes::fuzz::java_structs },
    Target { name: "java_code", run: gannet_agent::runtimes::fuzz::java_code },
    Target { name: "java_counters", run: gannet_agent::runtimes::fuzz::java_counters },
    Target { name: "java_lines", run: gannet_agent::runtimes::fuzz::java_lines },
    Target { name: "go_program", run: gannet_agent::runtimes::fuzz::go_program },
    Target { name: "v8_layout", run: gannet_agent::runtimes::fuzz::v8_layout },
    Target { name: "v8_code", run: gannet_agent::runtimes::fuzz::v8_code },
    Target { name: "v8_lines", run: gannet_agent::runtimes::fuzz::v8_lines },
    Target { name: "proc", run: gannet_agent::process::fuzz::proc_file },
    Target { name: "ring", run: gannet_agent::kernel::fuzz::event },
    Target { name: "pods_json", run: gannet_agent::pods::fuzz::json },
    Target { name: "pods_stream", run: gannet_agent::pods::fuzz::stream },
    Target { name: "rules", run: rules::file },
    Target { name: "selectors", run: rules::selectors },
    Target { name: "pprof", run: messages::pprof },
    Target { name: "pieces", run: messages::pieces },
    Target { name: "messages", run: messages::any },
    Target { name: "otlp", run: gannet_collector::fuzz::otlp },
    Target { name: "pushed", run: gannet_collector::fuzz::pushed },
    Target { name: "debug_file", run: gannet_collector::fuzz::debug_file },
    Target { name: "stored_object", run: gannet_collector::fuzz::stored_object },
    Target { name: "unwind_file", run: unwind::exercise },
    Target { name: "unwind_eh_frame", run: unwind::eh_frame },
    Target { name: "unwind_go", run: unwind::go },
    Target { name: "unwind_cache", run: unwind::cache },
];

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// Each kept input, whole, cut, and with one byte changed.
    #[test]
    fn kept_inputs_of_the_fuzzer_are_read() {
        for target in TARGETS {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
            let files: Vec<_> = fs::read_dir(&directory)
                .unwrap_or_else(|error| panic!("{} has no kept inputs: {error}", target.name))
                .map(|entry| entry.expect("an entry").path())
                .collect();
            assert!(!files.is_empty(), "{} has no kept inputs", target.name);
            for file in files {
                let mut bytes = fs::read(&file).expect("a kept input");
                assert!(bytes.len() <= 64 << 10, "{} is large", file.display());
                (target.run)(&bytes);
                let step = bytes.len() / 32 + 1;
                for at in (0..bytes.len()).step_by(step) {
                    (target.run)(&bytes[..at]);
                    bytes[at] ^= 0x80;
                    (target.run)(&bytes);
                    bytes[at] ^= 0x80;
                }
            }
        }
    }
}
