//! Interpreters whose frames carry the names of their programs.
//!
//! A [`Runtime`] works in three steps, each testable on bytes without root: it detects its interpreter in a file, attaches to a
//! process (finds where the process keeps its frames), and names functions. The BPF programs know no language: attaching gives
//! them plain offsets ([`ListLayout`]). A new runtime is a module here and an entry of [`RUNTIMES`].
//!
//! Everything that is read belongs to the target and may be forged: reads are bounded in number and size, and where something
//! does not fit there is a reason instead of a name.

mod code;
mod cuts;
mod functions;
#[doc(hidden)]
pub mod fuzz;
mod go;
mod guard;
mod hostile;
mod hotspot;
mod instruction_lines;
mod listed;
mod memory;
mod php;
mod process;
mod python;
mod reader;
mod ruby;
mod texts;
mod unloads;
mod v8;

use std::{fs::File, ops::Range, sync::Arc};

use gannet_elf::Elf;
use gannet_unwind::limits::TableLimits;

use crate::model::{LabelLayout, ListLayout, printable};

use self::code::MAX_INLINED;
pub use self::functions::Interpreter;
#[cfg(test)]
pub(crate) use self::process::find;
pub(crate) use self::{
    code::{CodeNeeds, CodeWalk, GeneratedCode, NO_POSITION, WalkedCode},
    cuts::{CutLimit, count_without_process, cut_by_limits},
    functions::ListFunction,
    guard::{Guard, read_cpu_time},
    memory::{Memory, ProcessMemory},
    process::{RuntimeFinder, RuntimeSearch, cut_searches, inspect},
    reader::{BlockHead, Captured, CodeBlock, CodeFunction, CodeReader, FrameWords, NamedFrame, Scope},
    texts::text_bytes,
    unloads::{Replacements, Unloads},
};

/// The runtimes that the agent knows.
static RUNTIMES: [&dyn Runtime; 10] = [
    &python::Python,
    &hotspot::HotSpot,
    &php::Php,
    &ruby::Ruby,
    &go::Go,
    &v8::V8,
    &listed::DOTNET,
    &listed::ERLANG_VM,
    &listed::LUAJIT,
    &listed::PERL_5,
];
/// Those that may be in a library without an interpreter's loop, and make no code that has to wait for it.
static LISTED: [&listed::Listed; 4] = [&listed::DOTNET, &listed::ERLANG_VM, &listed::LUAJIT, &listed::PERL_5];

/// The loops of all interpreters: a frame of such a function stands for a run of list frames.
pub(crate) const LIST_FUNCTIONS: &[&str] = &[python::LOOP, php::LOOP];

/// Files that export one of these have a loop without a name: the function that the largest table of addresses leads into.
pub(crate) const LIST_TABLES: &[&str] = &[ruby::BESIDE];

/// Files of runtimes whose frames are in code that they make at run time. Such code cannot be unwound before the file is read.
const CODE_FILES: &[&str] = &[hotspot::FILE, v8::FILE];

/// Reports whether a file is such a one, by its path in the process.
pub(crate) fn makes_code(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    CODE_FILES.contains(&name.strip_suffix(" (deleted)").unwrap_or(name))
}

/// Reports whether a file without an interpreter's loop may still be a runtime's, by its path in the process. Programs of Go say so
/// in a section.
pub(crate) fn may_be_runtime(path: &str) -> bool {
    let is_library = path.rsplit('/').next().unwrap_or_default().contains(".so");
    !is_library || makes_code(path) || may_be_listed(path)
}

/// Reports whether a file may be a runtime whose functions have the names that the process lists, by its path in the process.
pub(crate) fn may_be_listed(path: &str) -> bool {
    LISTED.iter().any(|runtime| runtime.may_be(path))
}

/// Where a process keeps the frames of its programs.
#[derive(Debug)]
pub(crate) enum Attachment {
    /// In lists, which BPF reads.
    List(ListLayout),
    /// On the stack, in frames of code that it makes.
    Code(Arc<dyn CodeReader>),
    /// Its frames are native ones, and its tasks have labels, which BPF reads.
    Labels(LabelLayout),
    /// Its frames are native ones. Those in code that it makes have names if it lists them, in a perf map or a jitdump. If it does
    /// not, this is the reason why names are missing.
    Listed(WhyNot),
    /// Its frames are native ones.
    Plain,
}

/// An interpreter or virtual machine.
pub(crate) trait Runtime: Send + Sync + std::fmt::Debug {
    /// The name in labels: `python`.
    fn name(&self) -> &'static str;

    /// The name of the mapping of its frames in profiles: `[cpython]`.
    fn mapping(&self) -> &'static str;

    /// Reports whether its programs have frames of their own. One that has takes precedence over one that has not.
    fn has_frames(&self) -> bool {
        true
    }

    /// Finds the interpreter in a file, by its symbols.
    fn detect(&self, elf: &Elf<'_>, path: &str) -> Option<Detected>;

    /// Returns the addresses in the file whose frames are those of code that it makes, like code without a file.
    fn code(&self, detected: &Detected) -> Range<u64> {
        let _ = detected;
        0..0
    }

    /// Finds where a process keeps its frames.
    fn attach(&self, file: &RuntimeFile, bias: u64, memory: &dyn Memory) -> Result<Attachment, WhyNot>;

    /// Reads the texts of a function's object. `sum` is that of the samples. Only for runtimes with list frames: functions of made
    /// code are read with the code, and native ones are in the file's symbols.
    fn read_function(
        &self,
        file: &RuntimeFile,
        bias: u64,
        object: u64,
        sum: u32,
        memory: &dyn Memory,
    ) -> Result<FunctionText, WhyNot> {
        let _ = (file, bias, object, sum, memory);
        Err(WhyNot::Unreadable)
    }

    /// Returns what frames of this version lack, though those of its other releases have it.
    fn lack(&self, detected: &Detected) -> Option<&'static Lack> {
        let _ = detected;
        None
    }

    /// Returns the line of a position in a function; 0 if there is none.
    fn line(&self, file: &RuntimeFile, function: &FunctionText, position: u32) -> u32 {
        let _ = (file, function, position);
        0
    }
}

/// What the frames of some releases lack.
#[derive(Debug)]
pub(crate) struct Lack {
    /// Behind "whose functions": `have no lines`.
    pub(crate) what: &'static str,
    /// What the user can do.
    pub(crate) cure: &'static str,
}

/// Facts that a runtime has found in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Detected {
    /// Major and minor number of the version.
    pub(crate) version: (u8, u8),
    /// The version in labels: `3.11.2`, or `3.11` if the file does not say more.
    pub(crate) version_text: String,
    /// Addresses in the file; their meaning is the runtime's.
    pub(crate) addresses: Vec<u64>,
    /// The number of its [`ListLayout`], unique among all runtimes; 0 without one.
    pub(crate) layout: u8,
}

/// An interpreter in a file.
#[derive(Clone, Debug)]
pub(crate) struct RuntimeFile {
    /// The runtime that detected it.
    pub(crate) runtime: &'static dyn Runtime,
    /// The facts that the runtime found.
    pub(crate) detected: Detected,
}

impl RuntimeFile {
    /// Returns name and version, as rules and labels have them.
    pub(crate) fn names(&self) -> (&str, &str) {
        (self.runtime.name(), &self.detected.version_text)
    }
}

/// Returns major and minor number of a version such as `17.0.15`, 0 for what is no number.
fn numbers_of(version_text: &str) -> (u8, u8) {
    let mut numbers = version_text.split('.').map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Finds the interpreter in an open file; `path` is its path in the process. One that is no ELF file has none.
pub(crate) fn detect_in(file: &File, path: &str) -> Option<RuntimeFile> {
    detect(&Elf::parse(file, &TableLimits::default().elf()).ok()?, path)
}

/// Finds the interpreter in a file.
pub(crate) fn detect(elf: &Elf<'_>, path: &str) -> Option<RuntimeFile> {
    RUNTIMES
        .into_iter()
        .find_map(|runtime| runtime.detect(elf, path).map(|detected| RuntimeFile { runtime, detected }))
}

/// Name, source file and lines of a function, as its object has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct FunctionText {
    /// The name, qualified by classes and functions around it.
    pub(crate) name: String,
    /// The file of its source.
    pub(crate) file: String,
    /// The line where it begins.
    pub(crate) first_line: u32,
    /// The table of its lines; its form is the runtime's.
    pub(crate) lines: Vec<u8>,
}

impl FunctionText {
    /// Returns the bytes of memory that it takes.
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.name.len() + self.file.len() + self.lines.len()
    }
}

/// Why the frames of a process, or the name of a function, cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WhyNot {
    /// It has not begun yet, or is over.
    #[error("the interpreter has not started yet")]
    NotStarted,
    /// No layout is known for it.
    #[error("this version is not supported")]
    Version,
    /// A build that keeps its frames in another way.
    #[error("a build of this version without the global lock is not supported")]
    FreeThreaded,
    /// A build that keeps the frames of each thread apart.
    #[error("a thread-safe build is not supported")]
    ThreadSafe,
    /// No thread has its state where threads keep it.
    #[error("no thread-local state was found")]
    NoThreadState,
    /// Memory that cannot be read.
    #[error("its memory cannot be read")]
    Unreadable,
    /// Reading its memory takes too long.
    #[error("reading its memory takes too long")]
    Unanswered,
    /// Its code does not show where the labels are.
    #[error("the labels of its goroutines were not found in this build")]
    Labels,
    /// It can list the code that it makes, and does not.
    #[error("it does not list the code that it makes: {0}")]
    Unlisted(&'static str),
    /// It runs no code of its own that could be named.
    #[error("the agent shows the C functions of the interpreter alone")]
    OnlyNative,
    /// The texts of its functions take too much memory of the agent.
    #[error("the texts of its functions take too much memory")]
    TooLarge,
    /// The module has panicked.
    #[error("reading it failed, which is a fault of the agent")]
    Failed,
    /// The module takes too much CPU time.
    #[error("reading its memory takes too much CPU time")]
    TooCostly,
    /// The memory holds something else.
    #[error("its memory holds something else: {0}")]
    Implausible(&'static str),
}

impl WhyNot {
    /// Reports whether another attempt may succeed: threads begin and end while their states are read.
    pub(crate) fn may_pass(self) -> bool {
        match self {
            Self::NotStarted
            | Self::NoThreadState
            | Self::Unreadable
            | Self::Unanswered
            | Self::Unlisted(_) => true,
            Self::Version
            | Self::FreeThreaded
            | Self::ThreadSafe
            | Self::Labels
            | Self::OnlyNative
            | Self::TooLarge
            | Self::Failed
            | Self::TooCostly
            | Self::Implausible(_) => false,
        }
    }

    /// Reports whether the module of the runtime is switched off for the process.
    pub(crate) fn is_switched_off(self) -> bool {
        matches!(self, Self::Failed | Self::TooCostly)
    }

    /// Returns the kind of the reason, as a label of metrics.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::NotStarted => "not_started",
            Self::Version | Self::FreeThreaded | Self::ThreadSafe | Self::Labels => "unsupported",
            Self::NoThreadState => "no_thread_state",
            Self::Unreadable | Self::Unanswered => "unreadable",
            Self::Unlisted(_) => "unlisted",
            Self::OnlyNative => "only_native",
            Self::TooLarge => "too_large",
            Self::Failed => "failed",
            Self::TooCostly => "too_costly",
            Self::Implausible(_) => "implausible",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_can_match_each_runtime() {
        let mut names = RUNTIMES.map(Runtime::name);
        names.sort_unstable();
        assert_eq!(names, gannet_proto::rules::RUNTIMES);
    }
}
