//! One profile of a file on the page, for `gannet-collector open`: the parts of a collector that read, on a loopback port.
//!
//! The profile passes the same checks and the same store as every other profile. The program removes the store's directory when it ends.
//! It serves no call that changes the profile.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use gannet_base::{ByteSize, TimeSpan};
use gannet_proto::pprof;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    auth::Auth,
    collector::{StartError, open_debug_info, open_rules, open_store},
    config::Config,
    fleet::Fleet,
    forward::Forwarder,
    http::HttpState,
    ingest::{Ingest, NotStored, Onward},
    metrics::Metrics,
    pyroscope::{Pushed, batch_of},
    query::Query,
    server::{
        http,
        listener::{BoundSocket, Listener},
    },
    time,
    tls::ListenProtocol,
    triggers::Triggers,
};

/// Maximum size of a profile, compressed and uncompressed, in bytes.
pub const MAX_OPEN_BYTES: usize = 1 << 30;
/// A profile may have any time since 1970, and its clock may be wrong.
const ANY_TIME: Duration = Duration::from_secs(200 * 365 * 86_400);
/// Time that open requests have to end.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// The reason why the page cannot show a profile.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file is not a valid profile.
    #[error("{0}; the file must be a profile in pprof")]
    Profile(String),
    /// The file is larger than [`MAX_OPEN_BYTES`].
    #[error("the file is larger than 1 GiB; merge fewer profiles into it")]
    TooLarge,
    /// The profile has nothing to show.
    #[error("the profile has no sample with a positive value")]
    Empty,
    /// The program cannot create the directory of the store.
    #[error("cannot create a directory for temporary files (TMPDIR): {0}")]
    Directory(#[source] io::Error),
    /// A part of the collector cannot start.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// A profile on the page. Dropping it removes its store.
pub struct Opened {
    /// Address of the page with the profile.
    pub link: String,
    stop: CancellationToken,
    server: JoinHandle<()>,
    _directory: TempDir,
}

impl Opened {
    /// Ends the server, with all requests in progress.
    pub async fn close(mut self) {
        self.stop.cancel();
        if tokio::time::timeout(END_TIMEOUT, &mut self.server).await.is_err() {
            self.server.abort();
        }
    }
}

/// Shows a profile in pprof on a port of 127.0.0.1, or on a free one for port 0. `name` is its service on the page, unless that is
/// empty.
pub async fn open(bytes: Vec<u8>, name: String, port: u16) -> Result<Opened, OpenError> {
    if bytes.len() > MAX_OPEN_BYTES {
        return Err(OpenError::TooLarge);
    }
    let (metrics, stop) = (Metrics::new(), CancellationToken::new());
    let socket = BoundSocket::bind("--port", SocketAddr::from(([127, 0, 0, 1], port)));
    let socket = socket.await.map_err(StartError::from)?;
    let read = tokio::task::spawn_blocking(move || {
        let profile = pprof::decode(&bytes, MAX_OPEN_BYTES).map_err(|error| error.to_string())?;
        let labels = vec![("service_name".to_owned(), name)];
        batch_of(Pushed { labels, profile, id: None, start_ms: None, duration_ms: 0, sender: String::new() })
            .map_err(|status| status.message().to_owned())
    });
    let read = read.await.map_err(|error| OpenError::Profile(error.to_string()))?;
    let mut batch = read.map_err(OpenError::Profile)?.ok_or(OpenError::Empty)?;
    "opened from a file".clone_into(&mut batch.reason);
    let link = link(socket.addr, &batch);

    let directory =
        tempfile::Builder::new().prefix("gannet-open-").tempdir().map_err(OpenError::Directory)?;
    let config = config(&directory);
    let (store, writer) = open_store(&config, &metrics).await.map_err(StartError::from)?;
    let (rules, _) = open_rules(&config, &metrics).await?;
    let fleet =
        Fleet::open(config.directory(), &config.fleet, Arc::clone(&rules), metrics.clone(), stop.clone());
    let stop_writer = CancellationToken::new();
    let (forwarder, _) =
        Forwarder::start(&config.forward, &metrics, &stop_writer, END_TIMEOUT).map_err(StartError::from)?;
    let onward = Onward { forwarder, recorder: None };
    let ingest = Ingest::new(
        Arc::clone(&store),
        writer.queue(),
        &config.ingest,
        onward,
        metrics.clone(),
        stop_writer.clone(),
    );
    let writer = tokio::spawn(writer.run(stop_writer.clone()));
    ingest.store_one(batch).await.map_err(|error| match error {
        NotStored::Refused(reason) | NotStored::Throttled(reason) => OpenError::Profile(reason),
    })?;
    // From here on, nothing writes.
    stop_writer.cancel();
    let _ = writer.await;

    let debug_info = open_debug_info(&config, &metrics).await?;
    let max_bytes = config.ingest.max_batch_bytes.0;
    let query =
        Arc::new(Query::new(Arc::clone(&store), debug_info, &config.query, max_bytes, metrics.clone()));
    let state = HttpState {
        query,
        ingest: None,
        otlp: None,
        recorder: None,
        store,
        triggers: Triggers { rules, fleet, stop: stop.clone() },
        metrics: metrics.clone(),
        auth: Auth::open(),
    };
    let listener = Listener::start(socket, None, ListenProtocol::Http, metrics, stop.clone());
    let server = http::start_debug(listener, state, &stop);
    Ok(Opened { link, stop, server, _directory: directory })
}

/// Returns the options of a store that takes one profile of any size and time.
fn config(directory: &TempDir) -> Config {
    let mut config = Config::new(directory.path());
    config.store.retention_age = TimeSpan(ANY_TIME);
    config.store.retention_bytes = ByteSize(u64::MAX);
    config.store.min_free_bytes = ByteSize(0);
    config.store.flush_interval = TimeSpan(Duration::from_millis(1));
    config.ingest.max_batch_bytes = ByteSize(MAX_OPEN_BYTES as u64);
    config.ingest.max_clock_ahead = ANY_TIME;
    config
}

/// Returns the page's address with the range of the profile.
fn link(addr: SocketAddr, batch: &gannet_proto::ingest::Batch) -> String {
    let start = batch.start.as_ref().and_then(time::to_ms).unwrap_or(0);
    let duration = batch.duration.as_ref().and_then(time::duration_to_ms).unwrap_or(0);
    let end = start.saturating_add(duration.max(1000));
    format!("http://{addr}/?from={start}&until={end}&profile={}", batch.batch_id)
}
