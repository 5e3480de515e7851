//! The cost of building tables of real files, their size in the kernel, and the cache lines that a look-up reads.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a benchmark")]

use std::fs::File;
use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gannet_unwind::build::{BuildOptions, BuiltTable, build_file};
use gannet_unwind::limits::TableLimits;

const FILES: &[&str] = &[
    "/usr/lib/x86_64-linux-gnu/libc.so.6",
    "/usr/lib/x86_64-linux-gnu/libstdc++.so.6",
    "/usr/lib/x86_64-linux-gnu/libcrypto.so.3",
    "/usr/lib/gcc/x86_64-linux-gnu/12/cc1",
    "/usr/lib/x86_64-linux-gnu/libLLVM-15.so.1",
    "/usr/bin/node",
];

fn build(path: &str, limits: &TableLimits, runs: bool) -> BuiltTable {
    build_file(&File::open(path).unwrap(), &BuildOptions { runs, ..BuildOptions::new(path, limits) }).unwrap()
}

fn tables(criterion: &mut Criterion) {
    let limits = TableLimits { time: None, ..TableLimits::default() };
    let mut group = criterion.benchmark_group("build");
    group.sample_size(10);
    let (mut eh_frame, mut plain, mut joined) = (0, 0, 0);
    for path in FILES.iter().filter(|path| Path::new(path).exists()) {
        let built = build(path, &limits, false);
        let with_runs = build(path, &limits, true);
        let name = path.rsplit('/').next().unwrap();
        println!(
            "{name}: {} bytes of .eh_frame, {} rows, {} rules; kernel bytes per byte of .eh_frame {:.3}; with runs: {} rows, {} rules, {:.3}",
            built.report.eh_frame_bytes,
            built.table.rows(),
            built.table.rules().len(),
            built.table.kernel_bytes() as f64 / built.report.eh_frame_bytes as f64,
            with_runs.table.rows(),
            with_runs.table.rules().len(),
            with_runs.table.kernel_bytes() as f64 / built.report.eh_frame_bytes as f64,
        );
        eh_frame += built.report.eh_frame_bytes;
        plain += built.table.kernel_bytes() as u64;
        joined += with_runs.table.kernel_bytes() as u64;
        group.throughput(Throughput::Bytes(built.report.eh_frame_bytes));
        group.bench_function(name, |bencher| bencher.iter(|| black_box(build(path, &limits, true))));
    }
    group.finish();
    println!(
        "all: {:.3} kernel bytes per byte of .eh_frame, {:.3} with runs",
        plain as f64 / eh_frame as f64,
        joined as f64 / eh_frame as f64
    );
    if let Some(path) = FILES.iter().find(|path| Path::new(path).exists()) {
        let built = build(path, &limits, true);
        let span = u64::from(built.table.granules()) << 11;
        let mut seed = 1_u64;
        let addresses: Vec<u64> = (0..65_536)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                built.table.base() + (seed >> 20) % span
            })
            .collect();
        let lines: u64 = addresses.iter().map(|at| u64::from(built.table.lookup_counted(*at).1)).sum();
        println!("look-up: {:.2} lines of rows read", lines as f64 / addresses.len() as f64);
        let mut at = 0;
        criterion.bench_function("lookup", |bencher| {
            bencher.iter(|| {
                at = (at + 1) % addresses.len();
                black_box(built.table.lookup(addresses[at]))
            });
        });
    }
}

criterion_group!(benches, tables);
criterion_main!(benches);
