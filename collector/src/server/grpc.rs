//! The gRPC server.

use std::{sync::Arc, time::Duration};

use gannet_proto::{
    control::{
        agent_service_server::AgentServiceServer, fleet_service_server::FleetServiceServer,
        trigger_service_server::TriggerServiceServer,
    },
    debuginfo::{
        agent_debug_info_service_server::AgentDebugInfoServiceServer,
        debug_info_service_server::DebugInfoServiceServer,
    },
    ingest::ingest_service_server::IngestServiceServer,
    query::{deletion_service_server::DeletionServiceServer, query_service_server::QueryServiceServer},
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{codec::CompressionEncoding, transport::Server};

use super::listener::Listener;
use crate::{
    auth::{Auth, AuthLayer},
    debuginfo::{DebugInfo, DebugInfoGrpc},
    deletions::DeletionGrpc,
    fleet::{Fleet, FleetGrpc},
    ingest::Ingest,
    otlp_service::{OtlpGrpc, OtlpReceiver},
    query::{Query, QueryGrpc},
    sql::Sql,
    triggers::Triggers,
};

/// Interval of keepalive pings, and the time for their answer. They detect an agent that is gone without a close.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a hello or a heartbeat. The fleet keeps one of each per node.
const MAX_AGENT_MESSAGE: usize = 1 << 20;

/// The implementations of all services.
pub(crate) struct GrpcServices {
    pub(crate) ingest: Ingest,
    pub(crate) query: Arc<Query>,
    pub(crate) sql: Arc<Sql>,
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) triggers: Triggers,
    pub(crate) auth: Arc<Auth>,
    pub(crate) otlp: OtlpReceiver,
    pub(crate) debug_info: Arc<DebugInfo>,
    pub(crate) deletions: DeletionGrpc,
    /// Largest compressed profile, in bytes.
    pub(crate) max_batch_bytes: u64,
}

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
#[error("the gRPC server cannot start: {0}")]
pub struct GrpcError(#[from] tonic_reflection::server::Error);

/// Starts the server, which runs until `stop` and the end of its streams.
pub(crate) async fn start(
    listener: Listener,
    services: GrpcServices,
    stop: CancellationToken,
) -> Result<JoinHandle<()>, GrpcError> {
    let GrpcServices {
        ingest,
        query,
        sql,
        fleet,
        triggers,
        auth,
        otlp,
        debug_info,
        deletions,
        max_batch_bytes,
    } = services;
    // The server must read a batch above the limit too, or it could not refuse the batch by its id.
    let max_push_message = max_batch_bytes as usize * 2 + (1 << 20);
    let ingest = IngestServiceServer::new(ingest)
        .max_decoding_message_size(max_push_message)
        .accept_compressed(CompressionEncoding::Zstd)
        .accept_compressed(CompressionEncoding::Gzip);
    let query = QueryServiceServer::new(QueryGrpc(query, sql)).send_compressed(CompressionEncoding::Gzip);
    let agents =
        AgentServiceServer::new(FleetGrpc(Arc::clone(&fleet))).max_decoding_message_size(MAX_AGENT_MESSAGE);
    let nodes = FleetServiceServer::new(FleetGrpc(fleet));
    let triggers = TriggerServiceServer::new(triggers);
    let debug_info = DebugInfoGrpc::new(debug_info);
    let (health, health_service) = tonic_health::server::health_reporter();
    macro_rules! serving {
        ($($service:ty),+) => { $( health.set_serving::<$service>().await; )+ };
    }
    serving!(
        IngestServiceServer<Ingest>,
        QueryServiceServer<QueryGrpc>,
        DeletionServiceServer<DeletionGrpc>,
        AgentServiceServer<FleetGrpc>,
        FleetServiceServer<FleetGrpc>,
        TriggerServiceServer<Triggers>,
        DebugInfoServiceServer<DebugInfoGrpc>,
        AgentDebugInfoServiceServer<DebugInfoGrpc>,
        OtlpGrpc
    );
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(gannet_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let serve = Server::builder()
        .layer(AuthLayer(auth))
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(ingest)
        .add_service(query)
        .add_service(DeletionServiceServer::new(deletions))
        .add_service(agents)
        .add_service(nodes)
        .add_service(triggers)
        .add_service(DebugInfoServiceServer::new(debug_info.clone()))
        .add_service(AgentDebugInfoServiceServer::new(debug_info))
        .add_service(OtlpGrpc(otlp))
        .serve_with_incoming_shutdown(listener.grpc(), stop.cancelled_owned());
    Ok(tokio::spawn(async move {
        if let Err(error) = serve.await {
            tracing::error!(%error, "the gRPC server has failed");
        }
    }))
}
