//! The central program: stores the profiles of agents, answers queries about them, and distributes the rules by which
//! agents profile.
//!
//! A module imports only from rows below its own:
//!
//! | module | owns | never does |
//! |---|---|---|
//! | `args` | the command line | |
//! | `open` | one profile of a file on the page | take another one |
//! | `collector` | the wiring of all parts, their start and end | |
//! | `config` | the options of all modules, and the checks across them | |
//! | `server` | the sockets and the gRPC and HTTP servers | decide who may do what |
//! | `http` | the page, the HTTP API, metrics, probes | |
//! | `pyroscope` | the services of Pyroscope: Grafana reads through them, Pyroscope's clients push | answer a push before its profile is durable |
//! | `triggers` | nothing: it is the service in front of `rules` and `fleet` | |
//! | `deletions` | nothing: it is the service that deletes profiles, in front of `store` and the audit log of `rules` | delete without an entry in the audit log |
//! | `fleet` | connected nodes, the rules that each was sent, their answers | let a slow node delay another |
//! | `rules` | the rule sets, their revisions, their storage | take damaged content for an empty set |
//! | `ingest` | the push streams; checks every batch, answers it by its id | acknowledge a batch that is not durable |
//! | `otlp_service` | the receiver of OTLP profiles | acknowledge a profile that is not durable |
//! | `recording` | metrics from profiles: recording rules and their counts | count a profile twice |
//! | `forward` | profiles on their way to Pyroscope, Parca and receivers of OTLP | delay the push streams |
//! | `query` | selections, merges, flame graphs, tables, timelines | change anything |
//! | `debuginfo` | debug information by build id; adds names to the profiles that a query reads | change a stored profile |
//! | `sql` | SQL queries of the table | change anything |
//! | `clickhouse` | queries of the table by a ClickHouse server | change anything, or answer without it |
//! | `table` | the same profiles as Delta tables; a thread of its own adds new segments | delay the writer |
//! | `store` | objects, index, retention; one writer changes them | lose an acknowledged batch |
//! | `auth` | the identity and the roles of each caller | let a call through unchecked |
//! | `http_body`, `tls`, `peer`, `selector`, `profile_type`, `limits`, `metrics`, `durable`, `time`, `kubernetes` | what all of them share | |
//!
//! Profiles flow from `ingest` through the writer into `store`, and from there through `query` to the clients. Rules flow
//! from `triggers` into `rules`, which publishes each new revision to `fleet`, which offers every node its part.
//!
//! All data lies below one directory:
//!
//! | path | content |
//! |---|---|
//! | `objects/default/2026-01-31/12/ULID.segment` | a segment: the profiles of one flush with their metadata |
//! | `objects/default/2026-01-31/12/ULID.pb.gz` | a profile with its metadata, in the older layout |
//! | `objects/default/2026-01-31/12/ULID.deletion` | a deletion of profiles that is not carried out yet |
//! | `table/samples`, `table/profiles`, … | Delta tables of the profiles, with `--table` |
//! | `set-aside` | faulty objects and tables that `gannet-collector repair` moved; nothing reads or removes them |
//! | `index.redb` | the index of the objects; the store rebuilds a missing or corrupt one from them |
//! | `debuginfo/uploaded`, `debuginfo/debuginfod`, `debuginfo/agents` | debug information, each as `.build-id/ab/cdef01.debug` |
//! | `rules/rules.pb`, `rules/rules.pb.prev` | the rules, and their version before the last change |
//! | `rules/audit.jsonl`, `rules/audit.jsonl.1` | the audit log, one JSON object a line |
//! | `nodes.pb` | the nodes that were connected lately, a convenience after a restart |
//! | `lock` | locked while a collector runs |

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod args;
mod auth;
mod clickhouse;
mod collector;
mod config;
mod debuginfo;
mod deletions;
mod durable;
mod fleet;
mod forward;
#[doc(hidden)]
pub mod fuzz;
mod http;
mod http_body;
mod ingest;
mod kubernetes;
mod limits;
mod metrics;
mod open;
mod otlp_service;
mod peer;
mod profile_type;
mod pyroscope;
mod query;
mod recording;
mod rules;
mod selector;
mod server;
mod sql;
mod store;
mod table;
mod time;
mod tls;
mod triggers;

use std::{fs::File, path::Path};

pub use args::{ArgsError, Deletion, ExportOptions, Invocation, command, parse};
pub use auth::NodeIdentity;
pub use clickhouse::{QueryProgram, TableLocation};
pub use collector::{Collector, Running, StartError};
pub use config::{Config, ConfigError, DataLocation};
pub use metrics::declared_metrics;
pub use open::{MAX_OPEN_BYTES, OpenError, Opened, open};
pub use rules::RulesLocation;
pub use store::{
    ArchiveError, Bucket, Deleted, Exported, ImportError, Imported, ObjectFault, Repair, StoreError, Verified,
};
pub use tls::TlsOptions;

/// Reads all objects of the store that `config` names, and all files of its tables, and calls `report` with the path and the fault of
/// each faulty one. Changes nothing. Fails if the objects cannot be listed.
pub async fn verify(
    config: &Config,
    mut report: impl FnMut(&str, &ObjectFault),
) -> Result<Verified, StoreError> {
    let (data, bucket) = (config.directory(), config.bucket());
    let mut verified = store::verify(data, bucket, &mut report).await?;
    if let Some(tables) = store::open_tables(data, bucket)? {
        table::verify(&tables, &mut verified, report).await?;
    }
    Ok(verified)
}

/// Reads the same files as [`verify`], and sets aside the faulty objects and tables. Calls `report` with the path, the fault and the
/// repair of each. Deletes nothing. Fails if a collector uses the directory.
pub async fn repair(
    config: &Config,
    mut report: impl FnMut(&str, &ObjectFault, &Repair),
) -> Result<Verified, StoreError> {
    let (data, bucket) = (config.directory(), config.bucket());
    let _lock = store::lock_unused(data, bucket)?;
    let mut verified = store::repair(data, bucket, &mut report).await?;
    let Some(tables) = store::open_tables(data, bucket)? else { return Ok(verified) };
    let mut faults = Vec::new();
    let faulty =
        table::verify(&tables, &mut verified, |path, fault| faults.push((path.to_owned(), fault.clone())))
            .await?;
    let repair = match &tables.root {
        _ if faulty.is_empty() => return Ok(verified),
        // Running collectors would go on with their copies of the logs.
        None => Repair::Kept(
            "stop all collectors with --table, remove `table` from the bucket, and start them again",
        ),
        Some(root) => {
            let name = format!("{}/table-{}", store::ASIDE, ulid::Ulid::new());
            table::set_aside(root, &faulty, &data.join(&name))?;
            Repair::SetAside(name)
        }
    };
    for (path, fault) in &faults {
        report(path, fault, &repair);
    }
    Ok(verified)
}

/// Deletes the stored profiles with these labels that start from one time until another, or only counts them (`is_dry`). Fails if a
/// collector uses the directory, or with a text for a wrong selector or time.
pub async fn delete(config: &Config, deletion: &Deletion, is_dry: bool) -> Result<Deleted, CommandError> {
    let Deletion { query, from, until } = deletion;
    let doomed = choose(query, from.as_deref(), until.as_deref())?;
    let (data, bucket) = (config.directory(), config.bucket());
    let _lock = store::lock_unused(data, bucket)?;
    let found = store::delete(data, bucket, &doomed, true).await?;
    if is_dry || found.objects == 0 {
        return Ok(found);
    }
    // The entry precedes the deletion, so that a crash cannot hide the deletion.
    let rules = data.join("rules");
    if rules.is_dir() {
        let time = |text: &Option<String>| text.clone().unwrap_or_else(|| "any time".to_owned());
        let (from, until, n) = (time(from), time(until), found.profiles);
        rules::record_deletion(&rules, format!("{n} profiles with {query} from {from} until {until}"))
            .map_err(|source| StoreError::io("write the audit log in", &rules, source))?;
    }
    Ok(store::delete(data, bucket, &doomed, false).await?)
}

/// Writes the stored profiles with these labels that start from one time until another into a file, and calls `progress` from time to
/// time. Changes nothing in the store. Fails with a text for a wrong selector or time.
pub async fn export(
    config: &Config,
    options: &ExportOptions,
    progress: impl FnMut(&Exported),
) -> Result<Exported, CommandError> {
    let ExportOptions { query, from, until, output } = options;
    let chosen = choose(query, from.as_deref(), until.as_deref())?;
    Ok(store::export(config.directory(), config.bucket(), &chosen, query, output, progress).await?)
}

/// Adds the profiles of an exported file to the store that `config` names, and calls `progress` from time to time. Fails if a
/// collector uses the directory, and adds nothing of a damaged file.
pub async fn import(
    config: &Config,
    file: &Path,
    progress: impl FnMut(&Imported),
) -> Result<Imported, ImportError> {
    let file = File::open(file).map_err(ArchiveError::Io)?;
    let oldest_ms = time::now_ms().saturating_sub(config.store.retention_age.0.as_millis() as u64);
    store::import(config.directory(), config.bucket(), file, oldest_ms, progress).await
}

/// Reads the choice of a command, in the words of its flags.
fn choose(query: &str, from: Option<&str>, until: Option<&str>) -> Result<store::Chosen, CommandError> {
    let usage = |flag: &str, error: &dyn std::fmt::Display| CommandError::Usage(format!("{flag}: {error}"));
    let now_ms = time::now_ms();
    let at = |flag, text: Option<&str>, otherwise| {
        text.map_or(Ok(otherwise), |text| time::parse(text, now_ms).map_err(|error| usage(flag, &error)))
    };
    let selector = selector::Selector::parse(query).map_err(|error| usage("--query", &error))?;
    let (from_ms, until_ms) = (at("--from", from, 0)?, at("--until", until, u64::MAX)?);
    if from_ms >= until_ms {
        return Err(CommandError::Usage(
            "--from is not before --until: no profile is in the range".to_owned(),
        ));
    }
    Ok(store::Chosen { selector, from_ms, until_ms })
}

/// The reason why a deletion or an export failed. A deletion may have deleted some objects; the same call deletes the rest.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// An invalid selector or time.
    #[error("{0}")]
    Usage(String),
    /// An error of the store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Returns the definition of the TriggerRule resource as YAML. `None` means that the descriptors in this program do not
/// match its types.
pub fn custom_resource() -> Option<String> {
    let text = serde_saphyr::to_string(&rules::custom_resource()?).ok()?;
    Some(format!("# Made by `gannet-collector crd`.\n{}\n", text.trim_end()))
}
