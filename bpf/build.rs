//! Compiles the BPF programs and generates their skeletons.

use std::{env, path::PathBuf};

use libbpf_cargo::SkeletonBuilder;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=src/bpf");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    SkeletonBuilder::new()
        .source("src/bpf/gannet.bpf.c")
        // The frames of a sample stand behind it. Warnings are errors, because libbpf-cargo does not print clang's warnings.
        .clang_args([
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
            "-Wno-gnu-variable-sized-type-not-at-end",
            "-Werror",
        ])
        .build_and_generate(out.join("gannet.skel.rs"))?;
    Ok(())
}
