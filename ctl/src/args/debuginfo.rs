//! Arguments of the command `debuginfo`.

use std::path::PathBuf;

use clap::Subcommand;

/// Commands of `gannetctl debuginfo`.
#[derive(Debug, Subcommand)]
pub(crate) enum DebugInfo {
    /// Upload programs, libraries or their debug files, which also name the functions of stored profiles
    #[command(
        after_help = "A file must have a GNU build id, which `readelf -n FILE` shows, and a symbol table or debug information. \
        Of a file that the collector has, nothing is sent.\n\n\
        Examples:\n  \
        gannetctl debuginfo upload target/release/checkout\n  \
        objcopy --only-keep-debug checkout checkout.debug && gannetctl debuginfo upload checkout.debug"
    )]
    Upload {
        /// Files to upload
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// List the stored files by build id
    List,
    /// Remove the files of these build ids, and with them their names in profiles
    Delete {
        /// GNU build ids in hex, as `debuginfo list` shows them
        #[arg(required = true, value_name = "BUILD_ID")]
        build_ids: Vec<String>,
    },
}
