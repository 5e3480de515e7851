//! The central program: takes profiles from agents, keeps them, answers questions about them, and hands out the rules
//! by which agents profile.
//!
//! Its rooms, and what each of them owns:
//!
//! | room | owns | never does |
//! |---|---|---|
//! | `ingest` | the push streams: checks every batch, answers it by its id | acknowledge what is not durable |
//! | `store` | the objects, the index beside them, retention; one writer changes them | lose what it has acknowledged |
//! | `query` | selections, merges, graphs, tables, timelines, behind gRPC and HTTP alike | change anything |
//! | `rules` | the sets of rules, their revisions, their file | take a damaged file for an empty one |
//! | `fleet` | who is connected, what each node was sent and has answered | let a slow node hold up another |
//! | `triggers` | nothing: the service in front of `rules` and `fleet` | |
//! | `http` | the page, the HTTP API, metrics, probes | |
//!
//! Data flows from `ingest` through the writer into `store`, and from there through `query` outwards. Rules flow from
//! `triggers` into `rules`, which publishes each new revision to `fleet`, which offers every node its part.
//!
//! Everything lies below one directory:
//!
//! | path | what |
//! |---|---|
//! | `objects/default/2026-01-31/12/ULID.pb.gz` | a profile; it carries its own metadata, so the index can be rebuilt |
//! | `index.redb` | what lies where; rebuilt from the objects if it is missing or corrupt |
//! | `rules/rules.pb`, `rules/rules.pb.prev` | the rules, and as they were before the last change |
//! | `nodes.pb` | which nodes were seen lately; a convenience after a restart |
//! | `lock` | locked while a collector runs |

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod config;
mod durable;
mod fleet;
mod http;
mod ingest;
mod metrics;
mod query;
mod rules;
mod store;
mod time;
mod triggers;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

pub use config::{Config, TlsFiles};
use gannet_proto::{
    control::{
        agent_service_server::AgentServiceServer, fleet_service_server::FleetServiceServer,
        trigger_service_server::TriggerServiceServer,
    },
    ingest::ingest_service_server::IngestServiceServer,
    query::query_service_server::QueryServiceServer,
};
pub use http::TlsError;
pub use query::{Selector, SelectorError};
pub use store::{IndexError, StoreError};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{
    codec::CompressionEncoding,
    transport::{Server, server::TcpIncoming},
};

use crate::{
    fleet::{Fleet, FleetGrpc},
    http::{Face, Listener, Peer, Tls},
    ingest::Ingest,
    metrics::Metrics,
    query::{Query, QueryGrpc},
    rules::Rules,
    store::Store,
    triggers::Triggers,
};

/// An agent that is gone without a word is noticed after these two.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Of a hello or a heartbeat, which are kept for each node.
const MAX_AGENT_MESSAGE: usize = 1 << 20;

/// Why the collector cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A flag is wrong.
    #[error("{0}")]
    Config(String),
    /// The address cannot be had.
    #[error("{flag} {addr}: {}", bind_words(source))]
    Bind {
        /// Which flag named it.
        flag: &'static str,
        /// The address.
        addr: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The certificates are wrong.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The directory of the rules cannot be made.
    #[error("cannot open the rules below --data: {0}")]
    Rules(#[source] io::Error),
    /// The gRPC server cannot be built.
    #[error("the gRPC server cannot start: {0}")]
    Grpc(String),
}

fn bind_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "the port is in use: stop what uses it, or choose another port".into(),
        io::ErrorKind::AddrNotAvailable => "this machine does not have the address".into(),
        io::ErrorKind::PermissionDenied => "not allowed to listen there: choose a port above 1023".into(),
        _ => error.to_string(),
    }
}

/// The central program.
pub struct Collector;

/// A collector that runs. Dropping it leaves its tasks running until the runtime ends; [`Running::shutdown`] ends it.
pub struct Running {
    /// Where gRPC is served.
    pub grpc_addr: SocketAddr,
    /// Where the page, the HTTP API, metrics and probes are served.
    pub http_addr: SocketAddr,
    /// Where the page is served to this machine alone, if it was asked for.
    pub http_local_addr: Option<SocketAddr>,
    stop: CancellationToken,
    stop_writer: CancellationToken,
    grpc: JoinHandle<()>,
    http: JoinHandle<()>,
    writer: JoinHandle<()>,
    fleet: Arc<Fleet>,
    timeout: Duration,
}

async fn bind(flag: &'static str, addr: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let bind = async {
        let listener = TcpListener::bind(addr).await?;
        let bound = listener.local_addr()?;
        Ok((listener, bound))
    };
    bind.await.map_err(|source| StartError::Bind { flag, addr, source })
}

impl Collector {
    /// Starts everything, and returns once it serves.
    pub async fn start(config: Config) -> Result<Running, StartError> {
        config.check()?;
        let tls = config.tls.as_ref().map(Tls::load).transpose()?;
        let (grpc_listener, grpc_addr) = bind("--listen", config.listen).await?;
        let (http_listener, http_addr) = bind("--http", config.http).await?;
        let local_listener = match config.http_local {
            Some(addr) => Some(bind("--http-local", addr).await?),
            None => None,
        };
        let http_local_addr = local_listener.as_ref().map(|(_, addr)| *addr);

        let metrics = Metrics::new();
        let (stop, stop_writer) = (CancellationToken::new(), CancellationToken::new());
        let (of, counts) = (config.clone(), metrics.clone());
        let opened = tokio::task::spawn_blocking(move || Store::open(&of, counts)).await;
        let (store, writer) = opened.map_err(|_| StoreError::Ended)??;
        let rules = Arc::new(Rules::open(&config.data, metrics.clone()).map_err(StartError::Rules)?);
        let fleet = Fleet::open(&config, Arc::clone(&rules), metrics.clone(), stop.clone());
        let ingest = Ingest::new(Arc::clone(&store), writer.sender(), &config, metrics.clone(), stop.clone());
        let query = Arc::new(Query::new(Arc::clone(&store), &config, metrics.clone()));
        let triggers = Triggers { rules, fleet: Arc::clone(&fleet), stop: stop.clone() };
        let clients_known = tls.as_ref().is_some_and(|t| t.clients_known);
        let face = Face {
            query: Arc::clone(&query),
            store,
            triggers: triggers.clone(),
            metrics: metrics.clone(),
            clients_known,
        };

        let (grpc_tls, http_tls) = tls.map_or((None, None), |t| (Some(t.grpc), Some(t.http)));
        let mut server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT));
        if let Some(tls) = grpc_tls {
            server = server.tls_config(tls).map_err(|e| StartError::Grpc(e.to_string()))?;
        }
        // A batch above the limit must still be read, or it could not be refused by its id.
        let max_message = config.max_batch_bytes as usize * 2 + (1 << 20);
        let (health, health_service) = tonic_health::server::health_reporter();
        let ingest = IngestServiceServer::new(ingest)
            .max_decoding_message_size(max_message)
            .accept_compressed(CompressionEncoding::Zstd)
            .accept_compressed(CompressionEncoding::Gzip);
        let query = QueryServiceServer::new(QueryGrpc(query)).send_compressed(CompressionEncoding::Gzip);
        let agents = AgentServiceServer::new(FleetGrpc(Arc::clone(&fleet)))
            .max_decoding_message_size(MAX_AGENT_MESSAGE);
        let nodes = FleetServiceServer::new(FleetGrpc(Arc::clone(&fleet)));
        let triggers = TriggerServiceServer::new(triggers);
        macro_rules! serving {
            ($($service:ty),+) => { $( health.set_serving::<$service>().await; )+ };
        }
        serving!(
            IngestServiceServer<Ingest>,
            QueryServiceServer<QueryGrpc>,
            AgentServiceServer<FleetGrpc>,
            FleetServiceServer<FleetGrpc>,
            TriggerServiceServer<Triggers>
        );
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(gannet_proto::DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let not_described = |e: tonic_reflection::server::Error| StartError::Grpc(e.to_string());
        let serve = server
            .add_service(health_service)
            .add_service(reflection().build_v1().map_err(not_described)?)
            .add_service(reflection().build_v1alpha().map_err(not_described)?)
            .add_service(ingest)
            .add_service(query)
            .add_service(agents)
            .add_service(nodes)
            .add_service(triggers)
            .serve_with_incoming_shutdown(
                TcpIncoming::from(grpc_listener).with_nodelay(Some(true)),
                stop.clone().cancelled_owned(),
            );
        let grpc = tokio::spawn(async move {
            if let Err(error) = serve.await {
                tracing::error!(%error, "the gRPC server has failed");
            }
        });
        let mut faces = vec![(http_listener, http_addr, http_tls, http::router(face.clone()))];
        if let Some((listener, addr)) = local_listener {
            faces.push((listener, addr, None, http::local_router(face)));
        }
        let servers = faces.into_iter().map(|(listener, addr, tls, router)| {
            let listener = Listener::new(listener, addr, tls, metrics.clone(), stop.clone());
            axum::serve(listener, router.into_make_service_with_connect_info::<Peer>())
                .with_graceful_shutdown(stop.clone().cancelled_owned())
                .into_future()
        });
        let servers = futures::future::join_all(servers);
        let http = tokio::spawn(async move {
            for error in servers.await.into_iter().filter_map(Result::err) {
                tracing::error!(%error, "the HTTP server has failed");
            }
        });
        let writer = tokio::spawn(writer.run(stop_writer.clone()));
        tokio::spawn(upkeep(Arc::clone(&fleet), stop.clone()));
        let timeout = config.shutdown_timeout;
        Ok(Running {
            grpc_addr,
            http_addr,
            http_local_addr,
            stop,
            stop_writer,
            grpc,
            http,
            writer,
            fleet,
            timeout,
        })
    }
}

async fn upkeep(fleet: Arc<Fleet>, stop: CancellationToken) {
    let mut tick = tokio::time::interval(fleet::UPKEEP_INTERVAL);
    tick.tick().await;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {
                let fleet = Arc::clone(&fleet);
                let _ = tokio::task::spawn_blocking(move || fleet.upkeep()).await;
            }
        }
    }
}

impl Running {
    /// Returns when a part has ended by itself, which none should; the log says why.
    pub async fn failed(&mut self) {
        tokio::select! {
            _ = &mut self.grpc => {}
            _ = &mut self.http => {}
            _ = &mut self.writer => {}
        }
    }

    /// Takes nothing new, answers every batch that it has, makes everything durable, and ends.
    pub async fn shutdown(self) {
        let Self { stop, stop_writer, grpc, http, writer, fleet, timeout, .. } = self;
        stop.cancel();
        for (name, mut server) in [("gRPC", grpc), ("HTTP", http)] {
            if !server.is_finished() && tokio::time::timeout(timeout, &mut server).await.is_err() {
                tracing::warn!("the {name} server has connections that do not end: cut");
                server.abort();
            }
        }
        stop_writer.cancel();
        if !writer.is_finished() {
            let _ = writer.await;
        }
        let _ = tokio::task::spawn_blocking(move || fleet.upkeep()).await;
        tracing::info!("the collector has ended");
    }
}
