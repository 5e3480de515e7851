//! Prints the cost of the tables of all given files as one line of JSON. `table-cost FILE...`
#![allow(clippy::print_stdout, reason = "the output of the program")]

use std::{env, fs::File, time::Instant};

use gannet_unwind::{
    build::{BuildOptions, build_file},
    limits::TableLimits,
};

fn main() {
    let limits = TableLimits::default();
    let (mut files, mut eh_frame, mut kernel, mut rows, mut plain_rows, mut seconds) = (0, 0, 0, 0, 0, 0.0);
    // Go programs have no `.eh_frame` to compare with.
    let (mut go_functions, mut go_kernel) = (0, 0);
    for path in env::args().skip(1) {
        let Ok(file) = File::open(&path) else { continue };
        let options = |runs| BuildOptions { runs, ..BuildOptions::new(&path, &limits) };
        let begin = Instant::now();
        let Ok(built) = build_file(&file, &options(true)) else { continue };
        seconds += begin.elapsed().as_secs_f64();
        let Ok(plain) = build_file(&file, &options(false)) else { continue };
        files += 1;
        let bytes = built.table.kernel_bytes() as u64;
        if built.report.go_functions > 0 {
            go_functions += built.report.go_functions;
            go_kernel += bytes;
        } else {
            eh_frame += built.report.eh_frame_bytes;
            kernel += bytes;
        }
        rows += u64::from(built.table.rows());
        plain_rows += u64::from(plain.table.rows());
    }
    println!(
        "{{\"what\":\"tables\",\"files\":{files},\"eh_frame_bytes\":{eh_frame},\"rows\":{rows},\"rows_without_runs\":{plain_rows},\
         \"kernel_bytes_per_eh_frame_byte\":{:.3},\"kernel_bytes_per_go_function\":{:.1},\"million_rows_per_second\":{:.1},\"ms_per_mib_of_eh_frame\":{:.2}}}",
        kernel as f64 / (eh_frame as f64).max(1.0),
        go_kernel as f64 / (go_functions as f64).max(1.0),
        plain_rows as f64 / f64::max(seconds, 1e-9) / 1e6,
        seconds * 1e3 / (eh_frame as f64 / 1_048_576.0).max(1e-9),
    );
}
