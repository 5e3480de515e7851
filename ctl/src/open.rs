//! `profiles open`: one profile on the page, which the collector's program serves on this machine.

use std::{
    ffi::OsStr,
    io::{Seek as _, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{args::Open, client::Collector, error::Error, render::Console};

/// The program with the page.
const PROGRAM: &str = "gannet-collector";
/// Name of a merged profile whose parts have different services.
const MERGED: &str = "merged";

/// Shows a pprof file. Returns only if it fails: else the program with the page takes the place of this one.
pub(crate) fn file(file: &Path, port: u16) -> Error {
    become_page(file.as_os_str(), None, port, Stdio::null())
}

/// Shows the selected profiles of a collector, merged into one. Returns only if it fails.
pub(crate) async fn selection(args: &Open, collector: &Collector, console: &mut Console<'_>) -> Error {
    let merged = async {
        let selection = args.select.selection();
        let (profile, _) = collector.merge(selection.clone(), &args.sample_type, console).await?;
        let mut labels = collector.shared_labels(selection).await?;
        let name = labels.remove(gannet_proto::labels::SERVICE_NAME).unwrap_or_else(|| MERGED.to_owned());
        // A file without a name: it ends with the program that reads it.
        let mut file = tempfile::tempfile()?;
        file.write_all(&profile)?;
        file.rewind()?;
        Ok::<_, Error>((name, file))
    };
    match merged.await {
        Ok((name, file)) => become_page(OsStr::new("-"), Some(&name), args.port, file.into()),
        Err(error) => error,
    }
}

fn become_page(profile: &OsStr, name: Option<&str>, port: u16, input: Stdio) -> Error {
    let mut command = Command::new(program());
    command.arg("open").stdin(input);
    if let Some(name) = name {
        command.arg(format!("--name={name}"));
    }
    if port != 0 {
        command.arg(format!("--port={port}"));
    }
    let error = command.arg("--").arg(profile).exec();
    Error::Failed(format!(
        "cannot start {PROGRAM}, which has the page: {error}; install it beside gannetctl or in PATH, or convert the profile for \
         another viewer: gannetctl profiles convert FILE --as speedscope"
    ))
}

/// Returns the program beside this one, else its name, for a search in PATH.
fn program() -> PathBuf {
    let beside = std::env::current_exe().ok().map(|path| path.with_file_name(PROGRAM));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| PROGRAM.into())
}
