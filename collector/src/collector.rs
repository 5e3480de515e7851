//! Builds the parts of the collector, connects them, and ends them.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use kube::Client;
use tokio::{runtime::Handle, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    auth::{Auth, Reviewer},
    clickhouse::{ClickHouse, QueryProgram},
    config::{Config, ConfigError},
    debuginfo::DebugInfo,
    deletions::DeletionGrpc,
    fleet::{Fleet, STAGING_INTERVAL, UPKEEP_INTERVAL},
    forward::{ForwardError, Forwarder},
    http::HttpState,
    ingest::{Ingest, Onward},
    kubernetes::{self, KubernetesError},
    metrics::Metrics,
    otlp_service::OtlpReceiver,
    query::Query,
    recording::{Recorder, RecordingFileError},
    rules::{ConfigMapStorage, FileStorage, Mirror, NodeStates, RuleStorage, Rules, RulesLocation},
    server::{
        grpc::{self, GrpcError, GrpcServices},
        http,
        listener::{BindError, BoundSocket, Listener, ServerOptions},
    },
    sql::Sql,
    store::{Bucket, Store, StoreError, StoreWriter},
    table::{self, SumsReader, TableHandle},
    tls::{ListenProtocol, Tls, TlsError},
    triggers::Triggers,
};

/// Why the collector cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An address cannot be used.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The directory of the rules cannot be created or read.
    #[error("cannot open the rules (--rules-store, --data): {0}")]
    Rules(#[source] io::Error),
    /// An error in the file of recording rules.
    #[error(transparent)]
    Recording(#[from] RecordingFileError),
    /// An error of the directory of debug information.
    #[error("cannot open the debug information (`debuginfo` in --data): {0}")]
    DebugInfo(#[source] io::Error),
    /// Profiles cannot be forwarded.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The Kubernetes API cannot be used.
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
    /// The gRPC server cannot be built.
    #[error(transparent)]
    Grpc(#[from] GrpcError),
}

/// Starts a collector; see [`Collector::start`].
pub struct Collector;

/// A running collector. Its tasks outlive it until the runtime ends; [`Running::shutdown`] ends them.
pub struct Running {
    /// Address of the gRPC server.
    pub grpc_addr: SocketAddr,
    /// Address of the page, the HTTP API, metrics and probes.
    pub http_addr: SocketAddr,
    /// Address of the loopback listener, if there is one.
    pub debug_addr: Option<SocketAddr>,
    stop: CancellationToken,
    stop_writer: CancellationToken,
    grpc: JoinHandle<()>,
    http: JoinHandle<()>,
    writer: JoinHandle<()>,
    table: Option<TableHandle>,
    fleet: Arc<Fleet>,
    forwarding: Vec<JoinHandle<()>>,
    timeout: Duration,
}

impl Collector {
    /// Starts all parts, and returns once both servers accept connections.
    pub async fn start(config: Config) -> Result<Running, StartError> {
        config.check()?;
        let metrics = Metrics::new();
        // The writer and the forwarder stop after the servers, so that every received batch gets its answer.
        let (stop, stop_writer) = (CancellationToken::new(), CancellationToken::new());
        let accepts_tokens = config.auth.token_audience.is_some();
        let tls = Tls::load(&config.tls, accepts_tokens)?;
        let auth = open_auth(&config).await?;
        let sockets = Sockets::bind(&config.server).await?;
        let (grpc_addr, http_addr) = (sockets.grpc.addr, sockets.http.addr);
        let debug_addr = sockets.debug.as_ref().map(|socket| socket.addr);

        let (store, writer) = open_store(&config, &metrics).await?;
        let (rules, resources) = open_rules(&config, &metrics).await?;
        let fleet =
            Fleet::open(config.directory(), &config.fleet, Arc::clone(&rules), metrics.clone(), stop.clone());
        if let Some((client, namespace)) = resources {
            let name = name_of_collector(grpc_addr.port());
            let nodes: Arc<dyn NodeStates> = Arc::clone(&fleet) as _;
            let mirror = Mirror::new(client, &namespace, Arc::clone(&rules), nodes, name);
            tokio::spawn(mirror.run(stop.clone()));
        }
        let timeout = config.server.shutdown_timeout;
        let (forwarder, forwarding) = Forwarder::start(&config.forward, &metrics, &stop_writer, timeout / 2)?;
        let recorder = match &config.recording.recording_rules {
            Some(path) => Some(Recorder::open(path, metrics.clone())?),
            None => None,
        };
        let ingest = Ingest::new(
            Arc::clone(&store),
            writer.queue(),
            &config.ingest,
            Onward { forwarder, recorder: recorder.clone() },
            metrics.clone(),
            stop.clone(),
        );
        let otlp = OtlpReceiver::new(ingest.clone());
        let max_batch_bytes = config.ingest.max_batch_bytes.0;
        let debug_info = open_debug_info(&config, &metrics).await?;
        let query = open_query(&config, &store, &debug_info, &metrics)?;
        let triggers = Triggers { rules: Arc::clone(&rules), fleet: Arc::clone(&fleet), stop: stop.clone() };

        let listen = |socket, tls: Option<&Arc<Tls>>, protocol| {
            Listener::start(socket, tls.cloned(), protocol, metrics.clone(), stop.clone())
        };
        let table = open_table(&config, &store, &metrics)?;
        let sql = open_sql(&config, &store, &metrics)?;
        let deletions =
            DeletionGrpc { store: Arc::clone(&store), queue: writer.deletions(), rules: Arc::clone(&rules) };
        let state = HttpState {
            query: Arc::clone(&query),
            ingest: Some(ingest.clone()),
            store,
            triggers: triggers.clone(),
            metrics: metrics.clone(),
            auth: Arc::clone(&auth),
            otlp: Some(otlp.clone()),
            recorder: recorder.clone(),
        };
        let services = GrpcServices {
            ingest,
            query,
            sql,
            fleet: Arc::clone(&fleet),
            triggers,
            auth,
            otlp,
            debug_info,
            deletions,
            max_batch_bytes,
        };
        let grpc_listener = listen(sockets.grpc, tls.as_ref(), ListenProtocol::Grpc);
        let http_listener = listen(sockets.http, tls.as_ref(), ListenProtocol::Http);
        let debug_listener = sockets.debug.map(|socket| listen(socket, None, ListenProtocol::Http));
        let grpc = grpc::start(grpc_listener, services, stop.clone()).await?;
        let http = http::start(http_listener, debug_listener, state, &stop);

        if let Some(tls) = tls {
            tokio::spawn(tls.follow(metrics.clone(), stop.clone()));
        }
        if let Some(recorder) = recorder {
            tokio::spawn(recorder.follow(stop.clone()));
        }
        tokio::spawn(follow_rules(rules, Arc::clone(&fleet), stop.clone()));
        tokio::spawn(upkeep(Arc::clone(&fleet), stop.clone()));
        let writer = tokio::spawn(writer.run(stop_writer.clone()));
        Ok(Running {
            grpc_addr,
            http_addr,
            debug_addr,
            stop,
            stop_writer,
            grpc,
            http,
            writer,
            table,
            fleet,
            forwarding,
            timeout,
        })
    }
}

/// Returns the name of the pod; outside of Kubernetes host and port. It distinguishes collectors, because each writes its own counts.
fn name_of_collector(port: u16) -> String {
    std::env::var("HOSTNAME").unwrap_or_else(|_| {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        format!("{host}-{port}")
    })
}

/// The bound sockets of all listeners.
struct Sockets {
    grpc: BoundSocket,
    http: BoundSocket,
    debug: Option<BoundSocket>,
}

impl Sockets {
    async fn bind(options: &ServerOptions) -> Result<Self, BindError> {
        Ok(Self {
            grpc: BoundSocket::bind("--grpc-listen", options.grpc_listen).await?,
            http: BoundSocket::bind("--http-listen", options.http_listen).await?,
            debug: match options.debug_listen {
                Some(addr) => Some(BoundSocket::bind("--debug-listen", addr).await?),
                None => None,
            },
        })
    }
}

async fn open_auth(config: &Config) -> Result<Arc<Auth>, KubernetesError> {
    let reviewer = match &config.auth.token_audience {
        None => None,
        Some(audience) => {
            let client = kubernetes::client(config.kubeconfig.as_deref()).await?;
            Some(Reviewer::new(client, audience.clone()))
        }
    };
    let ServerOptions { grpc_listen, http_listen, .. } = &config.server;
    let is_local = grpc_listen.ip().is_loopback() && http_listen.ip().is_loopback();
    Ok(Auth::new(&config.auth, config.has_client_ca(), is_local, reviewer))
}

pub(crate) async fn open_store(
    config: &Config,
    metrics: &Metrics,
) -> Result<(Arc<Store>, StoreWriter), StoreError> {
    let (data, bucket) = (config.directory().clone(), config.bucket().cloned());
    let (options, metrics) = (config.store.clone(), metrics.clone());
    let opened =
        tokio::task::spawn_blocking(move || Store::open(&data, bucket.as_ref(), &options, metrics)).await;
    opened.map_err(|_| StoreError::Ended)?
}

pub(crate) async fn open_debug_info(
    config: &Config,
    metrics: &Metrics,
) -> Result<Arc<DebugInfo>, StartError> {
    let bucket = config.bucket().map(Bucket::connect).transpose().map_err(StoreError::Object)?;
    let (data, options) = (config.directory().clone(), config.debuginfo.clone());
    let (min_free_bytes, metrics) = (config.store.min_free_bytes.0, metrics.clone());
    let opened = tokio::task::spawn_blocking(move || {
        DebugInfo::open(&data, bucket, &options, min_free_bytes, metrics)
    });
    Ok(Arc::new(opened.await.map_err(|_| StoreError::Ended)?.map_err(StartError::DebugInfo)?))
}

/// Starts the thread of the table, if there is to be one. A table that an earlier run left counts in `retention_bytes`.
fn open_table(
    config: &Config,
    store: &Arc<Store>,
    metrics: &Metrics,
) -> Result<Option<TableHandle>, StoreError> {
    if config.table.table {
        return table::start(Arc::clone(store), &config.table, metrics.clone()).map(Some);
    }
    if let Some((directory, block_bytes)) = store.table_directory() {
        let bytes = table::count_unused(&directory, block_bytes);
        store.set_table_bytes(bytes);
        tracing::warn!(
            bytes,
            "the directory `table` in --data is from a run with --table; nothing updates it now: remove it, or start with --table"
        );
    }
    Ok(None)
}

fn open_sql(config: &Config, store: &Arc<Store>, metrics: &Metrics) -> Result<Arc<Sql>, StoreError> {
    let tables = if config.table.table { Some(store.table_objects()?) } else { None };
    Ok(Sql::new(tables, Arc::clone(store), &config.sql, metrics.clone()))
}

fn open_query(
    config: &Config,
    store: &Arc<Store>,
    debug_info: &Arc<DebugInfo>,
    metrics: &Metrics,
) -> Result<Arc<Query>, StartError> {
    let max_batch_bytes = config.ingest.max_batch_bytes.0;
    let (of, names) = (Arc::clone(store), Arc::clone(debug_info));
    let query = Query::new(of, names, &config.query, max_batch_bytes, metrics.clone());
    let query = query.with_tables(open_clickhouse(config, store, metrics)?);
    // Without both flags, nothing updates the tables of sums.
    let has_sums = config.table.table && config.table.table_rollups;
    let sums = if has_sums { Some(SumsReader::new(store.table_objects()?)) } else { None };
    Ok(Arc::new(query.with_sums(sums)))
}

/// Prepares the connection to ClickHouse, if it is to answer queries.
fn open_clickhouse(
    config: &Config,
    store: &Store,
    metrics: &Metrics,
) -> Result<Option<Arc<ClickHouse>>, StartError> {
    let QueryProgram::ClickHouse(server) = &config.clickhouse.query else { return Ok(None) };
    let location = config.table_location().map_err(ConfigError::Invalid)?;
    tracing::info!(%server, tables = %location, "ClickHouse merges the profiles of the tables");
    let opened =
        ClickHouse::new(&config.clickhouse, server, location, store.table_objects()?, metrics.clone());
    Ok(Some(Arc::new(opened.map_err(|reason| ConfigError::Invalid(format!("--query: {reason}")))?)))
}

/// Opens the rules. Also returns client and namespace of the custom resources, if the rules have some.
pub(crate) async fn open_rules(
    config: &Config,
    metrics: &Metrics,
) -> Result<(Arc<Rules>, Option<(Client, String)>), StartError> {
    let in_data = config.directory().join("rules");
    let (dir, resources): (PathBuf, _) = match &config.rules_store {
        RulesLocation::File(None) => (in_data, None),
        RulesLocation::File(Some(dir)) => (dir.clone(), None),
        RulesLocation::Kubernetes(namespace) => {
            let client = kubernetes::client(config.kubeconfig.as_deref()).await?;
            let namespace = namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
            (in_data, Some((client, namespace)))
        }
    };
    let (of, metrics, runtime) = (resources.clone(), metrics.clone(), Handle::current());
    let opened = tokio::task::spawn_blocking(move || {
        let storage: Box<dyn RuleStorage> = match of {
            None => Box::new(FileStorage::open(&dir)?),
            Some((client, namespace)) => Box::new(ConfigMapStorage::new(client, &namespace, runtime)),
        };
        Rules::open(storage, &dir, metrics)
    });
    let rules = opened.await.map_err(|_| StoreError::Ended)?.map_err(StartError::Rules)?;
    Ok((Arc::new(rules), resources))
}

/// Saves the list of known nodes from time to time.
async fn upkeep(fleet: Arc<Fleet>, stop: CancellationToken) {
    let mut tick = tokio::time::interval(UPKEEP_INTERVAL);
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

/// Takes over rule changes of other collectors, and completes staged rollouts.
async fn follow_rules(rules: Arc<Rules>, fleet: Arc<Fleet>, stop: CancellationToken) {
    let mut refresh = tokio::time::interval(rules.refresh_interval());
    let mut staging = tokio::time::interval(STAGING_INTERVAL);
    loop {
        let (rules, fleet) = (Arc::clone(&rules), Arc::clone(&fleet));
        let _ = tokio::select! {
            () = stop.cancelled() => return,
            _ = refresh.tick() => tokio::task::spawn_blocking(move || rules.refresh_shared()).await,
            _ = staging.tick() => tokio::task::spawn_blocking(move || fleet.complete_staged()).await,
        };
    }
}

impl Running {
    /// Returns when a part has ended by itself, which is a fault. The log has the reason.
    pub async fn failed(&mut self) {
        tokio::select! {
            _ = &mut self.grpc => {}
            _ = &mut self.http => {}
            _ = &mut self.writer => {}
        }
    }

    /// Refuses new connections, answers every received batch, makes everything durable, and ends all parts.
    pub async fn shutdown(self) {
        let Self { forwarding, stop, stop_writer, grpc, http, writer, table, fleet, timeout, .. } = self;
        stop.cancel();
        for (name, mut server) in [("gRPC", grpc), ("HTTP", http)] {
            if !server.is_finished() && tokio::time::timeout(timeout, &mut server).await.is_err() {
                tracing::warn!("cut open connections of the {name} server, which did not end in time");
                server.abort();
            }
        }
        stop_writer.cancel();
        if !writer.is_finished() {
            let _ = writer.await;
        }
        if let Some(table) = table {
            table.stop().await;
        }
        for task in forwarding {
            let _ = task.await;
        }
        let _ = tokio::task::spawn_blocking(move || fleet.upkeep()).await;
        tracing::info!("the collector has ended");
    }
}
