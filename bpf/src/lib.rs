//! The BPF programs, their skeleton, and the types that they share with the agent.

/// The sampler and the process handlers: skeleton and shared types, generated from `src/bpf/gannet.bpf.c`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "generated; the documentation is in the C headers"
)]
mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/gannet.skel.rs"));
}

pub use skeleton::*;
