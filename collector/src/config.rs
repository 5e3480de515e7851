//! The configuration of the collector: the options of all modules, and the checks that concern several of them.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::Args;
use gannet_base::logging::LogFormat;
use serde::{Deserialize, Serialize};

use crate::{
    auth::{AuthOptions, NodeIdentity},
    clickhouse::{self, ClickHouseOptions, QueryProgram, TableLocation},
    debuginfo::DebugInfoOptions,
    fleet::FleetOptions,
    forward::ForwardOptions,
    ingest::IngestOptions,
    query::QueryOptions,
    recording::RecordingOptions,
    rules::RulesLocation,
    server::listener::ServerOptions,
    sql::SqlOptions,
    store::{Bucket, StoreOptions},
    table::TableOptions,
    tls::TlsOptions,
};

/// The data directory without `--data` and `--local`.
const DEFAULT_DATA: &str = "gannet-data";

/// Everything that an operator can set. Each option is a flag, an environment variable and a key of the config file.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Location of the profiles: a directory, which then holds all other data too, or a bucket, which several collectors
    /// may share: s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH. Credentials, region and endpoint of a bucket
    /// come from the environment (AWS_…, GOOGLE_…, AZURE_…)
    #[arg(long, value_name = "DIR|URL", env = "GANNET_COLLECTOR_DATA", default_value = DEFAULT_DATA)]
    pub data: DataLocation,
    /// Directory of the index, the list of nodes and the rules of `--rules-store file` if --data is a bucket. The collector
    /// rebuilds a lost index
    #[arg(long, value_name = "DIR", env = "GANNET_COLLECTOR_LOCAL", default_value = DEFAULT_DATA)]
    pub local: PathBuf,
    /// Storage of the rules: `file` (below --data), `file=DIR` for a directory that several collectors share, `kubernetes`
    /// for TriggerRule resources in the collector's own namespace, or `kubernetes=NAMESPACE`
    #[arg(long, value_name = "STORAGE", env = "GANNET_COLLECTOR_RULES_STORE", default_value = "file")]
    pub rules_store: RulesLocation,
    /// Access to the Kubernetes API outside of a cluster
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Form of the log on standard error; GANNET_COLLECTOR_LOG sets its filter, like info,kube=debug
    #[arg(long, value_name = "FORMAT", env = "GANNET_COLLECTOR_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Addresses of the listeners.
    #[command(flatten)]
    #[serde(flatten)]
    pub server: ServerOptions,
    /// Certificates of both listeners.
    #[command(flatten)]
    #[serde(flatten)]
    pub tls: TlsOptions,
    /// Authentication and roles.
    #[command(flatten)]
    #[serde(flatten)]
    pub auth: AuthOptions,
    /// Limits of the stored profiles.
    #[command(flatten)]
    #[serde(flatten)]
    pub store: StoreOptions,
    /// The table beside the stored profiles.
    #[command(flatten)]
    #[serde(flatten)]
    pub table: TableOptions,
    /// Limits of SQL queries.
    #[command(flatten)]
    #[serde(flatten)]
    pub sql: SqlOptions,
    /// Queries by ClickHouse.
    #[command(flatten)]
    #[serde(flatten)]
    pub clickhouse: ClickHouseOptions,
    /// Debug information of stripped programs.
    #[command(flatten)]
    #[serde(flatten)]
    pub debuginfo: DebugInfoOptions,
    /// Limits of accepted batches.
    #[command(flatten)]
    #[serde(flatten)]
    pub ingest: IngestOptions,
    /// Limits of the known nodes.
    #[command(flatten)]
    #[serde(flatten)]
    pub fleet: FleetOptions,
    /// Targets of forwarding.
    #[command(flatten)]
    #[serde(flatten)]
    pub forward: ForwardOptions,
    /// Metrics from profiles.
    #[command(flatten)]
    #[serde(flatten)]
    pub recording: RecordingOptions,
    /// Limits of queries.
    #[arg(skip)]
    #[serde(skip)]
    pub query: QueryOptions,
}

impl Default for Config {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

/// The value of `--data`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataLocation {
    /// A directory for all data.
    Directory(PathBuf),
    /// A bucket for the profiles.
    Bucket(Bucket),
}

impl FromStr for DataLocation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains("://") {
            Bucket::parse(text).map(Self::Bucket)
        } else {
            Ok(Self::Directory(text.into()))
        }
    }
}

impl fmt::Display for DataLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::Bucket(bucket) => bucket.fmt(f),
        }
    }
}

gannet_base::serde_as_text!(DataLocation);

/// A configuration that cannot work. The text names the option and the cure.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// An option lacks another one, which is wrong usage.
    #[error("{0}")]
    Incomplete(&'static str),
    /// The options contradict each other or would be unsafe.
    #[error("{0}")]
    Invalid(String),
}

impl Config {
    /// Returns the defaults of the command line, but with this data directory and listening on any free loopback port.
    pub fn new(data: impl Into<PathBuf>) -> Self {
        let mut config = Self { data: DataLocation::Directory(data.into()), ..Self::default() };
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        (config.server.grpc_listen, config.server.http_listen) = (any, any);
        config
    }

    /// Returns the directory of all data that is not in a bucket.
    pub(crate) fn directory(&self) -> &PathBuf {
        match &self.data {
            DataLocation::Directory(directory) => directory,
            DataLocation::Bucket(_) => &self.local,
        }
    }

    /// Returns the bucket of the profiles, if they lie in one.
    pub(crate) fn bucket(&self) -> Option<&Bucket> {
        match &self.data {
            DataLocation::Directory(_) => None,
            DataLocation::Bucket(bucket) => Some(bucket),
        }
    }

    /// Returns the place of the tables as ClickHouse sees it, or a text with the cure.
    pub(crate) fn table_location(&self) -> Result<TableLocation, String> {
        match &self.clickhouse.query_tables {
            Some(location) => Ok(location.clone()),
            None => clickhouse::default_location(self.directory(), self.bucket()),
        }
    }

    /// Reports whether the listeners verify client certificates.
    pub(crate) fn has_client_ca(&self) -> bool {
        self.tls.tls_client_ca.is_some()
    }

    /// Checks the options, each alone and with each other.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        self.check_pairs()?;
        self.check_addresses()?;
        self.check_auth()?;
        self.check_sizes()
    }

    /// Checks options that need another option.
    fn check_pairs(&self) -> Result<(), ConfigError> {
        let TlsOptions { tls_cert, tls_key, tls_client_ca, .. } = &self.tls;
        let ForwardOptions { forward, forward_tenant, forward_token_file, forward_ca } = &self.forward;
        let no_target = forward.is_empty();
        let ClickHouseOptions { query, query_tables, query_user, query_password_file, query_ca, .. } =
            &self.clickhouse;
        let no_engine = *query == QueryProgram::Embedded;
        let missing = [
            (tls_cert.is_some() && tls_key.is_none(), "--tls-cert needs --tls-key"),
            (tls_key.is_some() && tls_cert.is_none(), "--tls-key needs --tls-cert"),
            (tls_client_ca.is_some() && tls_cert.is_none(), "--tls-client-ca needs --tls-cert"),
            (forward_tenant.is_some() && no_target, "--forward-tenant needs --forward"),
            (forward_token_file.is_some() && no_target, "--forward-token-file needs --forward"),
            (forward_ca.is_some() && no_target, "--forward-ca needs --forward"),
            (no_engine && query_tables.is_some(), "--query-tables needs --query clickhouse=URL"),
            (no_engine && query_user.is_some(), "--query-user needs --query clickhouse=URL"),
            (
                no_engine && query_password_file.is_some(),
                "--query-password-file needs --query clickhouse=URL",
            ),
            (no_engine && query_ca.is_some(), "--query-ca needs --query clickhouse=URL"),
            (
                query_password_file.is_some() && query_user.is_none(),
                "--query-password-file needs --query-user",
            ),
            (
                !no_engine && !self.table.table,
                "--query clickhouse=URL needs --table, which writes what ClickHouse reads",
            ),
        ];
        match missing.into_iter().find(|(is_missing, _)| *is_missing) {
            None => Ok(()),
            Some((_, text)) => Err(ConfigError::Incomplete(text)),
        }
    }

    fn check_addresses(&self) -> Result<(), ConfigError> {
        let ServerOptions { grpc_listen, http_listen, debug_listen, insecure, .. } = &self.server;
        if !self.tls.is_on() && !insecure {
            for (flag, addr) in [("--grpc-listen", grpc_listen), ("--http-listen", http_listen)] {
                if !addr.ip().is_loopback() {
                    return wrong(format!(
                        "{flag} {addr} is plaintext and other machines can reach it: give --tls-cert and --tls-key, or a \
                         loopback address, or --insecure if you trust the network"
                    ));
                }
            }
        }
        if grpc_listen == http_listen && grpc_listen.port() != 0 {
            return wrong(format!(
                "--grpc-listen and --http-listen are both {grpc_listen}: give them different ports"
            ));
        }
        let is_open = |addr: &&SocketAddr| !addr.ip().is_loopback();
        if let Some(addr) = debug_listen.as_ref().filter(is_open) {
            return wrong(format!(
                "--debug-listen {addr} lets in every client, and other machines can reach it: give a loopback address, like \
                 127.0.0.1:4181"
            ));
        }
        Ok(())
    }

    fn check_auth(&self) -> Result<(), ConfigError> {
        let AuthOptions { role, node_identity, token_audience } = &self.auth;
        let has_client_ca = self.has_client_ca();
        if !role.is_empty() && !has_client_ca && token_audience.is_none() {
            return wrong(
                "--role: no caller can prove its identity: give --tls-client-ca or --token-audience as well",
            );
        }
        match node_identity {
            NodeIdentity::Certificate if !has_client_ca => {
                return wrong("--node-identity certificate: give --tls-client-ca as well");
            }
            NodeIdentity::Token if token_audience.is_none() => {
                return wrong("--node-identity token: give --token-audience as well");
            }
            _ => {}
        }
        let is_local = self.server.grpc_listen.ip().is_loopback();
        if token_audience.is_some() && !self.tls.is_on() && !self.server.insecure && !is_local {
            return wrong(
                "--token-audience: clients would send tokens in plaintext: give --tls-cert and --tls-key",
            );
        }
        Ok(())
    }

    fn check_sizes(&self) -> Result<(), ConfigError> {
        let max_batch_bytes = self.ingest.max_batch_bytes;
        let StoreOptions { retention_age, retention_bytes, flush_interval, bucket_interval, .. } = self.store;
        if retention_age.0 < Duration::from_secs(60) {
            return wrong(
                "--retention-age is below a minute: retention would remove profiles before anyone sees them",
            );
        }
        if flush_interval.0 > Duration::from_secs(10) {
            return wrong("--flush-interval is above 10 s: agents wait as long for each answer");
        }
        if !(Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&bucket_interval.0) {
            return wrong("--bucket-interval must be between 100 ms and 1 h");
        }
        if !(Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&self.table.table_interval.0) {
            return wrong("--table-interval must be between 100 ms and 1 h");
        }
        let SqlOptions { sql_timeout, sql_memory_bytes, sql_max_rows, .. } = self.sql;
        // Removed files of the table stay for 15 minutes.
        if !(Duration::from_secs(1)..=Duration::from_secs(600)).contains(&sql_timeout.0) {
            return wrong("--sql-timeout must be between 1 s and 10 min");
        }
        // The same for ClickHouse.
        if !(Duration::from_secs(1)..=Duration::from_secs(600)).contains(&self.clickhouse.query_timeout.0) {
            return wrong("--query-timeout must be between 1 s and 10 min");
        }
        if self.clickhouse.query_memory_bytes.0 < 64 << 20 {
            return wrong("--query-memory-bytes is below 64 MiB, which is too little for ClickHouse");
        }
        if sql_memory_bytes.0 < 32 << 20 {
            return wrong("--sql-memory-bytes is below 32 MiB, which is too little for the rows of one file");
        }
        if sql_max_rows == 0 {
            return wrong("--sql-max-rows must be at least 1");
        }
        if !(1..=64 << 20).contains(&max_batch_bytes.0) {
            return wrong("--max-batch-bytes must be between 1 byte and 64 MiB");
        }
        if self.ingest.queue_bytes < max_batch_bytes.0 {
            return wrong("the ingest queue must hold at least one batch of the largest size");
        }
        if retention_bytes < max_batch_bytes {
            return wrong(format!(
                "--retention-bytes {retention_bytes} is too small for one profile of --max-batch-bytes {max_batch_bytes}"
            ));
        }
        Ok(())
    }
}

fn wrong(text: impl Into<String>) -> Result<(), ConfigError> {
    Err(ConfigError::Invalid(text.into()))
}

#[cfg(test)]
mod tests {
    use gannet_base::TimeSpan;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::grpc(|c: &mut Config| c.server.grpc_listen = ([0, 0, 0, 0], 4100).into(), "--grpc-listen 0.0.0.0:4100")]
    #[case::http(|c: &mut Config| c.server.http_listen = ([10, 0, 0, 1], 80).into(), "--http-listen 10.0.0.1:80")]
    #[case::debug(|c: &mut Config| c.server.debug_listen = Some(([0, 0, 0, 0], 4181).into()), "--debug-listen 0.0.0.0:4181")]
    #[case::roles(|c: &mut Config| c.auth.role = vec!["editor=anna".parse().unwrap()], "--tls-client-ca")]
    #[case::identity(|c: &mut Config| c.auth.node_identity = NodeIdentity::Token, "--token-audience")]
    #[case::same(|c: &mut Config| { c.server.grpc_listen.set_port(9); c.server.http_listen.set_port(9) }, "different ports")]
    #[case::key(|c: &mut Config| c.tls.tls_cert = Some("x".into()), "--tls-key")]
    #[case::target(|c: &mut Config| c.forward.forward_tenant = Some("x".into()), "--forward")]
    #[case::slow_flush(|c: &mut Config| c.store.flush_interval = TimeSpan::from_secs(11), "--flush-interval")]
    #[case::busy_bucket(|c: &mut Config| c.store.bucket_interval = TimeSpan::from_secs(0), "--bucket-interval")]
    #[case::busy_table(|c: &mut Config| c.table.table_interval = TimeSpan::from_secs(0), "--table-interval")]
    #[case::short_query(|c: &mut Config| c.sql.sql_timeout = TimeSpan::from_secs(0), "--sql-timeout")]
    #[case::small_query(|c: &mut Config| c.sql.sql_memory_bytes = gannet_base::ByteSize(1), "--sql-memory-bytes")]
    #[case::no_row(|c: &mut Config| c.sql.sql_max_rows = 0, "--sql-max-rows")]
    #[case::no_table(|c: &mut Config| c.clickhouse.query = "clickhouse=http://x:8123".parse().unwrap(), "--table")]
    #[case::no_engine(|c: &mut Config| c.clickhouse.query_user = Some("x".into()), "--query clickhouse=URL")]
    #[case::quick_engine(|c: &mut Config| c.clickhouse.query_timeout = TimeSpan::from_secs(0), "--query-timeout")]
    #[case::small_engine(|c: &mut Config| c.clickhouse.query_memory_bytes = gannet_base::ByteSize(1), "--query-memory-bytes")]
    #[case::young(|c: &mut Config| c.store.retention_age = TimeSpan::from_secs(1), "--retention-age")]
    fn an_impossible_configuration_names_its_flag(#[case] change: fn(&mut Config), #[case] says: &str) {
        let mut config = Config::new("/data");
        assert!(config.check().is_ok());
        change(&mut config);
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn plaintext_beyond_loopback_needs_insecure() {
        let mut config = Config::new("/data");
        config.server.grpc_listen = ([0, 0, 0, 0], 4100).into();
        assert!(config.check().unwrap_err().to_string().contains("--insecure"));
        config.server.insecure = true;
        assert!(config.check().is_ok());
    }
}
