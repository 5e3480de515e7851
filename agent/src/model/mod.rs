//! Types that several modules share: processes, images, mapped files, samples, and the clocks and CPUs of the host. Nothing
//! here imports from another module of the agent.

mod clock;
mod host;
mod image;
mod kernel_symbols;
mod key;
mod list_frames;
mod mapped_file;
mod maps_line;
mod sample;
mod service;
mod span;
mod task_labels;

pub use clock::boot_time;
pub(crate) use clock::{boot_time_ns, boot_time_of_ticks, monotonic_ns, ticks_of};
pub(crate) use host::ONLINE_CPUS;
pub(crate) use host::idle_ns;
pub use host::online_cpus;
pub use image::{Image, Mapping, MappingEvent, MappingKind, NewMapping};
pub use kernel_symbols::{
    KernelName, KernelNamer, KernelSymbolChange, KernelSymbolLog, KernelSymbolPosition, KernelSymbolRange,
};
pub use key::{ImageKey, ParseKeyError, ProcessKey};
pub use list_frames::{FunctionCopy, ListRun, RawLists};
pub(crate) use list_frames::{ListEnd, ListLayout, StackWord, TextLayout, sum_words};
pub(crate) use mapped_file::reopen;
pub use mapped_file::{FileId, MappedFile};
pub(crate) use maps_line::{MapsFile, MapsLine, open_mapped};
pub use sample::{
    ExitStatus, FileNumbers, Origin, RawUserStack, Sample, SampleKind, StackEnd, StackMarks, Subject,
};
pub use service::Service;
pub(crate) use service::ServiceSource;
pub(crate) use span::{RECORD_HEAD_BYTES, SpanKeys, ThreadContext, span_labels};
pub use task_labels::TaskLabels;
pub(crate) use task_labels::{LabelForm, LabelLayout, printable};
