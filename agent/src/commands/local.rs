//! Arguments of the verbs that run an engine without a configuration file: `record` and `top`.

use std::path::PathBuf;

use clap::Args;
use gannet_base::ByteSize;

use super::check::UnsafeKernel;
use crate::{config::CoreShare, governor::Budgets, tables::TableSources};

/// Settings of the engine: what it reads, may use, and runs on.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct LocalArgs {
    /// Directory of supplied unwind tables (*.unwind), for files whose own information is broken
    #[arg(long, value_name = "DIR")]
    override_dir: Option<PathBuf>,
    /// CPU budget of this program, including its BPF programs and its readers of debug information, as a share of one core:
    /// 0.05 or 5%. Over budget, it lowers the sampling rate [default: none]
    #[arg(long, value_name = "SHARE")]
    cpu_budget: Option<CoreShare>,
    /// Memory budget of this program and its readers of debug information. Over budget, it lowers the sampling rate
    /// [default: none]
    #[arg(long, value_name = "BYTES")]
    memory_budget: Option<ByteSize>,
    /// Run on a kernel that `check` refuses because it may lock up (5.19 to 6.3), for kernels that have the fix all the same
    #[arg(long)]
    allow_unsafe_kernel: bool,
}

impl LocalArgs {
    pub(super) fn budgets(&self) -> Budgets {
        Budgets {
            cpu: self.cpu_budget.map(CoreShare::get),
            memory_bytes: self.memory_budget.map(|size| size.0),
        }
    }

    pub(super) fn tables(&self) -> TableSources {
        TableSources::supplied_from(self.override_dir.as_deref())
    }

    pub(super) fn unsafe_kernel(&self) -> UnsafeKernel {
        UnsafeKernel::of(self.allow_unsafe_kernel)
    }
}
