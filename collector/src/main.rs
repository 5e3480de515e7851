//! The collector's command line.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use gannet_collector::{
    AuthOptions, Bucket, Collector, Config, FleetOptions, ForwardOptions, ForwardTarget, Grant,
    IngestOptions, NodeIdentity, RulesLocation, ServerOptions, StoreOptions, TlsOptions, parse_bytes,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Takes profiles from Gannet's agents, keeps them, shows them, and hands out the rules by which agents profile.
#[derive(Parser)]
#[command(name = "gannet-collector", version)]
struct Args {
    #[command(subcommand)]
    command: Option<Verb>,
    /// Where the profiles are kept: a directory, which then holds everything else too, or a bucket, which several
    /// collectors may share: s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH. Credentials, region and endpoint
    /// of a bucket are taken from the environment (AWS_…, GOOGLE_…, AZURE_…).
    #[arg(long, value_name = "DIR|URL", env = "GANNET_COLLECTOR_DATA", default_value = DATA, value_parser = Data::parse)]
    data: Data,
    /// Where the index, the list of nodes and the rules of `--rules-store file` are kept if --data is a bucket. The index
    /// is built anew if it is lost.
    #[arg(long, value_name = "DIR", env = "GANNET_COLLECTOR_LOCAL", default_value = DATA)]
    local: PathBuf,
    /// Where the rules are kept: `file` (below --data), `file=DIR` for a directory that several collectors share,
    /// `kubernetes` for TriggerRule resources in the collector's own namespace, or `kubernetes=NAMESPACE`.
    #[arg(long, value_name = "STORE", env = "GANNET_COLLECTOR_RULES_STORE", default_value = "file")]
    rules_store: RulesLocation,
    /// Where gRPC is served: agents, gannetctl, control services.
    #[arg(long, value_name = "ADDRESS", env = "GANNET_COLLECTOR_LISTEN", default_value = gannet_proto::ports::COLLECTOR_GRPC)]
    listen: SocketAddr,
    /// Where the page, the HTTP API, metrics and probes are served.
    #[arg(long, value_name = "ADDRESS", env = "GANNET_COLLECTOR_HTTP", default_value = gannet_proto::ports::COLLECTOR_HTTP)]
    http: SocketAddr,
    /// Serve the page once more on this loopback address, in plaintext, to whoever is on this machine or comes by kubectl
    /// port-forward, also where --tls-client-ca asks others for a certificate.
    #[arg(long, value_name = "ADDRESS", env = "GANNET_COLLECTOR_HTTP_LOCAL")]
    http_local: Option<SocketAddr>,
    /// The certificate chain of this collector (PEM).
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_TLS_CERT", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert (PEM).
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_TLS_KEY", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Let in only clients with a certificate of these authorities (PEM); probes are answered to anyone.
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_TLS_CLIENT_CA", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// Give a role to those who prove who they are: agent=WHO, viewer=WHO or editor=WHO. WHO is a name in a certificate
    /// (common name, DNS name, URI) or of a service account, group:NAME (organization, or group of a token), or *. May be
    /// given several times; without it, all of them may do everything.
    #[arg(long, value_name = "ROLE=WHO", env = "GANNET_COLLECTOR_ROLE", value_delimiter = ',')]
    role: Vec<Grant>,
    /// Hold an agent's claim to be a node against its `certificate` (one of its names must be the node's) or its `token`
    /// (it must be bound to a pod of that node); `any`: against nothing.
    #[arg(long, value_name = "BY", env = "GANNET_COLLECTOR_NODE_IDENTITY", default_value = "any")]
    node_identity: NodeIdentity,
    /// Take tokens of Kubernetes service accounts that are for this audience. The collector must be allowed to create
    /// tokenreviews.
    #[arg(long, value_name = "AUDIENCE", env = "GANNET_COLLECTOR_TOKEN_AUDIENCE")]
    token_audience: Option<String>,
    /// How to reach the Kubernetes API, outside of a cluster.
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// Hand every profile on as well: pyroscope=URL or parca=URL. May be given several times.
    #[arg(long, value_name = "TARGET=URL", env = "GANNET_COLLECTOR_FORWARD", value_delimiter = ',')]
    forward: Vec<ForwardTarget>,
    /// Whose profiles they are, for a Pyroscope with several tenants (X-Scope-OrgID).
    #[arg(long, value_name = "TENANT", env = "GANNET_COLLECTOR_FORWARD_TENANT", requires = "forward")]
    forward_tenant: Option<String>,
    /// Send the bearer token that this file holds to the targets.
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_FORWARD_TOKEN_FILE", requires = "forward")]
    forward_token_file: Option<PathBuf>,
    /// Trust the certificates of this authority (PEM) rather than the system's at the targets.
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_FORWARD_CA", requires = "forward")]
    forward_ca: Option<PathBuf>,
    /// Serve plaintext on addresses that other machines can reach.
    #[arg(long, env = "GANNET_COLLECTOR_INSECURE")]
    insecure: bool,
    /// Remove profiles that are older, and refuse them.
    #[arg(long, value_name = "AGE", env = "GANNET_COLLECTOR_RETENTION_AGE", default_value = "7d", value_parser = humantime::parse_duration)]
    retention_age: Duration,
    /// Remove the oldest profiles while all together are larger.
    #[arg(long, value_name = "BYTES", env = "GANNET_COLLECTOR_RETENTION_BYTES", default_value = "10GiB", value_parser = parse_bytes)]
    retention_bytes: u64,
    /// Take nothing while the disk has less room than this.
    #[arg(long, value_name = "BYTES", env = "GANNET_COLLECTOR_MIN_FREE_BYTES", default_value = "64MiB", value_parser = parse_bytes)]
    min_free_bytes: u64,
    /// Refuse compressed profiles that are larger.
    #[arg(long, value_name = "BYTES", env = "GANNET_COLLECTOR_MAX_BATCH_BYTES", default_value = "4MiB", value_parser = parse_bytes)]
    max_batch_bytes: u64,
    /// Hold at most this many series.
    #[arg(long, value_name = "N", env = "GANNET_COLLECTOR_MAX_SERIES", default_value_t = 200_000)]
    max_series: usize,
    /// Know at most this many nodes.
    #[arg(long, value_name = "N", env = "GANNET_COLLECTOR_MAX_NODES", default_value_t = 10_000)]
    max_nodes: usize,
    /// Write logs as JSON, one object a line.
    #[arg(long, env = "GANNET_COLLECTOR_LOG_JSON")]
    log_json: bool,
}

const DATA: &str = "gannet-data";

#[derive(Clone)]
enum Data {
    Directory(PathBuf),
    Bucket(Bucket),
}

impl Data {
    fn parse(text: &str) -> Result<Self, String> {
        if text.contains("://") {
            Bucket::parse(text).map(Self::Bucket)
        } else {
            Ok(Self::Directory(text.into()))
        }
    }
}

#[derive(Subcommand)]
enum Verb {
    /// Print the definition of the TriggerRule custom resource, and do nothing else.
    Crd,
}

/// Address space, not memory: graphs of the deepest stacks are encoded and dropped by recursion.
const STACK_BYTES: usize = 16 << 20;

impl Args {
    fn config(self) -> Config {
        let tls = self.tls_cert.zip(self.tls_key);
        let (data, bucket) = match self.data {
            Data::Directory(data) => (data, None),
            Data::Bucket(bucket) => (self.local, Some(bucket)),
        };
        let defaults = Config::new(data);
        Config {
            kubeconfig: self.kubeconfig,
            server: ServerOptions {
                grpc_listen: self.listen,
                http_listen: self.http,
                debug_listen: self.http_local,
                insecure: self.insecure,
                ..defaults.server
            },
            tls: tls.map(|(cert, key)| TlsOptions {
                client_ca: self.tls_client_ca,
                ..TlsOptions::new(cert, key)
            }),
            auth: AuthOptions {
                roles: self.role,
                node_identity: self.node_identity,
                token_audience: self.token_audience,
            },
            store: StoreOptions {
                bucket,
                retention_age: self.retention_age,
                retention_bytes: self.retention_bytes,
                min_free_bytes: self.min_free_bytes,
                max_series: self.max_series,
                ..defaults.store
            },
            ingest: IngestOptions { max_batch_bytes: self.max_batch_bytes, ..defaults.ingest },
            rules: self.rules_store,
            fleet: FleetOptions { max_nodes: self.max_nodes },
            forward: ForwardOptions {
                targets: self.forward,
                tenant: self.forward_tenant,
                token_file: self.forward_token_file,
                ca: self.forward_ca,
            },
            ..defaults
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(Verb::Crd) = args.command {
        let text = gannet_collector::custom_resource().unwrap_or_default();
        let written = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
        return if written.is_ok() && !text.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    // What fails there is told where it matters, with what to do about it.
    let filter = EnvFilter::try_from_env("GANNET_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,kube_client::client::builder=off"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if args.log_json {
        log.json().init();
    } else {
        log.init();
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().thread_stack_size(STACK_BYTES).build();
    let ended =
        runtime.context("cannot start threads").and_then(|runtime| runtime.block_on(run(args.config())));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Said whatever the log's filter is.
            eprintln!("gannet-collector: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let (data, bucket) = (config.data.clone(), config.store.bucket.clone().map(tracing::field::display));
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    let mut running = Collector::start(config).await?;
    tracing::info!(
        data = %data.display(),
        bucket,
        grpc = %running.grpc_addr,
        page = %format_args!("{scheme}://{}/", running.http_addr),
        "the collector serves"
    );
    let failed = tokio::select! {
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
        () = running.failed() => true,
    };
    running.shutdown().await;
    if failed {
        anyhow::bail!("a part of the collector has ended by itself; the log above says which");
    }
    Ok(())
}
