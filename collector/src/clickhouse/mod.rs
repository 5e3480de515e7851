//! Queries of the tables by a ClickHouse server, which reads them where they are.
//!
//! The collector names the version of each table in the statement, so it knows the segments that the answer includes. It reads the
//! newer segments itself, and adds both up: no sample is missing, and none counts twice.
//!
//! | module | owns |
//! |---|---|
//! | `client` | the HTTP interface: limits, credentials, error texts |
//! | `location` | nothing: where ClickHouse finds the tables |
//! | `sql`, `literal` | nothing: the statements |
//! | `rows` | nothing: the rows of an answer |
//! | `merge` | nothing: the sums of an answer as a profile |

mod client;
mod literal;
mod location;
mod merge;
mod rows;
mod sql;

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use clap::Args;
use gannet_base::{ByteSize, TimeSpan};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, OwnedMutexGuard};

use self::client::HttpInterface;
pub use self::location::TableLocation;
pub(crate) use self::{
    merge::TableKind,
    sql::{Condition, TableSelection},
};
use crate::{
    metrics::Metrics,
    profile_type::PROFILE_NAME,
    store::{Bucket, TableObjects},
    table::{CoverageReader, TableError, TableVersions},
};

/// The program that answers queries over many profiles.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Queries by ClickHouse")]
#[serde(default)]
pub struct ClickHouseOptions {
    /// Program that merges profiles for flame graphs, tables and downloads: `embedded` for the collector itself, or `clickhouse=URL`
    /// for a ClickHouse server that reads the tables of --table. URL is its HTTP interface, like https://clickhouse:8443
    #[arg(long, value_name = "PROGRAM", env = "GANNET_COLLECTOR_QUERY", default_value = "embedded")]
    pub query: QueryProgram,
    /// Place of the tables as ClickHouse sees it: a directory, a URL like https://BUCKET.s3.REGION.amazonaws.com/PATH/table, or
    /// collection=NAME for a named collection with URL and credentials. By default derived from --data
    #[arg(long, value_name = "PLACE", env = "GANNET_COLLECTOR_QUERY_TABLES")]
    pub query_tables: Option<TableLocation>,
    /// User of ClickHouse
    #[arg(long, value_name = "NAME", env = "GANNET_COLLECTOR_QUERY_USER")]
    pub query_user: Option<String>,
    /// File with the password of the user; the collector reads it for each query
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_QUERY_PASSWORD_FILE")]
    pub query_password_file: Option<PathBuf>,
    /// Certificate authority of ClickHouse, in PEM. By default those of the system
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_QUERY_CA")]
    pub query_ca: Option<PathBuf>,
    /// End a statement of ClickHouse after this time
    #[arg(long, value_name = "TIME", env = "GANNET_COLLECTOR_QUERY_TIMEOUT", default_value = "60s")]
    pub query_timeout: TimeSpan,
    /// Limit the memory of one statement in ClickHouse
    #[arg(long, value_name = "SIZE", env = "GANNET_COLLECTOR_QUERY_MEMORY_BYTES", default_value = "4GiB")]
    pub query_memory_bytes: ByteSize,
}

impl Default for ClickHouseOptions {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

/// The value of `--query`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum QueryProgram {
    /// The collector itself.
    #[default]
    Embedded,
    /// A ClickHouse server.
    ClickHouse(ServerUrl),
}

impl FromStr for QueryProgram {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "embedded" => Ok(Self::Embedded),
            Some(("clickhouse", url)) => url.parse().map(Self::ClickHouse),
            _ => Err(format!("`{text}` is no program for queries: write embedded, or {FORM}")),
        }
    }
}

impl fmt::Display for QueryProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("embedded"),
            Self::ClickHouse(url) => write!(f, "clickhouse={url}"),
        }
    }
}

gannet_base::serde_as_text!(QueryProgram);

const FORM: &str =
    "clickhouse=URL with the HTTP interface of a server, like clickhouse=https://clickhouse:8443";

/// The URL of a server: scheme, host, port and path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerUrl(url::Url);

impl ServerUrl {
    fn is_secure(&self) -> bool {
        self.0.scheme() == "https"
    }
}

impl FromStr for ServerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let url = url::Url::parse(text).map_err(|error| format!("{error}: write {FORM}"))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
            return Err(format!("{}:// is not the HTTP interface of ClickHouse: write {FORM}", url.scheme()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("the URL holds a user or a password, which logs would show: give --query-user and \
                        --query-password-file"
                .to_owned());
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(format!("the URL holds more than a server and a path: write {FORM}"));
        }
        Ok(Self(url))
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str().trim_end_matches('/'))
    }
}

/// Why ClickHouse has no answer. Each text names the cure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClickHouseError {
    #[error(
        "cannot reach ClickHouse at {server} (--query): {reason}; check that it runs there, and that a network policy lets the collector connect"
    )]
    Away { server: String, reason: String },
    #[error("ClickHouse at {server} refuses the user {user}: check --query-user and --query-password-file")]
    Login { server: String, user: String },
    #[error("cannot read --query-password-file {file}: {reason}")]
    Password { file: PathBuf, reason: String },
    #[error(
        "ClickHouse at {server} does not let the user read the tables: {reason}; GRANT CREATE TEMPORARY TABLE, S3, FILE ON *.* to it"
    )]
    Rights { server: String, reason: String },
    #[error(
        "the profile of the user in ClickHouse at {server} forbids settings: {reason}; give it readonly = 2 instead of 1"
    )]
    Readonly { server: String, reason: String },
    #[error(
        "ClickHouse at {server} cannot read a version of a Delta table: {reason}; use ClickHouse 25.8 or later"
    )]
    TooOld { server: String, reason: String },
    #[error(
        "ClickHouse at {server} cannot read the tables: {reason}; check --query-tables, and the credentials of ClickHouse for that place"
    )]
    Tables { server: String, reason: String },
    #[error("{0}")]
    Limit(String),
    #[error("ClickHouse at {server} runs too many queries, or someone ended this one: try again later")]
    Busy { server: String },
    #[error("ClickHouse at {server} failed: {reason}")]
    Failed { server: String, reason: String },
    /// The collector cannot read the logs of the tables.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// The connection to ClickHouse.
pub(crate) struct ClickHouse {
    http: HttpInterface,
    server: ServerUrl,
    location: TableLocation,
    coverage: Arc<Mutex<CoverageReader>>,
}

impl ClickHouse {
    /// Prepares the connection, without any. `objects`: the tables. An error names the option.
    pub(crate) fn new(
        options: &ClickHouseOptions,
        server: &ServerUrl,
        location: TableLocation,
        objects: TableObjects,
        metrics: Metrics,
    ) -> Result<Self, String> {
        Ok(Self {
            http: HttpInterface::new(server, options, metrics)?,
            server: server.clone(),
            location,
            coverage: Arc::new(Mutex::new(CoverageReader::new(objects))),
        })
    }

    /// Reads the logs of the tables. Returns what they hold now, and its versions, or `None` for tables without any commit.
    pub(crate) async fn coverage(
        &self,
    ) -> Result<(OwnedMutexGuard<CoverageReader>, Option<TableVersions>), ClickHouseError> {
        let mut coverage = Arc::clone(&self.coverage).lock_owned().await;
        let versions = coverage.refresh().await?;
        Ok((coverage, versions))
    }
}

/// Returns the place of the tables of a collector with this `--data`, or a text with the cure.
pub(crate) fn default_location(directory: &Path, bucket: Option<&Bucket>) -> Result<TableLocation, String> {
    match bucket {
        None => {
            let directory = std::path::absolute(directory).map_err(|error| error.to_string())?;
            Ok(TableLocation::Directory(directory.join("table")))
        }
        Some(bucket) => bucket.http_url("table").map(TableLocation::Bucket).ok_or_else(|| {
            format!("cannot derive the URL of the tables from --data {bucket}: give --query-tables")
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("duckdb", "no program for queries")]
    #[case("clickhouse=server:8123", "not the HTTP interface")]
    #[case("clickhouse=tcp://server:9000", "not the HTTP interface")]
    #[case("clickhouse=http://u:secret@server:8123", "--query-password-file")]
    #[case("clickhouse=http://server:8123/?user=u", "more than a server")]
    fn a_wrong_program_is_refused_with_the_form(#[case] text: &str, #[case] reason: &str) {
        let error = text.parse::<QueryProgram>().unwrap_err();
        assert!(error.contains(reason) && !error.contains("secret"), "{error}");
    }

    #[test]
    fn a_program_is_written_as_it_is_read() {
        for text in ["embedded", "clickhouse=http://server:8123", "clickhouse=https://server:8443/path"] {
            assert_eq!(text.parse::<QueryProgram>().unwrap().to_string(), text);
        }
    }
}
