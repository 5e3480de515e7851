//! Checks profiles against the rules of OTLP. `make e2e` calls it with all profiles of its test, and with what an OpenTelemetry Collector
//! wrote of them.

use std::{collections::BTreeMap, fs, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, ensure};
use clap::Parser;
use gannet_otlp::{Encoder, Outgoing, from_json, rules::breaches};
use gannet_proto::pprof;

/// Checks that profiles keep the rules of OTLP.
#[derive(Parser)]
struct Args {
    /// pprof files, which become requests as the collector forwards them, or files with a request in OTLP JSON on each line
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

const MAX_INFLATED: usize = 256 << 20;

fn main() -> ExitCode {
    match check(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("otlp-check: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "it is a command")]
fn check(args: &Args) -> anyhow::Result<()> {
    let (mut requests, mut profiles, mut samples) = (0, 0, 0);
    for file in &args.files {
        let name = file.display();
        let bytes = fs::read(file).with_context(|| format!("cannot read {name}"))?;
        let all = if bytes.first() == Some(&b'{') {
            let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
            lines.map(from_json).collect::<Result<Vec<_>, _>>().with_context(|| name.to_string())?
        } else {
            let profile = pprof::decode(&bytes, MAX_INFLATED).with_context(|| name.to_string())?;
            let labels = BTreeMap::from([("service_name".to_owned(), "checked".to_owned())]);
            let mut encoder = Encoder::new();
            encoder.add(&Outgoing { id: "", labels: &labels, profile: &profile });
            vec![encoder.finish()]
        };
        for request in all {
            let found = breaches(&request);
            ensure!(found.is_empty(), "{name} breaks the rules of OTLP: {}", found.join("; "));
            requests += 1;
            let scopes = request.resource_profiles.iter().flat_map(|resource| &resource.scope_profiles);
            for profile in scopes.flat_map(|scope| &scope.profiles) {
                profiles += 1;
                samples += profile.samples.len();
            }
        }
    }
    ensure!(samples > 0, "there is no sample in these files");
    println!("{requests} requests with {profiles} profiles and {samples} samples keep the rules of OTLP");
    Ok(())
}
