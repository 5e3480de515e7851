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
//! | `forward` | profiles on their way to Pyroscope and Parca | hold up what comes in |
//! | `listen` | connections and their certificates | know who may do what |
//! | `auth` | who calls, and what they may | let a call through unseen |
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
//! | `rules/audit.jsonl`, `rules/audit.jsonl.1` | what happened to the rules, one JSON object a line |
//! | `nodes.pb` | which nodes were seen lately; a convenience after a restart |
//! | `lock` | locked while a collector runs |

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod auth;
pub mod config;
mod durable;
mod fleet;
mod forward;
mod http;
mod ingest;
mod kubernetes;
mod metrics;
mod query;
mod rules;
mod selector;
mod store;
mod time;
mod tls;
mod triggers;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

pub use auth::{Grant, NodeIdentity, Role};
pub use config::{Config, RulesStore, TlsFiles};
pub use forward::{Forward, ForwardError, ForwardOptions};
use gannet_proto::{
    control::{
        agent_service_server::AgentServiceServer, fleet_service_server::FleetServiceServer,
        trigger_service_server::TriggerServiceServer,
    },
    ingest::ingest_service_server::IngestServiceServer,
    query::query_service_server::QueryServiceServer,
};
pub use kubernetes::KubernetesError;
pub use query::{Selector, SelectorError};
pub use store::{Bucket, IndexError, StoreError};
pub use tls::TlsError;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{codec::CompressionEncoding, transport::Server};

use crate::{
    auth::{Auth, AuthLayer, Reviewer},
    fleet::{Fleet, FleetGrpc},
    forward::Forwarder,
    http::Face,
    ingest::Ingest,
    metrics::Metrics,
    query::{Query, QueryGrpc},
    rules::{ConfigMapKeep, FileKeep, Keep, Mirror, Rules},
    store::Store,
    tls::{Listener, Peer, Speaks, Tls},
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
    #[error("cannot open the rules (--rules-store, --data): {0}")]
    Rules(#[source] io::Error),
    /// Profiles cannot be handed on.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The Kubernetes API cannot be used.
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
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
    forwarding: Vec<JoinHandle<()>>,
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
        let tokens = config.token_audience.is_some();
        let tls = config.tls.as_ref().map(|files| Tls::load(files, tokens)).transpose()?;
        let reviewer = match &config.token_audience {
            None => None,
            Some(audience) => {
                let client = kubernetes::client(config.kubeconfig.as_deref()).await?;
                Some(Reviewer::new(client, audience.clone()))
            }
        };
        let auth = Auth::new(&config, reviewer);
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
        let (rules_dir, namespaced) = match &config.rules_store {
            RulesStore::File(None) => (config.data.join("rules"), None),
            RulesStore::File(Some(dir)) => (dir.clone(), None),
            RulesStore::Kubernetes(namespace) => {
                let client = kubernetes::client(config.kubeconfig.as_deref()).await?;
                let namespace = namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
                (config.data.join("rules"), Some((client, namespace)))
            }
        };
        let (of, counts) = (namespaced.clone(), metrics.clone());
        let runtime = tokio::runtime::Handle::current();
        let opened = tokio::task::spawn_blocking(move || {
            let keep: Box<dyn Keep> = match of {
                None => Box::new(FileKeep::open(&rules_dir)?),
                Some((client, namespace)) => Box::new(ConfigMapKeep::new(client, &namespace, runtime)),
            };
            Rules::open(keep, &rules_dir, counts)
        });
        let rules = Arc::new(opened.await.map_err(|_| StoreError::Ended)?.map_err(StartError::Rules)?);
        let fleet = Fleet::open(&config, Arc::clone(&rules), metrics.clone(), stop.clone());
        if let Some((client, namespace)) = namespaced {
            let name = std::env::var("HOSTNAME").unwrap_or_else(|_| "collector".to_owned());
            let (rules, fleet) = (Arc::clone(&rules), Arc::clone(&fleet));
            tokio::spawn(Mirror::new(client, &namespace, rules, fleet, name).run(stop.clone()));
        }
        let patience = config.shutdown_timeout / 2;
        let (forwarder, forwarding) =
            Forwarder::start(&config.forward, &config.forward_options, &metrics, &stop_writer, patience)?;
        let ingest = Ingest::new(
            Arc::clone(&store),
            writer.sender(),
            &config,
            forwarder,
            metrics.clone(),
            stop.clone(),
        );
        let query = Arc::new(Query::new(Arc::clone(&store), &config, metrics.clone()));
        tokio::spawn(follow(Arc::clone(&rules), Arc::clone(&fleet), stop.clone()));
        let triggers = Triggers { rules, fleet: Arc::clone(&fleet), stop: stop.clone() };
        let face = Face {
            query: Arc::clone(&query),
            store,
            triggers: triggers.clone(),
            metrics: metrics.clone(),
            auth: Arc::clone(&auth),
        };

        let server = Server::builder()
            .layer(AuthLayer(auth))
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT));
        let mut server = server;
        if let Some(tls) = &tls {
            let (tls, metrics, stop) = (Arc::clone(tls), metrics.clone(), stop.clone());
            tokio::spawn(tls.follow(config.tls_reload_interval, metrics, stop));
        }
        let listener =
            |tcp, addr, speaks| Listener::new(tcp, addr, tls.clone(), speaks, metrics.clone(), stop.clone());
        let (grpc_listener, http_listener) = (
            listener(grpc_listener, grpc_addr, Speaks::Grpc),
            listener(http_listener, http_addr, Speaks::Http),
        );
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
            .serve_with_incoming_shutdown(grpc_listener.grpc(), stop.clone().cancelled_owned());
        let grpc = tokio::spawn(async move {
            if let Err(error) = serve.await {
                tracing::error!(%error, "the gRPC server has failed");
            }
        });
        let mut faces = vec![(http_listener, http::router(face.clone()))];
        if let Some((local, addr)) = local_listener {
            let local = Listener::new(local, addr, None, Speaks::Http, metrics.clone(), stop.clone());
            faces.push((local, http::local_router(face)));
        }
        let servers = faces.into_iter().map(|(listener, router)| {
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
            forwarding,
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

/// The definition of the TriggerRule resource, as YAML. `None` only if this program was not built as a whole.
pub fn custom_resource() -> Option<String> {
    let text = serde_saphyr::to_string(&rules::custom_resource()?).ok()?;
    Some(format!("# Made by `gannet-collector crd`.\n{}\n", text.trim_end()))
}

/// Takes over rules that other collectors have set, and brings staged ones on.
async fn follow(rules: Arc<Rules>, fleet: Arc<Fleet>, stop: CancellationToken) {
    let mut look = tokio::time::interval(rules.look_every());
    let mut staging = tokio::time::interval(fleet::STAGING_INTERVAL);
    loop {
        let (rules, fleet) = (Arc::clone(&rules), Arc::clone(&fleet));
        let _ = tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => tokio::task::spawn_blocking(move || rules.look()).await,
            _ = staging.tick() => tokio::task::spawn_blocking(move || fleet.complete_staged()).await,
        };
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
        let Self { forwarding, stop, stop_writer, grpc, http, writer, fleet, timeout, .. } = self;
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
        for task in forwarding {
            let _ = task.await;
        }
        let _ = tokio::task::spawn_blocking(move || fleet.upkeep()).await;
        tracing::info!("the collector has ended");
    }
}
