//! Compiles the `.proto` files without a protoc, and keeps their descriptors for gRPC reflection.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 4] = [
    "gannet/control/v1/control.proto",
    "gannet/ingest/v1/ingest.proto",
    "gannet/query/v1/query.proto",
    "perftools/profiles/profile.proto",
];

/// What others have defined, and Gannet only calls: not part of its own reflection.
const FOREIGN: [&str; 2] = ["push/v1/push.proto", "parca/profilestore/v1alpha1/profilestore.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // `AgentService.Connect` would collide with a generated `connect` constructor; channels are built by hand.
        .build_transport(false)
        // Ordered maps, so that the same message has the same bytes: rule digests and profiles depend on it.
        .btree_map(".")
        .compile_fds(descriptors)?;
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(protox::compile(FOREIGN, ["proto"])?)?;
    Ok(())
}
