//! Processes: the table of sampled ones with their images, and what `/proc` shows of them.

mod entry;
mod files;
#[doc(hidden)]
pub mod fuzz;
mod images;
mod metadata;
mod perf_maps;
mod proc;
mod start_labels;
mod survey;
mod table;
#[cfg(test)]
mod tests;

pub use self::{
    entry::{Process, ProcessState},
    files::{FileMapping, FileTable, FileTableStats},
    images::ImageChanges,
    metadata::{Metadata, MetadataError, MetadataOptions, MetadataStats, ProcessMetadataCache},
    proc::{ProcError, ProcFs, RealProc, check as check_identity},
    start_labels::{StartLabelError, StartLabelOptions, StartLabels},
    table::{ProcessStats, ProcessTable, ProcessTableFull},
};
pub(crate) use self::{
    images::on_worker,
    metadata::read_variables,
    perf_maps::{CodeList, perf_map_files},
    proc::is_dynamic_linker,
    survey::{SurveyedProcess, add_runtimes, cpu_usage, left_out_of_surveys, survey},
    table::all_on_worker,
};
