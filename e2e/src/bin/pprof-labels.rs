//! Lists the label values of the samples in pprof files. `make e2e` compares the labels of series with them.

use std::{collections::BTreeMap, fs, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use gannet_proto::pprof;
use serde_json::json;

/// Prints a line for each value of a label in each file: {"id", "value", "samples"}.
#[derive(Parser)]
struct Args {
    /// Key of the label
    label: String,
    /// The pprof files, compressed or not; the id is the file name without its ending
    files: Vec<PathBuf>,
}

const MAX_INFLATED: usize = 256 << 20;

fn main() -> ExitCode {
    let args = Args::parse();
    for file in &args.files {
        if let Err(error) = print(&args.label, file) {
            eprintln!("pprof-labels: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

#[expect(clippy::print_stdout, reason = "it is a command")]
fn print(label: &str, file: &PathBuf) -> anyhow::Result<()> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let profile = pprof::decode(&bytes, MAX_INFLATED).with_context(|| file.display().to_string())?;
    let text = |index: i64| {
        usize::try_from(index)
            .ok()
            .and_then(|index| profile.string_table.get(index))
            .map_or("", String::as_str)
    };
    let mut samples = BTreeMap::<&str, i64>::new();
    for sample in &profile.sample {
        let value =
            sample.label.iter().find(|have| text(have.key) == label).map_or("", |have| text(have.str));
        *samples.entry(value).or_default() += sample.value.first().copied().unwrap_or(0);
    }
    let id = file.file_name().unwrap_or_default().to_string_lossy();
    let id = id.split('.').next().unwrap_or_default();
    for (value, samples) in samples {
        println!("{}", json!({ "id": id, "value": value, "samples": samples }));
    }
    Ok(())
}
