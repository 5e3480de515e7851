//! Checks the contents of a pprof file. `make demo` and `make kernels` call it.

use std::{collections::HashMap, fs, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use gannet_proto::{pprof, profiles::Profile};

/// Checks that a profile is valid and has the expected functions and CPU time.
#[derive(Parser)]
struct Args {
    /// The pprof file, compressed or not
    file: PathBuf,
    /// A function that must be in a stack
    #[arg(long, value_name = "FUNCTION")]
    has: Vec<String>,
    /// The sum of cpu/nanoseconds must be this
    #[arg(long, value_name = "NANOSECONDS", requires = "within")]
    cpu: Option<u64>,
    /// Percent by which that sum may differ
    #[arg(long, value_name = "PERCENT")]
    within: Option<f64>,
    /// Count only samples of this process
    #[arg(long, value_name = "N")]
    pid: Option<i64>,
    /// Frames that the deepest stack must have
    #[arg(long, value_name = "FRAMES", default_value_t = 1)]
    depth: usize,
}

const MAX_INFLATED: usize = 256 << 20;

fn main() -> ExitCode {
    match check(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pprof-check: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "it is a command")]
fn check(args: &Args) -> anyhow::Result<()> {
    let file = args.file.display();
    let bytes = fs::read(&args.file).with_context(|| format!("cannot read {file}"))?;
    let mut profile = pprof::decode(&bytes, MAX_INFLATED).with_context(|| file.to_string())?;
    if let Some(pid) = args.pid {
        let mut samples = std::mem::take(&mut profile.sample);
        samples.retain(|sample| {
            sample.label.iter().any(|label| label.num == pid && text(&profile, label.key) == "pid")
        });
        profile.sample = samples;
    }
    let summary = pprof::check(&profile).with_context(|| file.to_string())?;

    let missing: Vec<&str> =
        args.has.iter().map(String::as_str).filter(|name| !has_function(&profile, name)).collect();
    if !missing.is_empty() {
        bail!(
            "{file} lacks the functions {}; its {} samples are of {}",
            missing.join(", "),
            summary.samples,
            some_functions(&profile)
        );
    }

    let deepest = profile.sample.iter().map(|sample| sample.location_id.len()).max().unwrap_or(0);
    ensure!(deepest >= args.depth, "the deepest stack of {file} has {deepest} frames, not {}", args.depth);

    let total = |name: &str| {
        let index = summary.sample_types.iter().position(|have| have == name)?;
        Some(summary.totals[index])
    };
    let cpu = total("cpu/nanoseconds").with_context(|| format!("{file} has no cpu/nanoseconds"))? as f64;
    if let (Some(expected), Some(within)) = (args.cpu, args.within) {
        let off = 100.0 * (cpu / expected as f64 - 1.0);
        let text = format!(
            "{:.3} s of CPU time in the profile, {:.3} s by the kernel's account: {off:+.1} %",
            cpu / 1e9,
            expected as f64 / 1e9
        );
        ensure!(off.abs() <= within, "{text}, more than {within} % apart");
        println!("{text}");
    }
    println!(
        "{file}: {} samples in {} stacks up to {deepest} frames deep, {:.3} s of CPU time, {} of {} functions asked for",
        total("samples/count").unwrap_or(0),
        summary.samples,
        cpu / 1e9,
        args.has.len(),
        args.has.len(),
    );
    Ok(())
}

fn text(profile: &Profile, index: i64) -> &str {
    usize::try_from(index).ok().and_then(|index| profile.string_table.get(index)).map_or("", String::as_str)
}

/// Whether a function is in a stack, not only in the table.
fn has_function(profile: &Profile, name: &str) -> bool {
    let functions: HashMap<u64, i64> = profile.function.iter().map(|f| (f.id, f.name)).collect();
    let named: Vec<u64> = profile
        .location
        .iter()
        .filter(|location| {
            location.line.iter().any(|line| {
                functions.get(&line.function_id).is_some_and(|function| text(profile, *function) == name)
            })
        })
        .map(|location| location.id)
        .collect();
    profile.sample.iter().any(|sample| sample.location_id.iter().any(|id| named.contains(id)))
}

fn some_functions(profile: &Profile) -> String {
    let names: Vec<&str> = profile.function.iter().map(|f| text(profile, f.name)).take(12).collect();
    if names.is_empty() { "no named function".to_owned() } else { format!("{}, ...", names.join(", ")) }
}
