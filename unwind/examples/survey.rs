//! Builds the tables of the files on the command line (or on standard input) and prints their cost.
#![allow(clippy::print_stdout, reason = "the output of the program")]
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::time::Duration;

use gannet_unwind::build::{BuildOptions, build_file};
use gannet_unwind::format::{UnwindRule, cfa, loc, row_rule};
use gannet_unwind::limits::TableLimits;

/// Returns the CPU time of this thread, which does not depend on the load of the machine.
fn cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = text.split_whitespace().next().and_then(|nanos| nanos.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}

fn main() {
    let limits = TableLimits { time: None, ..TableLimits::default() };
    let mut files: Vec<String> = std::env::args().skip(1).collect();
    if files.is_empty() {
        files = std::io::stdin().lines().map_while(Result::ok).collect();
    }
    let runs = std::env::var_os("RUNS").is_some();
    let each = files.len() <= 20;
    let mut all: HashSet<UnwindRule> = HashSet::new();
    let mut kinds: BTreeMap<String, u64> = BTreeMap::new();
    let (mut eh, mut kernel, mut rows, mut time, mut good, mut oddities) =
        (0, 0, 0_u64, Duration::ZERO, 0, [0; 3]);
    let (mut functions, mut unsupported, mut go, mut go_bytes, mut go_rows) = (0, 0, 0, 0, 0_u64);
    for name in &files {
        let Ok(file) = File::open(name) else { continue };
        let start = cpu();
        let built = match build_file(&file, &BuildOptions { runs, ..BuildOptions::new(name, &limits) }) {
            Ok(built) => built,
            Err(error) => {
                println!("{error}");
                continue;
            }
        };
        let took = cpu().saturating_sub(start);
        let (table, report) = (&built.table, &built.report);
        if each {
            println!(
                "{name}: {took:?}, {} rows, {} rules, {} bytes in the kernel, {report:?}",
                table.rows(),
                table.rules().len(),
                table.kernel_bytes()
            );
        }
        all.extend(table.rules());
        let mut uses = vec![0_u64; table.rules().len()];
        for line in &table.lines()[table.directory_lines() as usize..] {
            let mut last = None;
            for word in line.0 {
                if last.replace(word) != Some(word) {
                    uses[usize::from(row_rule(word))] += 1;
                }
            }
        }
        for (rule, uses) in table.rules().iter().zip(uses) {
            let kind = match rule.cfa_kind {
                kind if kind >= cfa::REGISTER => format!("cfa in register {}", kind - cfa::REGISTER),
                cfa::UNSUPPORTED => {
                    format!("unsupported: {}", rule.unsupported_reason().map_or("?", |why| why.as_str()))
                }
                kind => format!("cfa kind {kind}"),
            };
            *kinds.entry(kind).or_default() += uses;
            *kinds.entry(format!("fp kind {}", rule.fp_kind)).or_default() += uses;
            if rule.ra_kind != loc::CFA {
                *kinds.entry(format!("ra kind {}", rule.ra_kind)).or_default() += uses;
            }
        }
        good += 1;
        if report.go_functions > 0 {
            go += 1;
            go_bytes += table.kernel_bytes() as u64;
            go_rows += u64::from(table.rows());
            continue;
        }
        eh += report.eh_frame_bytes;
        kernel += table.kernel_bytes() as u64;
        rows += u64::from(table.rows());
        time += took;
        functions += report.eh_frame_functions;
        unsupported += report.unsupported_rows;
        oddities[0] += report.oddities.malformed;
        oddities[1] += report.oddities.dropped;
        oddities[2] += report.oddities.overlapping;
        if report.oddities.overlapping > 0 || report.oddities.malformed > 0 || report.unscanned_bytes > 0 {
            println!("{name}: {:?} {}", report.oddities, report.unscanned_bytes);
        }
    }
    println!(
        "{good} of {} files; without Go: .eh_frame {eh} bytes, kernel {kernel} bytes ({:.3} per byte), {rows} rows, {functions} functions",
        files.len(),
        kernel as f64 / eh as f64
    );
    println!(
        "{time:?}: {:.1} MB/s, {:.1} million rows/s; {unsupported} unsupported rows; malformed, dropped, overlapping {oddities:?}",
        eh as f64 / time.as_secs_f64() / 1e6,
        rows as f64 / time.as_secs_f64() / 1e6
    );
    println!("{go} Go files: {go_rows} rows, {go_bytes} bytes in the kernel");
    println!("{} different rules; rows: {kinds:#?}", all.len());
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default());
}
