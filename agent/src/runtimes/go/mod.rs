//! Go. Its functions are native ones, so that only the labels of its goroutines (`pprof.Do`) are read here.
//!
//! Programs without debug information do not say where a thread has its goroutine, and that where its labels. Both differ by
//! version and by how a program is linked. But every program has the table of its functions, and a few functions whose code holds
//! these numbers. They are decoded from there, so that no table of versions can be wrong.

mod build_info;
mod code;
pub(super) mod fuzz;

use gannet_elf::{Elf, GoTable};

use self::{
    build_info::BuildInfo,
    code::{TaskOffsets, labels_offset, task_offsets},
};
use super::{Attachment, Detected, Memory, Runtime, RuntimeFile, WhyNot};
use crate::model::{LabelForm, LabelLayout};

const BUILD_INFO: &[u8] = b".go.buildinfo";
const MAX_BUILD_INFO: u64 = 1 << 20;
/// The largest Go programs have some 300,000 functions in 60 MB.
const MAX_TABLE_BYTES: u64 = 128 << 20;
const MAX_FUNCTIONS: u64 = 1 << 20;
/// Leads from the thread to its goroutine.
const SWITCH: [&[u8]; 2] = [b"runtime.systemstack", b"runtime.systemstack.abi0"];
/// Sets the labels of a goroutine. A program without it has none.
const SET_LABELS: &[u8] = b"runtime/pprof.runtime_setProfLabel";
const MAX_NAME: usize = 64;
/// Bytes of code that are read of a function. Neither has more in any version so far.
const CODE_BYTES: u64 = 192;
/// Versions before keep labels in a hash table. The first ones whose build information is read differ in nothing.
const FIRST_WITH_ARRAY: (u8, u8) = (1, 24);

/// The numbers in [`Detected::addresses`]. Without labels there are none; one number says that the others were not found.
const NOT_FOUND: [u64; 1] = [0];

/// The runtime of Go, from 1.18 on.
#[derive(Debug)]
pub(super) struct Go;

impl Runtime for Go {
    fn name(&self) -> &'static str {
        "go"
    }

    fn mapping(&self) -> &'static str {
        "[go]"
    }

    fn has_frames(&self) -> bool {
        false
    }

    fn detect(&self, elf: &Elf<'_>, _: &str) -> Option<Detected> {
        let section = elf.stored_section(BUILD_INFO)?;
        let info = BuildInfo::parse(&elf.section_data_within(section, MAX_BUILD_INFO).ok()?)?;
        // A library is a guest in another program's threads.
        if info.is_library {
            return None;
        }
        let addresses = match elf.go_table(MAX_TABLE_BYTES) {
            Ok(Some(Ok(table))) => label_numbers(elf, &table),
            _ => NOT_FOUND.to_vec(),
        };
        Some(Detected { version: info.version, version_text: info.version_text, addresses, layout: 0 })
    }

    fn attach(&self, file: &RuntimeFile, _: u64, _: &dyn Memory) -> Result<Attachment, WhyNot> {
        let Detected { version, addresses, .. } = &file.detected;
        if addresses.is_empty() {
            return Ok(Attachment::Plain);
        }
        let [thread_offset, owner, current, labels] = addresses[..] else { return Err(WhyNot::Labels) };
        let form = if *version < FIRST_WITH_ARRAY { LabelForm::Buckets } else { LabelForm::Array };
        Ok(Attachment::Labels(LabelLayout {
            thread_offset: thread_offset.cast_signed(),
            owner: owner as i32,
            current: current as i32,
            labels: labels as i32,
            form,
        }))
    }
}

/// Finds the numbers of a [`LabelLayout`].
fn label_numbers(elf: &Elf<'_>, table: &GoTable<'_>) -> Vec<u64> {
    let (mut switch, mut set) = (None, None);
    let functions = table.functions(elf.segments()).take_while(Result::is_ok).flatten().flatten();
    for function in functions.take(MAX_FUNCTIONS as usize) {
        let Some(record) = table.record(&function) else { continue };
        let name = table.name(&record, MAX_NAME);
        if SWITCH.contains(&name) {
            switch = Some(function);
        } else if name == SET_LABELS {
            set = Some(function);
        }
        if switch.is_some() && set.is_some() {
            break;
        }
    }
    let Some(set) = set else { return Vec::new() };
    let code = |function: gannet_elf::GoFunction| {
        elf.bytes_at(function.start, CODE_BYTES.min(function.end - function.start))
    };
    let found = || {
        let TaskOffsets { thread, owner, current } = task_offsets(&code(switch?)?)?;
        Some(vec![
            i64::from(thread).cast_unsigned(),
            owner.into(),
            current.into(),
            labels_offset(&code(set)?)?.into(),
        ])
    };
    let is_known = cfg!(target_arch = "x86_64");
    found().filter(|_| is_known).unwrap_or_else(|| NOT_FOUND.to_vec())
}
