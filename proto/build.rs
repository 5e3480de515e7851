//! Compiles the `.proto` files without protoc, and writes their descriptors for gRPC reflection.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 6] = [
    "gannet/control/v1/control.proto",
    "gannet/debuginfo/v1/debuginfo.proto",
    "gannet/ingest/v1/ingest.proto",
    "gannet/query/v1/deletion.proto",
    "gannet/query/v1/query.proto",
    "perftools/profiles/profile.proto",
];

/// Services of other projects that Gannet calls. They are not part of its own reflection.
const FOREIGN: [&str; 3] = [
    "push/v1/push.proto",
    "parca/profilestore/v1alpha1/profilestore.proto",
    "kubelet/pods/v1alpha1/pods.proto",
];

/// Services of Pyroscope that the collector serves. It encodes their messages itself, so it needs no servers of tonic, and as
/// JSON, so it needs their descriptors.
const PYROSCOPE: [&str; 2] = ["querier/v1/querier.proto", "push/v1/push.proto"];

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
    let descriptors = protox::compile(PYROSCOPE, ["proto"])?;
    fs::write(out.join("pyroscope.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(false)
        .extern_path(".perftools.profiles", "crate::profiles")
        .compile_fds(protox::compile([PYROSCOPE[0]], ["proto"])?)?;
    Ok(())
}
