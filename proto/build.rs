//! Compiles the `.proto` files without protoc, and writes their descriptors for gRPC reflection.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 4] = [
    "gannet/control/v1/control.proto",
    "gannet/ingest/v1/ingest.proto",
    "gannet/query/v1/query.proto",
    "perftools/profiles/profile.proto",
];

/// Services of other projects that Gannet only calls. They are not part of its own reflection.
const FOREIGN: [&str; 3] = [
    "push/v1/push.proto",
    "parca/profilestore/v1alpha1/profilestore.proto",
    "kubelet/pods/v1alpha1/pods.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // A generated constructor `connect` would collide with `AgentService.Connect`, so clients take a channel.
        .build_transport(false)
        // Ordered maps give the same message the same bytes, on which rule digests and profiles depend.
        .btree_map(".")
        .compile_fds(descriptors)?;
    tonic_prost_build::configure()
        .build_transport(false)
        .btree_map(".")
        .compile_fds(protox::compile(FOREIGN, ["proto"])?)?;
    Ok(())
}
