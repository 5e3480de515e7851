//! The shared language of agent, collector and gannetctl: generated gRPC types and services, and the code that all of
//! them need to interpret these types (rules and their validator, pprof, series labels, the loss ledger).

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod connect;
pub mod labels;
pub mod ledger;
pub mod pprof;
pub mod rules;
pub mod selector;

/// The generated types and services.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::pedantic,
    clippy::doc_lazy_continuation,
    clippy::large_enum_variant,
    reason = "generated; the documentation is the .proto files'"
)]
mod generated {
    pub mod control {
        pub mod v1 {
            tonic::include_proto!("gannet.control.v1");
        }
    }
    pub mod debuginfo {
        pub mod v1 {
            tonic::include_proto!("gannet.debuginfo.v1");
        }
    }
    pub mod ingest {
        pub mod v1 {
            tonic::include_proto!("gannet.ingest.v1");
        }
    }
    pub mod query {
        pub mod v1 {
            tonic::include_proto!("gannet.query.v1");
        }
    }
    pub mod profiles {
        tonic::include_proto!("perftools.profiles");
    }
    pub mod foreign {
        pub mod push {
            pub mod v1 {
                tonic::include_proto!("push.v1");
            }
        }
        pub mod querier {
            pub mod v1 {
                tonic::include_proto!("querier.v1");
            }
        }
        pub mod types {
            pub mod v1 {
                tonic::include_proto!("types.v1");
            }
        }
        pub mod parca {
            tonic::include_proto!("parca.profilestore.v1alpha1");
        }
        pub mod kubelet {
            tonic::include_proto!("v1alpha1");
        }
    }
}

pub use generated::{
    control::v1 as control, debuginfo::v1 as debuginfo, ingest::v1 as ingest, profiles, query::v1 as query,
};

/// Services of other programs: the kubelet's stream of pods, servers that the collector forwards profiles to, and those of
/// Pyroscope that the collector serves.
pub mod foreign {
    pub use super::generated::foreign::{
        kubelet, parca, push::v1 as pyroscope, querier::v1 as pyroscope_querier, types::v1 as pyroscope_types,
    };

    /// The encoded `FileDescriptorSet` of the services of Pyroscope, for their JSON encoding.
    pub const PYROSCOPE_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pyroscope.bin"));
}

/// The encoded `FileDescriptorSet` of every `.proto` file, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Version of all programs, which are released together.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Default addresses of the programs.
pub mod ports {
    /// The collector's gRPC services.
    pub const COLLECTOR_GRPC: &str = "127.0.0.1:4100";
    /// The collector's page, HTTP API, metrics and probes.
    pub const COLLECTOR_HTTP: &str = "127.0.0.1:4180";
    /// The agent's debug page.
    pub const AGENT_DEBUG: &str = "127.0.0.1:6060";
    /// The agent's probes and metrics.
    pub const AGENT_PROBES: &str = "0.0.0.0:8081";
}
